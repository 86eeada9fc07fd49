"""What the REST routes do, against a real database."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from api.routes.files import resolve
from hpo import database
from hpo.errors import NotFound
from hpo.tables import attempts
from tests.integration.api_server import BRANIN, EXTERNAL, PRESETS, bearer, make_app


@pytest.fixture
def client(engine: Engine, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(make_app(engine, tmp_path / "artifacts"), headers=bearer("admin")) as made:
        made.base_url = made.base_url.join("/api/v1/")
        yield made


def launched(client: TestClient, **changes: Any) -> int:
    answer = client.post("studies", json=BRANIN | changes)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["study"])


def claimed(client: TestClient, worker: str = "w1") -> dict[str, Any]:
    answer = client.post("claims", json={"worker": worker})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_a_trial_goes_from_launch_through_claim_report_and_tell_to_best(client: TestClient) -> None:
    answer = client.post("studies", json=BRANIN)
    assert answer.status_code == 201
    study = answer.json()["study"]
    assert answer.headers["location"] == f"/api/v1/studies/{study}"
    place = client.post("workers", json={"worker": "w1", "host": "h", "devices": ["cpu"]})
    assert place.json() == {"worker": "w1", "device": "cpu"}
    lease = claimed(client)
    assert lease["study"] == study
    assert set(lease["params"]) == {"x", "y"}
    report = {"token": lease["token"], "reports": [{"epoch": 0, "value": 3.0, "metrics": {"loss": 1.5}}]}
    assert client.post(f"leases/{lease['lease']}/report", json=report).json()["verdict"] == "go_on"
    tell = {"token": lease["token"], "outcome": "complete", "value": 2.5}
    first = client.post(f"leases/{lease['lease']}/tell", json=tell)
    assert first.status_code == 200
    assert first.json() == {"study": study, "trial": 0, "state": "complete", "value": 2.5}
    assert client.post(f"leases/{lease['lease']}/tell", json=tell).json() == first.json()
    other = client.post(f"leases/{lease['lease']}/tell", json=tell | {"value": 1.0})
    assert other.status_code == 409
    [best] = client.get(f"studies/{study}/best").json()
    assert (best["trial"], best["value"]) == (0, 2.5)
    detail = client.get(f"studies/{study}/trials/0").json()
    assert detail["curve"][0]["metrics"] == {"loss": 1.5}
    assert client.get(f"studies/{study}/progress").json()[0]["best"] == 2.5
    assert [each["worker"] for each in client.get("workers").json()] == ["w1"]
    assert client.post("workers/w1/drain").json()["state"] == "draining"
    assert client.post("workers/nobody/drain").status_code == 404


def test_every_answer_of_the_api_is_kept_by_no_cache(client: TestClient) -> None:
    study = launched(client)
    for path in (
        "studies",
        f"studies/{study}",
        f"studies/{study}/trials",
        "presets",
        "workers",
        "studies/999",
        "nothing",
    ):
        assert client.get(path).headers["cache-control"] == "no-store"


def test_an_ask_leases_a_trial_of_that_study(client: TestClient) -> None:
    first, second = launched(client), launched(client, name="second", workload="external")
    asked = client.post(f"studies/{second}/ask", json={"worker": "laptop"})
    assert asked.status_code == 201
    assert asked.json()["study"] == second != first
    released = client.post(
        f"leases/{asked.json()['lease']}/release", json={"token": asked.json()["token"], "reason": "shutdown"}
    )
    assert released.json()["state"] == "queued"
    assert client.post("studies/999/ask", json={"worker": "laptop"}).status_code == 404


def test_a_claim_is_answered_with_204_when_there_is_nothing_to_do(client: TestClient) -> None:
    answer = client.post("claims", json={"worker": "w1"})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("path", ["studies", "studies/1/trials", "studies/2/ask", "claims"])
def test_the_same_key_and_body_get_the_same_answer_and_another_body_is_refused(client: TestClient, path: str) -> None:
    launched(client)
    assert launched(client, **EXTERNAL) == 2
    bodies: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "studies": (BRANIN | {"name": "once"}, BRANIN | {"name": "twice"}),
        "studies/1/trials": ({"params": {"x": 1.0, "y": 1.0}}, {"params": {"x": 2.0, "y": 1.0}}),
        "studies/2/ask": ({"worker": "w1"}, {"worker": "w2"}),
        "claims": ({"worker": "w1"}, {"worker": "w2"}),
    }
    body, other = bodies[path]
    key = {"Idempotency-Key": "launch-1"}
    first = client.post(path, json=body, headers=key)
    assert first.status_code < 300
    again = client.post(path, content=json.dumps(body, indent=4), headers=key | {"Content-Type": "application/json"})
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    refused = client.post(path, json=other, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    fresh = client.post(path, json=other, headers={"Idempotency-Key": "launch-2"})
    assert fresh.status_code < 300
    assert fresh.json() != first.json()


def test_a_requeue_sent_twice_queues_one_trial(client: TestClient) -> None:
    study = launched(client)
    for number in (0, 1):
        client.post(f"studies/{study}/trials", json={"params": {"x": 1.0 + number, "y": 1.0}})
        client.post(f"studies/{study}/trials/{number}/cancel")
    key = {"Idempotency-Key": "again"}
    first = client.post(f"studies/{study}/trials/0/requeue", headers=key)
    assert (first.status_code, first.json()["trial"]) == (200, 2)
    client.post(f"studies/{study}/trials/2/cancel")
    again = client.post(f"studies/{study}/trials/0/requeue", headers=key)
    assert (again.status_code, again.json()) == (200, first.json()), "not a fourth trial, although trial 2 has ended"
    assert client.post(f"studies/{study}/trials/1/requeue", headers=key).json()["trial"] == 3, "another address"
    assert client.post(f"studies/{study}/trials/0/requeue").json()["trial"] == 4


def test_a_key_belongs_to_its_token_and_its_address(client: TestClient) -> None:
    one, two = launched(client, **EXTERNAL), launched(client, **EXTERNAL | {"name": "two"})
    key = {"Idempotency-Key": "k"}
    first = client.post(f"studies/{one}/ask", json={"worker": "w"}, headers=key).json()
    other_study = client.post(f"studies/{two}/ask", json={"worker": "w"}, headers=key).json()
    other_token = client.post(f"studies/{one}/ask", json={"worker": "w"}, headers=key | bearer("worker")).json()
    assert len({first["lease"], other_study["lease"], other_token["lease"]}) == 3


def test_an_empty_claim_leaves_its_key_free(client: TestClient) -> None:
    key = {"Idempotency-Key": "k"}
    assert client.post("claims", json={"worker": "w"}, headers=key).status_code == 204
    launched(client)
    assert client.post("claims", json={"worker": "w"}, headers=key).status_code == 200


def test_a_preset_is_launched_with_overrides_merged_deep(client: TestClient) -> None:
    answer = client.post(
        "studies", json={"preset": "wide", "name": "mine", "budget": {"trials": 9}, "points": [{"x": 1.0}]}
    )
    assert answer.status_code == 201, answer.text
    spec = answer.json()["spec"]
    assert (spec["name"], spec["budget"]["trials"], spec["budget"]["hours"]) == ("mine", 9, 2.0)
    assert spec["points"] == [{"x": 1.0}]
    assert PRESETS["wide"]["budget"] == {"trials": 5, "hours": 2.0}, "the shipped preset was changed"
    listed = {each["name"]: each["document"] for each in client.get("presets").json()}
    assert listed == PRESETS


@pytest.mark.parametrize("preset", ["mini", 5, None, [], "x" * 10_000])
def test_an_unknown_preset_is_answered_with_the_known_ones(client: TestClient, preset: object) -> None:
    answer = client.post("studies", json={"preset": preset})
    assert answer.status_code == 422
    [detail] = answer.json()["error"]["details"]
    assert detail["at"] == "preset"
    assert "branin, wide" in detail["fault"]


def test_a_bad_spec_is_refused_whole_with_every_fault_named(client: TestClient) -> None:
    bad = BRANIN | {
        "sampler": "anneal",
        "colour": "red",
        "space": [{"name": "x", "type": "float", "low": 3.0, "high": 1.0}, {"name": "y", "type": "floot"}],
        "budget": {"trials": 0},
    }
    answer = client.post("studies", json=bad)
    assert answer.status_code == 422
    places = " ".join(each["at"] for each in answer.json()["error"]["details"])
    for part in ("sampler", "colour", "space[0]", "space[1]", "budget.trials"):
        assert part in places
    assert client.get("studies").json()["items"] == []


def test_a_name_that_is_taken_is_a_conflict(client: TestClient) -> None:
    launched(client)
    answer = client.post("studies", json=BRANIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


def test_a_study_is_paused_resumed_and_deleted(client: TestClient) -> None:
    study = launched(client)
    assert client.patch(f"studies/{study}", json={"state": "paused"}).json()["state"] == "paused"
    assert client.post("claims", json={"worker": "w"}).status_code == 204
    changed = client.patch(f"studies/{study}", json={"state": "running", "notes": "on", "budget": {"trials": 3}}).json()
    assert (changed["state"], changed["notes"], changed["budget"]["trials"]) == ("running", "on", 3)
    claimed(client)
    assert client.patch(f"studies/{study}", json={"state": "flying"}).status_code == 422
    gone = client.delete(f"studies/{study}")
    assert gone.status_code in (204, 409)  # while a worker holds a trial, the coordinator may refuse
    assert client.get(f"studies/{study}").status_code == (404 if gone.status_code == 204 else 200)
    assert client.delete("studies/999").status_code == 404


def test_lists_are_paged_and_filtered(client: TestClient) -> None:
    for n in range(5):
        launched(client, name=f"study {n}")
    names, cursor = [], None
    for _ in range(5):
        page = client.get("studies", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        names += [each["name"] for each in page["items"]]
        if (cursor := page["next"]) is None:
            break
    assert sorted(names) == [f"study {n}" for n in range(5)]
    assert [each["name"] for each in client.get("studies", params={"name": "study 3"}).json()["items"]] == ["study 3"]
    assert client.get("studies", params={"state": "paused"}).json()["items"] == []
    for x in (1.0, 2.0, 3.0):
        recorded = client.post("studies/1/trials", json={"params": {"x": x, "y": 0.0}, "value": x})
        assert recorded.status_code == 201
    ordered = client.get("studies/1/trials", params={"order": "-value", "state": "complete", "limit": 2}).json()
    assert [each["value"] for each in ordered["items"]] == [3.0, 2.0]
    rest = client.get("studies/1/trials", params={"order": "-value", "state": "complete", "cursor": ordered["next"]})
    assert [each["value"] for each in rest.json()["items"]] == [1.0]


def test_a_queued_point_is_cancelled_and_requeued(client: TestClient) -> None:
    study = launched(client)
    trial = client.post(f"studies/{study}/trials", json={"params": {"x": 1.0, "y": 2.0}}).json()["trial"]
    assert client.post(f"studies/{study}/trials/{trial}/cancel").json()["state"] == "cancelled"
    assert client.post(f"studies/{study}/trials/{trial}/requeue", json={}).json()["state"] == "queued"
    assert client.post(f"studies/{study}/trials/99/cancel").status_code == 404


def test_a_lease_speaks_only_to_the_token_that_claimed_it(client: TestClient) -> None:
    launched(client)
    lease = claimed(client)
    tell = {"token": lease["token"], "outcome": "complete", "value": 1.0}
    foreign = client.post(f"leases/{lease['lease']}/tell", json=tell, headers=bearer("worker"))
    assert foreign.status_code in (403, 409)
    assert client.get(f"studies/{lease['study']}/trials/0").json()["state"] == "leased"


def test_a_tell_that_cannot_be_heard_says_why(client: TestClient) -> None:
    launched(client)
    lease = claimed(client)
    tell = {"token": lease["token"], "outcome": "complete", "value": 1.0}

    def refused(number: int, **changes: Any) -> tuple[int, str]:
        answer = client.post(f"leases/{number}/tell", json=tell | changes)
        return answer.status_code, answer.json()["error"]["code"]

    assert refused(lease["lease"] + 1) == (404, "not_found")
    assert refused(lease["lease"], token=lease["token"] + 1) == (409, "lost")
    assert client.post(f"leases/{lease['lease']}/tell", json=tell).status_code == 200
    assert refused(lease["lease"], value=2.0) == (409, "told")
    released = claimed(client)
    client.post(f"leases/{released['lease']}/release", json={"token": released["token"], "reason": "shutdown"})
    assert refused(released["lease"], token=released["token"]) == (409, "lost")


def test_a_study_is_exported_in_three_formats(client: TestClient) -> None:
    study = launched(client, name="=cmd()".replace("=", "-").replace("()", ""))
    client.post(f"studies/{study}/trials", json={"params": {"x": 1.0, "y": 2.0}, "value": 4.5})
    as_json = client.get(f"studies/{study}/export")
    assert as_json.headers["content-type"].startswith("application/json")
    assert f"study-{study}.json" in as_json.headers["content-disposition"]
    as_yaml = client.get(f"studies/{study}/export?format=yaml")
    assert yaml.safe_load(as_yaml.text) == as_json.json()
    as_csv = client.get(f"studies/{study}/export?format=csv")
    assert as_csv.headers["content-type"].startswith("text/csv")
    [row] = csv.DictReader(io.StringIO(as_csv.text))
    assert float(row["value"]) == 4.5


def test_the_best_checkpoint_is_downloaded(client: TestClient, engine: Engine, tmp_path: Path) -> None:
    launched(client)
    lease = claimed(client)
    path = f"studies/{lease['study']}/trials/{lease['trial']}/checkpoint"
    assert "no checkpoint" in client.get(path).json()["error"]["message"]
    report = {"token": lease["token"], "reports": [{"epoch": 0, "value": 1.0}], "checkpoint_epoch": 0}
    client.post(f"leases/{lease['lease']}/report", json=report)
    client.post(f"leases/{lease['lease']}/tell", json={"token": lease["token"], "outcome": "complete", "value": 1.0})
    away = client.get(path)
    assert away.status_code == 404
    assert "WHETSTONE_ARTIFACTS" in away.json()["error"]["message"]
    folder = tmp_path / "artifacts" / lease["artifacts"]
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(b"weights")
    (folder / "best.json").write_text('{"epoch": 0}')
    weights = client.get(path)
    assert weights.content == b"weights"
    assert weights.headers["content-type"] == "application/octet-stream"
    assert "attachment" in weights.headers["content-disposition"]
    assert client.get(path, params={"part": "config"}).json() == {"epoch": 0}


def test_no_link_leads_a_download_out_of_the_artifacts(tmp_path: Path) -> None:
    root, outside = tmp_path / "artifacts", tmp_path / "outside"
    outside.mkdir()
    (outside / "best.json").write_text("secret")
    (root / "a").mkdir(parents=True)
    (root / "a" / "best.json").write_text("ours")
    (root / "b").symlink_to(outside)
    assert resolve(root, "a", "best.json").read_text() == "ours"
    assert resolve(f"file://{root}", "a", "best.json").read_text() == "ours"
    for folder in ("b", "../outside", str(outside), "missing"):
        with pytest.raises(NotFound):
            resolve(root, folder, "best.json")
    with pytest.raises(NotFound, match="s3 store"):
        resolve("s3://bucket/artifacts", "a", "best.json")


def test_a_database_that_goes_away_is_a_503_with_a_time_to_come_back(client: TestClient, engine: Engine) -> None:
    name = engine.url.database
    server = database.connect(engine.url.set(database="postgres").render_as_string(hide_password=False))

    def allow(connections: bool) -> None:
        with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {connections}'))
            # The second argument waits until they are really gone.
            cut = sa.text("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = :name")
            connection.execute(cut, {"name": name})

    allow(False)
    try:
        for path in ("studies", "studies/1", "workers", "studies/1/export"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert client.post("claims", json={"worker": "w"}).status_code == 503
        ready = client.get("http://testserver/readyz")
        assert ready.status_code == 503
        assert ready.json()["error"]["message"]
        assert client.get("http://testserver/healthz").status_code == 200
    finally:
        allow(True)
        server.dispose()
    assert client.get("studies").status_code == 200
    assert client.get("http://testserver/readyz").status_code == 200


def test_an_unmigrated_database_is_not_ready(empty_url: str) -> None:
    engine = database.connect(empty_url)
    try:
        with TestClient(make_app(engine)) as client:
            answer = client.get("/readyz")
            assert answer.status_code == 503
            assert "whetstone db upgrade" in answer.json()["error"]["message"]
            missing = client.get("/api/v1/studies", headers=bearer("admin"))
            assert missing.status_code == 503
            assert "whetstone db upgrade" in missing.json()["error"]["message"]
            assert client.get("/healthz").json() == {"status": "alive"}
    finally:
        engine.dispose()


def test_metrics_count_and_name_nothing(client: TestClient, engine: Engine) -> None:
    launched(client, name="a very private name")
    claimed(client, "private-worker")
    text = client.get("http://testserver/metrics", headers={"Authorization": ""}).text
    assert 'whetstone_trials{state="leased"} 1.0' in text
    assert "whetstone_leases 1.0" in text
    assert 'whetstone_workers{state="busy"} 1.0' in text
    assert 'whetstone_coordinator_seconds_total{call="claim"}' in text
    assert "private" not in text
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(attempts)).scalar_one() == 1
