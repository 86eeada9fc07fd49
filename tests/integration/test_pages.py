"""The pages over a real database: what they say, what they refuse, and that they never run what people typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.auth import COOKIE
from hpo import tokens, yaml_document
from hpo.coordinator import Coordinator
from hpo.protocol import ClaimRequest, EpochReport, ReportRequest, TellRequest
from hpo.tokens import Principal
from tests.integration.pages_app import EXTERNAL, SIAMESE, browser, make_app, sign_in

EVIL = "<script>alert(1)</script> \"><img src=x onerror='alert(2)'>"
WORKER = Principal(id="test:worker", role="worker", name="worker")


@pytest.fixture
def app(engine: sa.Engine, tmp_path: Path) -> FastAPI:
    return make_app(engine, tmp_path)


@pytest.fixture
def hpo(app: FastAPI) -> Coordinator:
    made = app.state.coordinator
    assert isinstance(made, Coordinator)
    return made


@pytest.fixture
def admin(app: FastAPI) -> Iterator[TestClient]:
    with browser(app) as client:
        sign_in(client, "admin")
        yield client


@pytest.fixture
def viewer(app: FastAPI) -> Iterator[TestClient]:
    with browser(app) as client:
        sign_in(client, "viewer")
        yield client


def text_of(page: str) -> str:
    """What a reader sees: markup gone, entities read, white space folded."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def trained(hpo: Coordinator, worker: str = "w1", **told: Any) -> tuple[int, int]:
    """Claim a trial, report two epochs and tell its outcome. Returns (study, trial)."""
    lease = hpo.claim(ClaimRequest(worker=worker, device="cpu"), WORKER)
    assert lease is not None
    epochs = [
        EpochReport(epoch=n, value=0.3 + 0.1 * n, metrics={"accuracy": 0.3 + 0.1 * n, "loss": 0.6 - 0.1 * n})
        for n in (0, 1)
    ]
    hpo.report(lease.lease, ReportRequest(token=lease.token, reports=epochs, checkpoint_epoch=1), WORKER)
    outcome = {"outcome": "complete", "value": 0.713, **told}
    hpo.tell(lease.lease, TellRequest(token=lease.token, **outcome), WORKER)
    return lease.study, lease.trial


def form(**over: str) -> dict[str, str]:
    return {"preset": "mini", "document": "", "name": "", **over}


# What people see


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


# What they change


def test_the_form_launches_a_study(admin: TestClient, hpo: Coordinator) -> None:
    start = admin.get("/studies/new?preset=mini")
    document = unescape(re.search(r'<textarea id="document"[^>]*>(.*?)</textarea>', start.text, re.S)[1])  # type: ignore[index]
    sent = form(document=document, name="my sweep", trials="7", hours="0,5", sampler="random", notes="a\r\nb")
    answer = admin.post("/studies/new", data=sent)
    assert answer.status_code == 303, text_of(answer.text)
    study = hpo.get_study(int(answer.headers["location"].rsplit("/", 1)[1]))
    assert study.name == "my sweep"
    assert (study.budget.trials, study.budget.hours, study.sampler, study.notes) == (7, 0.5, "random", "a\nb")
    assert study.spec["settings"]["net"] == "mini", "what the form does not name stays as the document has it"


def test_a_name_that_is_taken_is_not_offered_again(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study({**SIAMESE, "name": "mini"})
    assert 'value="mini-2"' in admin.get("/studies/new?preset=mini").text


def test_a_refused_study_names_every_fault_and_keeps_what_was_typed(admin: TestClient, hpo: Coordinator) -> None:
    document = "name: x\nworkload: external\nspace: [{name: x, type: float, low: 3, high: 1e-1}]\ncolour: red"
    answer = admin.post("/studies/new", data=form(document=document, trials="-3", sampler="tpe", notes="keep <me>"))
    assert answer.status_code == 422
    seen = text_of(answer.text)
    assert "colour is not known here" in seen
    assert "space[0]" in seen
    assert "budget.trials" in seen
    assert document in unescape(answer.text)
    assert 'value="-3"' in answer.text
    assert "keep &lt;me&gt;" in answer.text
    assert re.search(r'id="trials"[^>]*aria-invalid="true"', answer.text)
    assert hpo.list_studies().items == []


@pytest.mark.parametrize(
    "document",
    [
        "",
        "- a\n- b",
        "a: &x [1]\nb: *x",
        "name: a\nname: b",
        "[" * 100_000,
        "a: !!python/object/apply:os.system ['true']",
        "{" + '"a":' * 40 + "1" + "}" * 40,
        "name: \0",
        "a: " + "9" * 10_000,
        "x" * 300_000,
    ],
)
def test_a_document_that_cannot_be_read_is_refused_with_a_reason(admin: TestClient, document: str) -> None:
    answer = admin.post("/studies/new", data=form(document=document))
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text


def test_a_taken_name_is_a_fault_of_the_form(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(EXTERNAL)
    document = "name: mine\nworkload: external\nspace: [{name: x, type: float, low: 0, high: 1}]"
    answer = admin.post("/studies/new", data=form(document=document))
    assert answer.status_code == 409
    assert document in unescape(answer.text)
    assert re.search(r'id="name"[^>]*aria-invalid="true"', answer.text)


def test_pause_resume_and_stop(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    for state in ("paused", "running", "stopped"):
        answer = admin.post(f"/studies/{study}/state", data={"state": state})
        assert answer.headers["location"] == f"/studies/{study}"
        assert hpo.get_study(study).state == state
    answer = admin.post(f"/studies/{study}/state", data={"state": "paused"})
    assert answer.status_code == 409
    assert "text/html" in answer.headers["content-type"]


def test_a_study_is_deleted_only_under_its_name(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    assert admin.post(f"/studies/{study}/delete", data={"confirm": "Mine"}).status_code == 422
    assert hpo.get_study(study).name == "mine"
    assert admin.post(f"/studies/{study}/delete", data={"confirm": "mine"}).status_code == 303
    assert admin.get(f"/studies/{study}").status_code == 404


def test_budget_concurrency_and_notes_change_while_it_runs(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study({**EXTERNAL, "budget": {"trials": 9, "target": 0.5}}).study
    sent = {"trials": "20", "hours": "", "target": "", "concurrency": "2", "notes": "longer"}
    assert admin.post(f"/studies/{study}/change", data=sent).status_code == 303
    view = hpo.get_study(study)
    assert (view.budget.trials, view.budget.target, view.concurrency, view.notes) == (20, None, 2, "longer")
    refused = admin.post(f"/studies/{study}/change", data={**sent, "trials": "many", "concurrency": "0"})
    assert refused.status_code == 422
    assert 'value="many"' in refused.text
    assert hpo.get_study(study).budget.trials == 20


def test_a_study_is_seeded_in_the_form_and_says_from_where(admin: TestClient, hpo: Coordinator) -> None:
    first, number = hpo.create_study(SIAMESE).study, trained(hpo)[1]
    text = yaml_document.write(SIAMESE | {"name": "heir"})
    admin.post("/studies/new", data=form(document=text, seed_from=str(first)))
    made = hpo.list_studies(name="heir").items[0].study
    seen = text_of(admin.get(f"/studies/{made}").text)
    assert "Seeded digits : 1 finished trial, recorded with their values" in seen
    assert f"It comes from study {first}" in seen
    assert f"trial {number} of study {first}" in text_of(admin.get(f"/studies/{made}/trials/0").text)
    assert f"of study {first}" in text_of(admin.get(f"/studies/{made}/trials").text)
    other = {**SIAMESE, "name": "pupil", "settings": SIAMESE["settings"] | {"epochs": 7}, "seed_from": "digits"}
    admin.post("/studies/new", data=form(document=yaml_document.write(other)))
    made = hpo.list_studies(name="pupil").items[0].study
    assert "because its settings differ in epochs" in text_of(admin.get(f"/studies/{made}").text)
    refused = admin.post("/studies/new", data=form(document=text, name="orphan", seed_from="nobody"))
    assert refused.status_code == 422
    assert "there is no study of this name" in refused.text
    assert 'value="nobody"' in refused.text, "what was typed is kept"


def test_parameters_are_fixed_and_released_in_a_form(admin: TestClient, hpo: Coordinator) -> None:
    made = hpo.create_study(SIAMESE)
    at = f"/studies/{made.study}"
    name = made.spec["space"][0]["name"]
    labels = made.spec["space"][0]["labels"]
    admin.post(f"{at}/fixed", data={"fixed": f"{name}: 0.01"})
    assert hpo.get_study(made.study).fixed == {name: dict.fromkeys(labels, 0.01)}
    assert "Fixed hyperparameters" in admin.get(at).text
    assert f"{labels[0]}: 0.01" in admin.get(f"{at}/config").text
    admin.post(f"{at}/fixed", data={"fixed": f"{name}: {{{labels[0]}: 0.02}}"})
    assert hpo.get_study(made.study).fixed == {name: {labels[0]: 0.02}}, "what is taken out of the form is released"
    refused = admin.post(f"{at}/fixed", data={"fixed": f"{name}: often"})
    assert refused.status_code == 422
    assert "must be a number" in refused.text
    assert f"{name}: often" in refused.text, "what was typed is kept"
    admin.post(f"{at}/fixed", data={"fixed": " "})
    assert hpo.get_study(made.study).fixed == {}


def test_a_name_or_a_source_that_only_the_database_knows_is_named_with_the_other_faults(
    admin: TestClient, hpo: Coordinator
) -> None:
    hpo.create_study(EXTERNAL)
    document = yaml_document.write(EXTERNAL)
    for more, fields in (
        ({"trials": "-3", "hours": "x"}, ["name", "trials", "hours"]),
        ({"trials": "-3", "seed_from": "nobody"}, ["name", "trials", "seed_from"]),
        ({"seed_from": "nobody"}, ["name", "seed_from"]),
        ({"name": "free", "target": "x", "seed_from": "7"}, ["target", "seed_from"]),
        ({"name": "a/b", "seed_from": "mine"}, ["name", "seed_from"]),
    ):
        answer = admin.post("/studies/new", data=form(document=document, **more))
        assert answer.status_code == 422
        assert re.findall(r'id="(\w+)"[^>]*aria-invalid="true"', answer.text) == fields
        assert len(re.findall(r"<li><code>", answer.text)) == len(fields)
    assert [study.name for study in hpo.list_studies().items] == ["mine"]


def test_a_studys_document_is_shown_as_it_stands_and_can_be_launched_again(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(SIAMESE).study
    now = hpo.patch_study(study, {"fixed": {"mu": 0.5}, "budget": {"trials": 9}, "notes": "wider"})
    page = admin.get(f"/studies/{study}/config").text
    assert "As launched" not in text_of(page)
    assert "budget, concurrency, notes and fixed hyperparameters: those are as they are now" in text_of(page)
    shown = unescape(page.rpartition("<pre")[2].partition("<code>")[2].partition("</code>")[0])
    assert yaml_document.read(shown) == now.spec
    assert re.findall(r"^(\w+):", shown, re.MULTILINE)[:4] == ["name", "description", "notes", "workload"]
    assert admin.post("/studies/new", data=form(document=shown, name="again")).status_code == 303
    again = hpo.list_studies(name="again").items[0]
    assert (again.fixed, again.budget.trials, again.notes) == (now.fixed, 9, "wider")


def test_a_point_of_ones_own_is_queued_and_a_wrong_one_kept_for_correction(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(SIAMESE).study
    page = admin.get(f"/studies/{study}/queue").text
    example = unescape(re.search(r'<textarea id="params"[^>]*>(.*?)</textarea>', page, re.S)[1])  # type: ignore[index]
    assert admin.post(f"/studies/{study}/trials", data={"params": example}).status_code == 303
    assert [trial.state for trial in hpo.list_trials(study).items] == ["queued"]
    assert "a point of one's own" in text_of(admin.get(f"/studies/{study}/queue").text)
    wrong = "eta: {conv1: 7, conv2: 0.1}\nnu: 3"
    refused = admin.post(f"/studies/{study}/trials", data={"params": wrong})
    assert refused.status_code == 422
    assert wrong in unescape(refused.text)
    assert "nu" in text_of(refused.text)
    assert len(hpo.list_trials(study).items) == 1


def test_a_trial_is_cancelled_and_its_point_queued_again(admin: TestClient, hpo: Coordinator) -> None:
    study = hpo.create_study(EXTERNAL).study
    n = hpo.add_trial(study, {"params": {"x": 0.5}}).trial
    answer = admin.post(f"/studies/{study}/trials/{n}/cancel")
    assert answer.headers["location"] == f"/studies/{study}/trials/{n}"
    assert hpo.get_trial(study, n).state == "cancelled"
    answer = admin.post(f"/studies/{study}/trials/{n}/requeue")
    again = int(answer.headers["location"].rsplit("/", 1)[1])
    assert again != n
    assert (hpo.get_trial(study, again).state, hpo.get_trial(study, again).params) == ("queued", {"x": 0.5})


def test_a_worker_is_drained(admin: TestClient, hpo: Coordinator) -> None:
    hpo.create_study(SIAMESE)
    assert hpo.claim(ClaimRequest(worker="gpu-0@lab", device="cuda:0"), WORKER) is not None
    page = admin.get("/workers").text
    assert "busy" in text_of(page)
    action = re.search(r'action="(/workers/[^"]+/drain)"', page)
    assert action is not None
    assert admin.post(action[1]).status_code == 303
    page = admin.get("/workers").text
    assert "draining" in text_of(page)
    assert "gets no other" in page
    assert "exits" not in page, "it stays, idle"


# What they refuse


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
            at.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"), {"n": name}
            )
            away = client.get("/")
            at.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))
        assert away.status_code == 503
        assert "The database is away" in text_of(away.text)
        assert client.get("/").status_code == 200, "and it works again"


def test_a_session_that_is_over_leads_to_the_sign_in_page_and_back(engine: sa.Engine, app: FastAPI) -> None:
    with browser(app) as client:
        sign_in(client, "admin")
        assert client.get("/studies/new").status_code == 200
        with engine.begin() as conn:
            conn.execute(sa.text("UPDATE whetstone.sessions SET expires_at = clock_timestamp() - interval '1 s'"))
        answer = client.get("/workers?x=1")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/login?next=/workers%3Fx%3D1"
        polled = client.get("/workers", headers={"HX-Request": "true", "HX-Current-URL": "http://testserver/workers"})
        assert polled.status_code == 401
        assert polled.headers["hx-redirect"] == "/login?next=/workers"
        assert client.post("/studies/new", data={}).headers["location"] == "/login"


def test_a_revoked_token_ends_the_sessions_it_opened(engine: sa.Engine, app: FastAPI) -> None:
    token_id, secret = tokens.create(engine, "somebody", "viewer")
    with browser(app) as client:
        answer = client.post("/login", data={"token": f" {secret}\n", "next": "/workers"})
        assert answer.headers["location"] == "/workers"
        assert client.get("/").status_code == 200
        assert secret not in str(client.cookies.get(COOKIE))
        tokens.revoke(engine, token_id)
        assert client.get("/").status_code == 303


def test_signing_out_ends_the_session_everywhere(app: FastAPI) -> None:
    with browser(app) as client:
        sign_in(client, "admin")
        cookie = client.cookies[COOKIE]
        answer = client.post("/logout")
        assert answer.headers["location"] == "/login"
        client.cookies.set(COOKIE, cookie)
        assert client.get("/").status_code == 303, "the secret is dead, not only the cookie gone"
