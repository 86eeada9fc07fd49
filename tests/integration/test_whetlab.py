"""Whetlab's protocol from experiment to best result, on a real database, as its clients speak it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text

from hpo import database
from tests.integration.api_server import bearer, make_app
from tests.integration.whetlab_script import ENUM, FLOAT, OUTCOME, WHOLE, Script, dumps

NAN = float("nan")


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(make_app(engine), headers=bearer("admin")) as made:
        yield made


def test_a_script_runs_from_its_experiment_to_the_best_result(client: TestClient) -> None:
    script = Script(client)
    for _ in range(6):
        result, point = script.suggest()
        assert set(point) == {"x", "n"}
        assert script.results()[result] is None
        script.update(result, -((point["x"] - 3) ** 2) - point["n"])
    outcomes = script.results()
    assert len(outcomes) == 6
    assert outcomes[script.best()] == max(outcomes.values())
    resumed = Script(client)
    assert resumed.id == script.id
    assert resumed.results() == outcomes


def test_a_result_has_all_five_keys_and_a_variable_for_every_setting(client: TestClient) -> None:
    script = Script(client, settings=[FLOAT, WHOLE, ENUM])
    whole = script.result(script.suggest()[0])
    assert set(whole) == {"id", "experiment", "userProposed", "description", "variables"}
    assert whole["experiment"] == script.id
    assert whole["userProposed"] is False
    assert all(set(each) == {"id", "setting", "result", "name", "value"} for each in whole["variables"])
    assert [each["setting"] for each in whole["variables"]] == [each["id"] for each in script.settings.values()]
    assert {each["result"] for each in whole["variables"]} == {whole["id"]}
    assert script.outcome_of(whole) is None


def test_settings_come_back_as_they_were_given_with_what_was_left_out(client: TestClient) -> None:
    log = {"name": "rate", "type": "float", "min": 1e-4, "max": 1, "size": 3, "scale": "log", "units": "per step"}
    settings = Script(client, settings=[log, WHOLE, ENUM]).settings
    keys = {"id", "name", "type", "min", "max", "size", "units", "scale", "isOutput", "options", "experiment"}
    assert all(set(each) == keys for each in settings.values())
    rate = settings["rate"]
    assert {key: rate[key] for key in log} == log
    assert isinstance(settings["n"]["max"], int)
    assert (settings["n"]["units"], settings["n"]["scale"], settings["n"]["size"]) == ("Integers", "linear", 1)
    assert settings["kind"]["options"] == ["one", "two", "three"]
    assert [name for name, each in settings.items() if each["isOutput"]] == ["Negative loss"]


def test_suggested_values_keep_their_type_and_lie_within_their_bounds(client: TestClient) -> None:
    wide = FLOAT | {"name": "v", "size": 3}
    kinds = ENUM | {"name": "kinds", "size": 2}
    script = Script(client, settings=[FLOAT, WHOLE, ENUM, wide, kinds, WHOLE | {"name": "m", "size": 5}])
    for _ in range(4):
        answer = client.post(f"/api/alpha/experiments/{script.id}/suggest/", content=b"[]")
        point = script.point(answer.json())
        assert isinstance(point["x"], float)
        assert 0 <= point["x"] <= 10
        assert isinstance(point["n"], int)
        assert point["kind"] in ENUM["options"]
        assert len(point["v"]) == 3
        assert all(isinstance(each, float) for each in point["v"])
        assert len(point["kinds"]) == 2
        assert set(point["kinds"]) <= set(ENUM["options"])
        assert len(point["m"]) == 5
        assert all(isinstance(each, int) for each in point["m"])


def test_a_float_that_is_whole_is_written_with_its_decimal_point(client: TestClient) -> None:
    script = Script(client)
    result = script.add({"x": 5, "n": 3}, 1)
    written = client.get(f"/api/alpha/results/{result}").text
    assert '"value":5.0' in written
    assert '"value":3}' in written
    assert '"value":1.0' in written


def test_ids_are_integers_and_grow(client: TestClient) -> None:
    first, second = Script(client, "a"), Script(client, "b")
    assert 0 < first.id < second.id < 100
    settings = [each["id"] for script in (first, second) for each in script.settings.values()]
    assert settings == sorted(set(settings))
    assert settings[-1] < 10_000
    results = [first.suggest()[0], second.suggest()[0], first.suggest()[0]]
    assert results == sorted(set(results))
    variables = [each["id"] for result in results for each in first.result(result)["variables"]]
    assert variables == sorted(set(variables))


def test_an_outcome_written_again_replaces_the_first(client: TestClient) -> None:
    script = Script(client)
    first, second = script.add({"x": 1.0, "n": 1}, 5.0), script.add({"x": 2.0, "n": 2}, 4.0)
    assert script.best() == first
    script.update(first, -7.0)
    assert script.results() == {first: -7.0, second: 4.0}
    assert script.best() == second
    best = client.get(f"/api/v1/studies/{script.id}/best").json()
    assert [each["value"] for each in best] == [4.0, -7.0]


@pytest.mark.parametrize("outcome", [NAN, math.inf, -math.inf, "NaN", "-infinity", "Infinity", "inf", 10**400])
def test_an_outcome_that_is_not_finite_is_infeasible_and_never_the_best(client: TestClient, outcome: Any) -> None:
    script = Script(client)
    poor, bad, worse = script.add({"x": 1.0, "n": 1}, -50.0), script.suggest()[0], script.add({"x": 2.0, "n": 1}, 99.0)
    script.update(bad, outcome)
    script.update(worse, outcome)
    proposed = script.add({"x": 3.0, "n": 1}, outcome)
    outcomes = script.results()
    assert (outcomes[bad], outcomes[worse], outcomes[proposed]) == ("NaN", "NaN", "NaN")
    assert script.best() == poor
    counts = client.get(f"/api/v1/studies/{script.id}").json()["counts"]
    assert (counts["infeasible"], counts["complete"]) == (3, 1)
    script.update(bad, 3)
    assert script.best() == bad


def test_a_deleted_result_is_gone_from_every_list(client: TestClient) -> None:
    script = Script(client)
    kept = script.add({"x": 1.0, "n": 1}, 1.0)
    done, waiting = script.add({"x": 2.0, "n": 2}, 9.0), script.suggest()[0]
    for result in (done, waiting):
        script.cancel(result)
        assert client.get(f"/api/alpha/results/{result}/").status_code == 404
        assert client.delete(f"/api/alpha/results/{result}/").status_code == 404
        assert client.patch(f"/api/alpha/results/{result}/", json={}).status_code == 404
    assert script.results() == {kept: 1.0}
    assert {each["result"] for each in script.list("variables")} == {kept}
    [best] = client.get(f"/api/v1/studies/{script.id}/best").json()
    assert best["value"] == 1.0
    states = [each["state"] for each in client.get(f"/api/v1/studies/{script.id}/trials").json()["items"]]
    assert states == ["complete", "cancelled", "cancelled"]


def test_a_point_of_ones_own_counts_with_and_without_an_outcome(client: TestClient) -> None:
    script = Script(client)
    done, waiting = script.add({"x": 1.5, "n": 3}, 7), script.add({"x": 2.5, "n": 4})
    assert script.results() == {done: 7.0, waiting: None}
    assert script.point(script.result(waiting)) == {"x": 2.5, "n": 4}
    assert script.result(waiting)["userProposed"] is True
    assert script.result(done)["description"] == "of a script"
    script.update(waiting, 8)
    assert script.best() == waiting


def test_pending_suggestions_differ_and_never_expire(client: TestClient, engine: Engine) -> None:
    script = Script(client)
    points = [script.suggest()[1] for _ in range(8)]
    assert all(first != second for first, second in itertools.combinations(points, 2))
    expired = client.app.state.coordinator.expire()  # type: ignore[attr-defined]
    assert not expired
    assert list(script.results().values()) == [None] * 8
    assert client.get(f"/api/v1/studies/{script.id}").json()["counts"]["leased"] == 8


@pytest.mark.parametrize("finish", [True, False])
def test_a_small_space_gives_no_point_twice_while_an_untried_one_is_left(client: TestClient, finish: bool) -> None:
    script = Script(client, settings=[WHOLE | {"max": 3}, ENUM])
    points = []
    for _ in range(12):
        result, point = script.suggest()
        points.append((point["n"], point["kind"]))
        if finish:
            script.update(result, NAN if point["n"] == 2 else point["n"])
    assert len(set(points)) == 12
    assert script.suggest()[1], "after the last one it goes on all the same"


def test_a_deleted_experiment_takes_its_results_along_and_frees_its_name(client: TestClient) -> None:
    script = Script(client)
    result = script.add({"x": 1.0, "n": 1}, 1.0)
    answer = client.delete(f"/api/alpha/experiments/{script.id}/")
    assert answer.status_code == 204
    assert "json" in answer.headers["content-type"]
    assert client.get(f"/api/alpha/results/{result}").status_code == 404
    again = Script(client)
    assert again.id > script.id
    assert again.results() == {}


def test_a_name_that_is_taken_is_refused_in_the_words_that_the_clients_know(client: TestClient) -> None:
    Script(client, "mine")
    answer = client.post("/api/alpha/experiments/", json={"name": "mine", "settings": [FLOAT, OUTCOME]})
    assert answer.status_code == 400
    assert answer.json() == {"error": "Experiment with this User and Name already exists."}


def test_a_result_keeps_its_point(client: TestClient) -> None:
    script = Script(client)
    result, point = script.suggest()
    rounded = float(f"{point['x']:.14g}")  # as Lua writes numbers
    for x, status in ((rounded, 200), (point["x"] / 2 + 1, 400)):
        body = {"variables": [{"name": "x", "value": x}, {"name": "Negative loss", "value": 1}], "id": result}
        answer = client.put(f"/api/alpha/results/{result}", content=dumps(body))
        assert answer.status_code == status, answer.text
    assert script.point(script.result(result)) == point
    assert "cannot be changed" in answer.json()["error"]


def test_writing_null_or_nothing_changes_nothing(client: TestClient) -> None:
    script = Script(client)
    done = script.add({"x": 1.0, "n": 1}, 1.0)
    script.update(done, None)
    assert client.patch(f"/api/alpha/results/{done}", json={}).status_code == 200
    assert script.results() == {done: 1.0}


def test_a_setting_that_is_there_is_found_and_another_is_refused(client: TestClient) -> None:
    script = Script(client)
    answer = client.post("/api/alpha/settings/", json=FLOAT | {"experiment": script.id, "scale": "linear"})
    assert answer.status_code == 201
    assert answer.json() == script.settings["x"]
    for other in (FLOAT | {"max": 11}, FLOAT | {"name": "y"}):
        answer = client.post("/api/alpha/settings/", json=other | {"experiment": script.id})
        assert answer.status_code == 400
        assert "create another experiment" in answer.json()["error"]


def test_two_servers_of_one_database_serve_one_experiment(engine: Engine, postgres_url: str) -> None:
    """Corrections made through one count in what the other suggests next, and no point is handed out twice."""
    other = database.connect(postgres_url)
    try:
        with (
            TestClient(make_app(engine), headers=bearer("admin")) as here,
            TestClient(make_app(other), headers=bearer("admin")) as there,
        ):
            first = Script(here, settings=[WHOLE | {"max": 5}, ENUM])
            second = Script(there)
            assert first.id == second.id
            seen = [script.suggest() for _ in range(6) for script in (first, second)]
            assert len({(point["n"], point["kind"]) for _, point in seen}) == 12
            for script, (result, point) in zip(itertools.cycle((second, first)), seen, strict=False):
                script.update(result, point["n"])
            gone, point = seen[0]
            second.cancel(gone)
            assert gone not in first.results()
            left = [script.suggest()[1] for _ in range(3) for script in (first, second)]
            assert len({(each["n"], each["kind"]) for each in left}) == 6
    finally:
        other.dispose()


def test_suggestions_asked_for_at_once_are_all_different(engine: Engine, postgres_url: str) -> None:
    """Of two servers, two threads each: numbers without gaps, and every point of a small space once."""
    other = database.connect(postgres_url)
    try:
        servers = [make_app(each).state.coordinator.whetlab for each in (engine, other)]
        settings = [WHOLE | {"max": 7}, ENUM | {"options": ["a", "b"]}, OUTCOME]
        experiment = servers[0].create_experiment({"name": "at once", "settings": settings})["id"]
        with ThreadPoolExecutor(4) as threads:
            made = list(threads.map(lambda place: servers[place % 2].suggest(experiment), range(16)))
        points = {tuple(variable["value"] for variable in each["variables"]) for each in made}
        assert len(points) == 16
        with engine.connect() as conn:
            found = conn.execute(text("SELECT number FROM trials ORDER BY number")).scalars().all()
        assert found == list(range(16))
    finally:
        other.dispose()
