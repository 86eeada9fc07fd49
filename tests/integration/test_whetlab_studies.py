"""Studies and experiments are one thing: Whetlab's clients see what a study holds, and it takes what they write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from hpo import database
from hpo.document import MAX_NAME
from hpo.history import CANCELLED, History
from hpo.storage import PostgresStorage
from tests.integration.api_server import bearer, make_app
from tests.integration.whetlab_script import FLOAT, OUTCOME, Script

V1 = "/api/v1"
SPACE: list[dict[str, Any]] = [
    {"name": "eta", "type": "float", "low": 1e-4, "high": 1e-1, "log": True, "labels": ["conv", "fc", "out"]},
    {"name": "width", "type": "integer", "low": 8, "high": 64, "step": 8},
    {"name": "kind", "type": "categorical", "choices": [True, "true", 1.5, "sgd"]},
    {"name": "long", "type": "float", "low": 0.0, "high": 1.0, "labels": [f"l{n}" for n in range(25)]},
]
SHOWN: dict[str, Any] = {
    "name": "swept",
    "workload": "external",
    "direction": "minimize",
    "sampler": "random",
    "space": SPACE[:3],
    "settings": {"data": "mine"},
}
POINT: dict[str, Any] = {"eta": {"conv": 0.01, "fc": 0.02, "out": 0.03}, "width": 16, "kind": "sgd"}


@pytest.fixture
def client(engine: sa.Engine) -> Iterator[TestClient]:
    with TestClient(make_app(engine), headers=bearer("admin")) as made:
        yield made


def launched(client: TestClient, **changes: Any) -> Script:
    """A study launched over REST, as the script that resumes it by its name sees it."""
    answer = client.post(f"{V1}/studies", json=SHOWN | changes)
    assert answer.status_code == 201, answer.text
    return Script(client, (SHOWN | changes)["name"])


def recorded(client: TestClient, script: Script, **more: Any) -> dict[str, Any]:
    answer = client.post(f"{V1}/studies/{script.id}/trials", json={"params": POINT, **more})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def asked(client: TestClient, script: Script) -> dict[str, Any]:
    answer = client.post(f"{V1}/studies/{script.id}/ask", json={"worker": "w"})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def told(client: TestClient, lease: dict[str, Any], **tell: Any) -> None:
    answer = client.post(f"{V1}/leases/{lease['lease']}/tell", json={"token": lease["token"], **tell})
    assert answer.status_code == 200, answer.text


def test_a_study_shows_as_an_experiment_with_its_vectors_and_choices(client: TestClient) -> None:
    settings = launched(client, space=SPACE).settings
    assert list(settings) == ["eta", "width", "kind", "value"], "a vector of 25 is not shown"
    assert (settings["eta"]["size"], settings["eta"]["scale"], settings["eta"]["min"]) == (3, "log", 1e-4)
    assert (settings["width"]["type"], settings["width"]["min"], settings["width"]["max"]) == ("integer", 8, 64)
    assert settings["kind"]["options"] == ["true", "true (1)", "1.5", "sgd"]


def test_the_outcome_of_a_study_has_a_name_that_no_parameter_has(client: TestClient) -> None:
    space = [SPACE[1] | {"name": name} for name in ("value", "outcome")]
    assert launched(client, space=space).outcome == "outcome 2"


@pytest.mark.parametrize(
    "ours", [5, [], {"outcome": 5, "units": 5}, {"outcome": {"name": "", "min": "low", "units": {}}}]
)
def test_settings_that_only_look_like_an_experiments_do_no_harm(client: TestClient, ours: Any) -> None:
    script = launched(client, settings={"whetlab": ours})
    assert (script.outcome, script.settings["value"]["min"]) == ("value", -100.0)


def test_every_state_shows_as_the_protocol_has_it(client: TestClient) -> None:
    script = launched(client, pruner="none")
    complete, infeasible, failed = (
        recorded(client, script, **more)["trial"]
        for more in ({"value": 2.5}, {"outcome": "infeasible", "value": 9.0}, {"outcome": "failed"})
    )
    assert (complete, infeasible, failed) == (0, 1, 2)
    pruned, cancelled, leased = (asked(client, script) for _ in range(3))
    report = {"token": pruned["token"], "reports": [{"epoch": n, "value": float(n)} for n in (1, 2)]}
    assert client.post(f"{V1}/leases/{pruned['lease']}/report", json=report).status_code == 200
    told(client, pruned, outcome="pruned")
    recorded(client, script)  # queued
    assert client.post(f"{V1}/studies/{script.id}/trials/{cancelled['trial']}/cancel").status_code == 200
    assert list(script.results().values()) == [-2.5, "NaN", "NaN", -2.0, None, None]
    release = {"token": cancelled["token"], "reason": "stopped"}
    assert client.post(f"{V1}/leases/{cancelled['lease']}/release", json=release).status_code == 200
    assert list(script.results().values()) == [-2.5, "NaN", "NaN", -2.0, None, None]
    points = [script.point(each) for each in script.list(f"results?experiment={script.id}")]
    assert points[0] == {"eta": [0.01, 0.02, 0.03], "width": 16, "kind": "sgd"}
    assert points[0] == points[-1], "a queued point is known as well"
    assert [each["userProposed"] for each in script.list(f"results?experiment={script.id}")][2:] == [
        True, False, False, True,
    ]  # fmt: skip
    assert leased["trial"] == 5


def test_a_minimised_study_takes_outcomes_negated(client: TestClient) -> None:
    script = launched(client)
    good = script.add({"eta": [0.01, 0.01, 0.01], "width": 8, "kind": "true"}, -1.0)
    poor = script.suggest()[0]
    script.update(poor, -3.0)
    zero = script.add({"eta": [0.01, 0.01, 0.02], "width": 8, "kind": "true (1)"}, -100)
    script.update(zero, 0)
    assert script.best() == zero
    assert '"value":0.0' in client.get(f"/api/alpha/results/{zero}").text
    best = client.get(f"{V1}/studies/{script.id}/best").json()
    assert [each["value"] for each in best] == [0.0, 1.0, 3.0]
    assert [each["params"]["kind"] for each in best[:2]] == ["true", True]
    assert script.results()[good] == -1.0


def test_an_experiment_is_an_external_study_without_budget_or_lease(client: TestClient) -> None:
    script = Script(client, "from 2014", [FLOAT])
    script.suggest()
    study = client.get(f"{V1}/studies/{script.id}").json()
    assert (study["name"], study["workload"], study["direction"]) == ("from 2014", "external", "maximize")
    assert study["sampler"] == "auto"
    assert {study["budget"][name] for name in ("trials", "hours", "target")} == {None}
    assert client.post(f"{V1}/claims", json={"worker": "w"}).status_code == 204
    detail = client.get(f"{V1}/studies/{script.id}/trials/0").json()
    assert (detail["state"], detail["history"], detail["origin"]) == ("leased", [], "suggested")


def test_queued_points_are_suggested_first_and_completed(client: TestClient) -> None:
    script = launched(client)
    whole = recorded(client, script)["trial"]
    answer = client.post(f"{V1}/studies/{script.id}/trials", json={"params": {"width": 64}})
    half = answer.json()["trial"]
    listed = script.list(f"results?experiment={script.id}")
    assert [len(each["variables"]) for each in listed] == [4, 0], "a point that is half-made has no variables yet"
    refused = client.patch(f"/api/alpha/results/{listed[1]['id']}", json={"variables": [{"name": "value", "value": 1}]})
    assert refused.status_code == 409
    first, second, third = (script.suggest() for _ in range(3))
    assert [first[0], second[0]] == [each["id"] for each in listed]
    assert first[1] == {"eta": [0.01, 0.02, 0.03], "width": 16, "kind": "sgd"}
    assert second[1]["width"] == 64
    assert len(second[1]["eta"]) == 3
    assert third[0] > second[0]
    states = {each["trial"]: each["state"] for each in client.get(f"{V1}/studies/{script.id}/trials").json()["items"]}
    assert (states[whole], states[half]) == ("leased", "leased")


def test_a_queued_point_takes_an_outcome_before_anybody_has_begun_it(client: TestClient) -> None:
    script = launched(client)
    recorded(client, script)
    [result] = script.results()
    script.update(result, -4.0)
    trial = client.get(f"{V1}/studies/{script.id}/trials/0").json()
    assert (trial["state"], trial["value"], trial["params"]) == ("complete", 4.0, POINT)


def test_what_a_worker_holds_is_the_workers(client: TestClient) -> None:
    script = launched(client)
    lease = asked(client, script)
    [result] = script.results()
    body = {"variables": [{"name": "value", "value": 1.0}]}
    answer = client.patch(f"/api/alpha/results/{result}", json=body)
    assert answer.status_code == 409
    assert "worker" in answer.json()["error"]
    script.cancel(result)
    assert script.results() == {}, "it is gone from the list before its worker has heard of it"
    report = client.post(f"{V1}/leases/{lease['lease']}/report", json={"token": lease["token"], "reports": []})
    assert report.json()["verdict"] == "stop"
    told(client, lease, outcome="complete", value=1.0)
    assert script.results() == {result: -1.0}, "a worker that had finished before it heard is believed"
    script.update(result, -2.0)
    assert client.get(f"{V1}/studies/{script.id}/trials/0").json()["value"] == 2.0


def test_a_budget_of_trials_counts_suggestions_and_a_deleted_trial_gives_its_place_back(client: TestClient) -> None:
    script = launched(client, budget={"trials": 3})
    lease = asked(client, script)
    told(client, lease, outcome="complete", value=1.0)
    first, second = script.suggest()[0], script.suggest()[0]
    refused = client.post(f"/api/alpha/experiments/{script.id}/suggest/")
    assert refused.status_code == 409
    assert "budget" in refused.json()["error"]
    script.cancel(first)
    script.update(second, 1)
    assert script.suggest()
    script.cancel(next(iter(script.results())))
    assert client.get(f"{V1}/studies/{script.id}").json()["budget"]["trials_used"] == 0
    assert script.suggest()


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_a_study_that_does_not_run_suggests_nothing_and_says_so(client: TestClient, state: str) -> None:
    script = launched(client)
    waiting = script.suggest()[0]
    assert client.patch(f"{V1}/studies/{script.id}", json={"state": state}).status_code == 200
    refused = client.post(f"/api/alpha/experiments/{script.id}/suggest/")
    assert refused.status_code == 409
    assert state in refused.json()["error"]
    script.update(waiting, -5.0)
    assert script.results() == {waiting: -5.0}, "what was begun may still be told"


def test_a_point_that_the_study_cannot_hold_is_refused(client: TestClient) -> None:
    tied = SPACE[0] | {"tied": {"body": ["conv", "fc"], "head": ["out"]}}
    script = launched(client, space=[tied, *SPACE[1:3]])
    variables = [
        {"name": "eta", "value": [0.01, 0.02, 0.03]},
        {"name": "width", "value": 8},
        {"name": "kind", "value": "sgd"},
    ]
    body = {"experiment": script.id, "variables": variables}
    assert "tied" in client.post("/api/alpha/results/", json=body).json()["error"]
    variables[0]["value"], variables[1]["value"] = [0.01, 0.01, 0.03], 9
    assert "step" in client.post("/api/alpha/results/", json=body).json()["error"]
    variables[1]["value"] = 16
    assert client.post("/api/alpha/results/", json=body).status_code == 201
    long = launched(client, name="long", space=SPACE)
    assert "24" in client.post("/api/alpha/results/", json=body | {"experiment": long.id}).json()["error"]
    assert set(long.suggest()[1]) == {"eta", "width", "kind"}


def test_other_processes_read_a_correction_before_they_suggest(client: TestClient, postgres_url: str) -> None:
    """Each value is what samplers learn from; a deleted trial is none of theirs any more."""
    script = Script(client, "corrected", [FLOAT])
    results = [script.add({"x": float(n)}, n) for n in range(4)]
    elsewhere = database.connect(postgres_url)
    history = History(elsewhere, script.id)
    space = client.app.state.coordinator._desk.known  # type: ignore[attr-defined]
    with client.app.state.coordinator._desk.transaction() as conn:  # type: ignore[attr-defined]
        space = space(conn, script.id).spec.space

    def seen() -> list[tuple[str, float | None, bool]]:
        history.refresh()
        entries = history.snapshot(space).entries
        return [(each.trial.state.name, each.trial.value, each.infeasible) for each in entries]

    assert seen() == [("COMPLETE", float(n), False) for n in range(4)]
    script.update(results[0], 50.0)
    script.update(results[1], float("nan"))
    script.cancel(results[2])
    after = seen()
    assert after[0] == ("COMPLETE", 50.0, False)
    assert (after[1][0], after[1][2]) == ("COMPLETE", True)
    assert (after[2][0], after[2][1]) == ("FAIL", None)
    assert after[3] == ("COMPLETE", 3.0, False)
    stock = optuna.load_study(study_name="corrected", storage=PostgresStorage(elsewhere))
    assert stock.best_value == 50.0
    assert [trial.number for trial in stock.trials] == [0, 1, 2, 3], "no row is ever deleted"
    assert stock.trials[2].system_attrs[CANCELLED] is True
    script.update(results[1], 60.0)
    assert seen()[1] == ("COMPLETE", 60.0, False)
    elsewhere.dispose()


def test_an_outcome_that_reaches_the_target_ends_the_study(client: TestClient) -> None:
    script = launched(client, budget={"target": 1.0})
    script.update(script.suggest()[0], -5.0)
    assert client.get(f"{V1}/studies/{script.id}").json()["state"] == "running"
    script.update(next(iter(script.results())), -0.5)
    assert client.get(f"{V1}/studies/{script.id}").json()["state"] == "finished"


def test_a_study_that_workers_hold_is_not_deleted_under_their_hands(client: TestClient) -> None:
    script = launched(client)
    asked(client, script)
    answer = client.delete(f"/api/alpha/experiments/{script.id}/")
    assert answer.status_code == 409
    assert "stop the study" in answer.json()["error"]
    assert (
        client.post("/api/alpha/experiments", json={"name": "swept", "settings": [FLOAT, OUTCOME]}).status_code == 400
    )


def test_what_is_not_there_or_gives_nothing_is_called_an_experiment(client: TestClient) -> None:
    script = launched(client)
    script.suggest()
    result = {"experiment": 99, "variables": []}
    for answer in (
        client.get("/api/alpha/experiments/99/"),
        client.delete("/api/alpha/experiments/99/"),
        client.post("/api/alpha/experiments/99/suggest/"),
        client.get("/api/alpha/settings/?experiment=99"),
        client.post("/api/alpha/settings/", json={**FLOAT, "experiment": 99}),
        client.get("/api/alpha/results/?experiment=99"),
        client.post("/api/alpha/results/", json=result),
    ):
        assert (answer.status_code, answer.json()) == (404, {"error": "there is no experiment 99"})
    for change, says in (
        ({"state": "paused"}, "the experiment is paused"),
        ({"state": "running", "budget": {"trials": 1}}, "the experiment's budget is spent"),
    ):
        assert client.patch(f"{V1}/studies/{script.id}", json=change).status_code == 200
        answer = client.post(f"/api/alpha/experiments/{script.id}/suggest/")
        assert answer.status_code == 409
        assert answer.json()["error"].startswith(says)


def test_a_study_with_the_longest_name_is_found_by_it(client: TestClient) -> None:
    name = "\U0001f332" * MAX_NAME
    made = client.post("/api/alpha/experiments/", json={"name": name, "settings": [FLOAT, OUTCOME]}).json()["id"]
    launched(client)
    found = client.get(f"{V1}/studies", params={"name": name})
    assert found.status_code == 200, found.text
    assert [item["study"] for item in found.json()["items"]] == [made]
    page = client.get("/", params={"name": name}, headers={"Accept": "text/html"})
    assert (page.status_code, name in page.text, "swept" in page.text) == (200, True, False)
    assert client.get(f"{V1}/studies", params={"name": name + "x"}).status_code == 422
