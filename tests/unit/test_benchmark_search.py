"""The benchmark of searches counts what it says: problems, searches, and what is made of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import forest, problems, trainings
from benchmarks.problems import LAYERS, Problem, Told
from benchmarks.search import SINGLE, Comparison, Job, Kept, Scale, Search, behind, interval, measure, reached
from benchmarks.simulation import search
from hpo.spec import parse

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def test_a_forest_learns_a_step_and_stays_within_what_it_saw() -> None:
    rng = np.random.default_rng(1)
    rows = rng.uniform(-1, 1, (300, 4))
    values = np.where(rows[:, 2] > 0.2, 3.0, 1.0) + rng.normal(0, 0.1, 300)
    grown = forest.fit(rows, values, trees=50, columns=2, seed=7)
    fresh = np.random.default_rng(2).uniform(-1, 1, (200, 4))
    predicted = grown.predict(fresh)
    right = np.where(fresh[:, 2] > 0.2, 3.0, 1.0)
    assert np.mean((predicted - right) ** 2) < 0.1 * np.var(right)
    assert values.min() <= predicted.min()
    assert predicted.max() <= values.max()
    again = forest.fit(rows, values, trees=50, columns=2, seed=7)
    assert np.array_equal(again.predict(fresh), predicted)
    assert not np.array_equal(forest.fit(rows, values, trees=50, columns=2, seed=8).predict(fresh), predicted)


def test_a_forest_of_equal_values_predicts_that_value() -> None:
    assert (
        forest.fit(np.zeros((5, 2)), np.full(5, 0.3), trees=3, columns=1).predict(np.ones((2, 2))).tolist() == [0.3] * 2
    )


def test_the_maxima_of_the_synthetic_problems_are_the_known_ones() -> None:
    best = [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]
    point = {f"x{place}": value for place, value in enumerate(best * 3)}
    assert problems.hartmann().evaluate(point, RNG).truth == pytest.approx(3 * 3.32237, abs=1e-4)
    shift = np.random.default_rng(18).uniform(-5, 5, 18)
    levy = problems.levy()
    assert levy.evaluate({f"x{place}": value for place, value in enumerate(shift)}, RNG).truth == pytest.approx(0)
    assert levy.evaluate(dict.fromkeys(point, 0.0), RNG).truth < -1, "the middle is not the maximum"


def test_nine_tenths_of_the_diverging_space_diverge_and_are_told_so_at_chance() -> None:
    problem = problems.diverging()
    space = parse({"name": "s", "workload": "external", "space": problem.space}, {}).space
    rng = np.random.default_rng(3)
    told = [problem.evaluate(space.random(rng), rng) for _ in range(2_000)]
    assert 0.87 < np.mean([not each.feasible for each in told]) < 0.93
    assert {each.value for each in told if not each.feasible} == {trainings.CHANCE}
    calm = {
        f"{name}[{each}]": value for name, value in (("eta", 1e-3), ("mu", 0.0), ("lambda", 1e-4)) for each in LAYERS
    }
    assert problem.evaluate(calm, rng).feasible
    middle = {
        f"{name}[{each}]": value for name, value in (("eta", 0.03), ("mu", 0.5), ("lambda", 3e-4)) for each in LAYERS
    }
    assert not problem.evaluate(middle, rng).feasible, "a search that begins there has to leave"


def test_what_is_recorded_are_the_points_of_the_sequence_in_their_ranges() -> None:
    recorded = trainings.read()
    assert len(recorded) >= 300
    assert len({(one.point, one.seed) for one in recorded}) == len(recorded)
    points = trainings.points(max(one.point for one in recorded) + 1)
    assert all(one.params == points[one.point] for one in recorded)
    for name, (low, high, _) in trainings.RANGES.items():
        values = [one.params[f"{name}_{group}"] for one in recorded for group in trainings.GROUPS]
        assert low <= min(values) < max(values) <= high
    assert 0 < problems.noise(recorded) < 0.1


def row(point: int, seed: int, value: float | None) -> trainings.Training:
    params = trainings.points(8)[point]
    return trainings.Training(point, seed, params, "infeasible" if value is None else "complete", value, 5, 1.0)


def test_the_noise_is_that_between_seeds_of_the_same_point() -> None:
    same = [row(0, 0, 0.4), row(0, 9, 0.42), row(1, 1, 0.2), row(1, 8, 0.18), row(2, 2, 0.9)]
    assert problems.noise(same) == pytest.approx(math.sqrt(0.0002))


def test_points_to_repeat_have_learned_and_lie_all_over_the_range() -> None:
    rows = [row(place, place, value) for place, value in enumerate([0.5, 0.3, None, 0.4, 0.08, 0.2, 0.6])]
    assert [one.value for one in trainings.to_repeat(rows, 2)] == [0.3, 0.5]


def test_a_recording_goes_on_where_it_stopped_and_is_shared_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    class Quick:
        def __init__(self, data: str) -> None: ...

        def train(self, point: int, params: dict[str, float], seed: int) -> trainings.Training:
            trained.append(point)
            return trainings.Training(point, seed, params, "complete", 0.3, 5, 1.0)

    monkeypatch.setattr(trainings, "Trainer", Quick)
    out = ["--out", str(tmp_path / "rows.csv")]
    trainings.main(["record", "--count", "2", *out])
    trainings.main(["record", "--count", "6", *out, "--part", "1", "--of", "2"])
    assert trained == [0, 1, 3, 5]
    trainings.main(["record", "--count", "6", *out])
    assert trained == [0, 1, 3, 5, 2, 4]
    assert [one.point for one in trainings.read(tmp_path / "rows.csv")] == [0, 1, 2, 3, 4, 5]
    trainings.main(["repeat", "--count", "2", *out])
    trainings.main(["repeat", "--count", "2", *out])
    assert len(trained) == 6 + 8
    assert len({(one.point, one.seed) for one in trainings.read(tmp_path / "rows.csv")}) == 14


def lines(evaluated: list[dict[str, Any]]) -> Problem:
    """A problem that keeps what it was asked, and finds half of its points infeasible."""

    def evaluate(point: problems.Point, rng: np.random.Generator) -> Told:
        evaluated.append(dict(point))
        return Told(point["x"] + float(rng.normal()), point["x"], feasible=point["y"] < 0.5)

    space = [{"name": name, "type": "float", "low": 0, "high": 1} for name in ("x", "y")]
    return Problem("lines", space, evaluate)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random"])
def test_a_search_has_exactly_its_budget_and_is_the_same_again(sampler: str) -> None:
    asked: list[dict[str, Any]] = []
    found = search(lines(asked), sampler, 5, trials=30)
    assert len(asked) == len(found.truths) == 30
    assert sorted(found.truths) == sorted(point["x"] for point in asked), "the truth is kept, not the noise"
    assert found.truths != [point["x"] for point in asked], "they finish in another order than they began"
    assert found.best() == np.maximum.accumulate(found.truths).tolist()
    assert search(lines([]), sampler, 5, trials=30) == found
    assert search(lines([]), sampler, 6, trials=30) != found


def test_auto_is_behind_where_p_stands_after_holm() -> None:
    assert behind([0.5, 0.6, 0.4, 0.9]) == 0
    assert behind([0.004, 0.6, 0.4, 0.9]) == 0, "a quarter of 0.01 is what the smallest has to be below"
    assert behind([0.002, 0.6, 0.4, 0.9]) == 1
    assert behind([0.9, 0.002, 0.003, 0.004]) == 3
    assert behind([0.9, 0.002, 0.004, 0.0049]) == 1


def test_reaching_counts_trials_from_one_and_never_is_one_more_than_there_are() -> None:
    assert reached([0.1, 0.5, 0.7], 0.5) == 2
    assert reached([0.1, 0.5, 0.7], 0.1) == 1
    assert reached([0.1, 0.5, 0.7], 0.8) == 4


def test_the_interval_holds_the_median_with_95_percent() -> None:
    draws = np.sort(np.random.default_rng(0).exponential(size=(20, 4_000)), axis=0)
    low, high = interval(draws)
    assert 0.94 < np.mean((low <= math.log(2)) & (math.log(2) <= high)) < 0.975


def kept_with(path: Path, ends: dict[str, float], seeds: int, trials: int) -> Kept:
    """Searches that end where they are told to, with a little difference between seeds."""
    kept = Kept(path)
    for problem in problems.PROBLEMS:
        for sampler in (*SINGLE, "auto"):
            for seed in range(seeds):
                end = ends.get(f"{problem} {sampler}", ends.get(sampler, 0.0)) + seed / 1_000
                kept.add(Job(problem, sampler, seed, trials), Search([end - 1, end, end - 2, end - 1], {}))
    return kept


def test_the_figures_are_made_of_the_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = Scale(seeds=20, trials=4, moments=(2, 4))
    kept = kept_with(tmp_path / "kept", {"gp": 2.0, "auto": 1.9, "levy auto": 2.0, "diverging cmaes": 1.0}, 20, 4)
    results = measure(["auto_behind", "trials_to_random_100"], scale, kept)
    figures = {figure.name: figure for figure in results.figures}
    assert figures["auto_behind"].value == 3, "it ties on levy"
    assert not figures["auto_behind"].met
    assert "levy: gp best" in figures["auto_behind"].note
    assert figures["trials_to_random_100"].value == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*problems.PROBLEMS, *SINGLE, "auto"))
    assert "gp (best single one)" in printed
    compared = Comparison("diverging", kept.searches)
    assert compared.at("auto", 1)[0] == pytest.approx(0.9)
    assert compared.winner == "gp"


def test_searches_that_rest_on_other_code_are_not_taken_for_these(tmp_path: Path) -> None:
    job = Job("levy", "random", 0, 4)
    Kept(tmp_path / "kept").add(job, Search([1.0], {"gp": 1}))
    assert Kept(tmp_path / "kept").searches == {job: Search([1.0], {"gp": 1})}
    other = json.loads((tmp_path / "kept").read_text()) | {"code": "0123456789abcdef"}
    (tmp_path / "kept").write_text(json.dumps(other) + "\n")
    assert Kept(tmp_path / "kept").searches == {}


@pytest.mark.slow
def test_a_run_writes_its_figures_with_their_goals_and_a_second_one_makes_no_search_again(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.search",
        "--quick",
        "--json",
        str(file),
        "--only",
        "trials_to_random_100",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=True)
    assert "trials_to_random_100" in done.stdout
    document = json.loads(file.read_text())
    assert [(each["name"], each["goal"]) for each in document["figures"]] == [("trials_to_random_100", "<= 35")]
    assert document["quick"] is True
    assert document["details"]["picks"]["trainings 0"]["tpe"] == 12
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=True)
    assert "searches to make" in done.stderr
    assert "searches to make" not in again.stderr
