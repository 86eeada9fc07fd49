"""What the pages say over a real database, to people and to a viewer, and that they never run what people typed."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from hpo.coordinator import Coordinator
from hpo.protocol import ClaimRequest
from tests.integration.pages.app import EXTERNAL, SIAMESE, WORKER, browser, form, make_app, sign_in, text_of, trained

EVIL = "<script>alert(1)</script> \"><img src=x onerror='alert(2)'>"


def test_an_empty_server_says_what_to_do_next(admin: TestClient) -> None:
    page = text_of(admin.get("/").text)
    assert "No studies yet" in page
    assert "whetstone study launch --preset mini" in page
    assert "whetstone worker --url http://testserver --token TOKEN" in page
    assert "whetstone worker --url http://testserver --token TOKEN" in text_of(admin.get("/workers").text)


def test_the_list_shows_state_best_and_budget_of_each_study(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(SIAMESE).study
    trained(hpo)
    page = text_of(admin.get("/").text)
    assert "digits" in page
    assert "running" in page
    assert "71.3%" in page
    assert "1 of 3" in page
    assert f'href="/studies/{study}/trials/0"' in admin.get("/").text


def test_a_study_shows_its_best_trial_by_layer_and_every_point(admin: TestClient, hpo: Coordinator) -> None:
    study, _ = hpo.create_study(SIAMESE).study, trained(hpo)
    page = admin.get(f"/studies/{study}").text
    seen = text_of(page)
    assert "Best accuracy 71.3% Trial 0" in seen
    assert "Chance is 5.0%" in seen
    assert re.search(r"Layer eta mu lambda conv1 \S+ \S+ \S+ conv2", seen)
    points = admin.get(f"/studies/{study}/progress.json").json()
    assert points["value"] == [0.713]
    assert points["best"] == [0.713]
    assert points["chance"] == 0.05
    assert points["percent"] is True


def test_an_objective_of_ones_own_is_shown_as_a_plain_number(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    hpo.add_trial(study, {"params": {"x": 0.5}, "value": -0.01234})
    seen = text_of(admin.get(f"/studies/{study}").text)
    assert "-1.23e-2" in seen
    assert "Chance" not in seen
    assert "/ask" in seen, "nobody asks: the page says how"


def test_a_trial_shows_curve_attempts_parameters_and_how_to_score_it(
    admin: TestClient, hpo: Coordinator, tmp_path: Path
) -> None:
    hpo.create_study(SIAMESE)
    study, n = trained(hpo)
    seen = text_of(admin.get(f"/studies/{study}/trials/{n}").text)
    assert "71.3%" in seen
    assert "w1" in seen
    assert "cpu" in seen
    assert re.search(r"Layer eta mu lambda conv1", seen)
    folder = hpo.get_trial(study, n).checkpoint
    assert folder is not None
    assert f"whetstone evaluate {tmp_path}/{folder}" in seen
    assert "No download from here" in seen, "the worker's machine has the files"
    curve = admin.get(f"/studies/{study}/trials/{n}/curve.json").json()
    assert curve["epoch"] == [0, 1]
    assert curve["value"] == [0.3, 0.4]
    assert curve["loss"] == [0.6, 0.5]

    (tmp_path / folder).mkdir(parents=True)
    for name in ("best.safetensors", "best.json"):
        (tmp_path / folder / name).write_bytes(b"{}")
    page = admin.get(f"/studies/{study}/trials/{n}").text
    links = re.findall(r'href="([^"]*/checkpoint\?part=[a-z]+)"', page)
    assert len(links) == 2
    assert [admin.get(link).content for link in links] == [b"{}", b"{}"]


def test_a_failed_trial_shows_its_traceback(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(SIAMESE)
    study, n = trained(hpo, outcome="failed", value=None, reason="KeyError: 'eta'", traceback="Traceback:\n  boom")
    seen = text_of(admin.get(f"/studies/{study}/trials/{n}").text)
    assert "KeyError: 'eta'" in seen
    assert "Traceback: boom" in seen


def test_trials_are_sorted_filtered_and_paged(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    for n in range(120):
        hpo.add_trial(study, {"params": {"x": n / 1000}, "value": float(n % 60) + n / 1000})
    hpo.add_trial(study, {"params": {"x": 0.9}})

    def numbers(page: str) -> list[int]:
        return [int(found) for found in re.findall(r'<tr id="trial-(\d+)">', page)]

    page = admin.get(f"/studies/{study}/trials?order=-value").text
    seen = numbers(page)
    assert seen[:2] == [119, 59]
    for _ in range(5):
        following = re.search(r'href="([^"]+)" rel="next"', page)
        if following is None:
            break
        page = admin.get(unescape(following[1])).text
        seen += numbers(page)
    assert len(seen) == 121
    assert set(seen) == set(range(121)), "each trial stands on one page"
    assert numbers(admin.get(f"/studies/{study}/trials?state=queued").text) == [120]
    assert numbers(admin.get(f"/studies/{study}/trials").text) == list(range(50))


def test_what_people_typed_is_shown_as_text(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study({**SIAMESE, "description": EVIL, "notes": EVIL}).study
    _, n = trained(hpo, outcome="failed", value=None, reason=EVIL, traceback=EVIL)
    hpo.add_trial(study, {"params": {}})
    lease = hpo.claim(ClaimRequest(worker="w2", device=EVIL, version=EVIL), WORKER)
    assert lease is not None
    pages = ["/", f"/?name={EVIL}", "/workers", "/studies/new", f"/studies/{study}"]
    pages += [f"/studies/{study}/{tab}" for tab in ("trials", "queue", "config")]
    pages += [f"/studies/{study}/trials/{trial}" for trial in (n, lease.trial)] + [f"/login?next={EVIL}"]
    answers = [admin.get(page) for page in pages]
    answers.append(admin.post("/studies/new", data=form(document=EVIL, name=EVIL, notes=EVIL, trials=EVIL)))
    answers.append(admin.post(f"/studies/{study}/trials", data={"params": EVIL}))
    answers.append(admin.post(f"/studies/{study}/change", data={"notes": EVIL, "trials": EVIL}))
    answers.append(admin.post("/login", data={"token": EVIL, "next": EVIL}))
    shown = 0
    for answer in answers:
        assert "<script>" not in answer.text, answer.url
        assert "<img src=x" not in answer.text, answer.url
        shown += EVIL in unescape(answer.text)
    assert shown >= 9, "the text itself is there to read"


def test_no_page_needs_an_inline_script_or_style(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(SIAMESE)
    study, n = trained(hpo)
    for page in ("/", "/workers", "/studies/new", f"/studies/{study}", f"/studies/{study}/trials/{n}", "/nowhere"):
        answer = admin.get(page)
        assert not re.search(r"<script(?![^>]*\ssrc=)", answer.text), page
        assert not re.search(r"\s(style|on\w+)=", answer.text), page
        assert "<style" not in answer.text, page
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for source in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
            assert admin.get(source).status_code == 200, source


def test_a_viewer_sees_everything_and_changes_nothing(viewer: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(SIAMESE)
    study, n = trained(hpo)
    for page in ("/", "/workers", f"/studies/{study}", f"/studies/{study}/queue", f"/studies/{study}/config",
                 f"/studies/{study}/trials/{n}"):  # fmt: skip
        answer = viewer.get(page)
        assert answer.status_code == 200
        actions = set(re.findall(r'<form method="post" action="([^"]+)"', answer.text))
        assert actions == {"/logout"}, page
        assert "/studies/new" not in answer.text
    assert viewer.get("/studies/new").status_code == 403
    for action in ("/studies/new", f"/studies/{study}/state", f"/studies/{study}/delete", f"/studies/{study}/change",
                   f"/studies/{study}/trials", f"/studies/{study}/trials/{n}/cancel",
                   f"/studies/{study}/trials/{n}/requeue", "/workers/w1/drain"):  # fmt: skip
        answer = viewer.post(action, data={"state": "stopped", "confirm": "digits"})
        assert answer.status_code == 403, action
        assert "text/html" in answer.headers["content-type"]
        assert "role admin" in text_of(answer.text)
    assert hpo.get_study(study).state == "running"


def test_errors_are_pages_for_people_and_json_for_programs(admin: TestClient, app: FastAPI) -> None:
    for path, status in (("/nowhere", 404), ("/studies/999", 404), ("/studies/x", 422), ("/studies/1%00", 422)):
        page = admin.get(path)
        assert (page.status_code, page.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
        assert 'href="/"' in page.text, "there is a way back"
        document = admin.get(path, headers={"accept": "application/json"})
        assert document.status_code == status
        assert document.json()["error"]["message"]
    assert admin.get("/api/v1/nowhere").json()["error"]["code"] == "not_found"


def test_a_lost_database_is_said_in_words(engine: sa.Engine, tmp_path: Path) -> None:
    app = make_app(engine, tmp_path)
    with browser(app) as client:
        sign_in(client, "admin")
        url = engine.url
        name = url.database
        with sa.create_engine(url.set(database="postgres")).connect() as raw:
            at = raw.execution_options(isolation_level="AUTOCOMMIT")
            at.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'))
            # The second argument waits until they are really gone.
            cut = sa.text("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = :n")
            at.execute(cut, {"n": name})
            away = client.get("/")
            at.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))
        assert away.status_code == 503
        assert "The database is away" in text_of(away.text)
        assert client.get("/").status_code == 200, "and it works again"
