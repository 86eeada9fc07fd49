"""A pruner stops what lags behind, as Optuna's own would, says the same again, and keeps its rungs where they are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hpo.pruners import Verdict, judge
from hpo.pruning import RESOURCE, RUNG, Rivals
from hpo.spec import StudySpec, parse

SPACE = [{"name": "x", "type": "float", "low": 0, "high": 1}]
NAME = "s"


def spec_of(pruner: Any, direction: str = "maximize") -> StudySpec:
    return parse({"name": NAME, "workload": "external", "space": SPACE, "pruner": pruner, "direction": direction}, {})


def rivals(trials: Sequence[FrozenTrial], number: int, reports: dict[int, float], **more: Any) -> Rivals:
    """What a study with these trials tells about one of them, or about the next one."""
    others = [trial for trial in trials if trial.number != number]
    own = next((trial for trial in trials if trial.number == number), None)
    complete = [trial for trial in others if trial.state == TrialState.COMPLETE]
    reports = {**(own.intermediate_values if own else {}), **reports}
    step = max(reports, default=0)
    steps = [trial.last_step for trial in complete if trial.last_step is not None]
    at_step = [trial.intermediate_values[step] for trial in complete if step in trial.intermediate_values]
    reached = {} if own is None else rungs_of(own)
    rungs: dict[int, list[tuple[int, float]]] = {}
    for trial in others:
        for rung, value in rungs_of(trial).items():
            rungs.setdefault(rung, []).append((trial.number, value))
    return Rivals(
        NAME,
        reports,
        reached,
        len(complete),
        np.array(at_step, dtype=float),
        max(steps, default=None),
        rungs=rungs,
        **more,
    )


def rungs_of(trial: FrozenTrial) -> dict[int, float]:
    return {int(key.removeprefix(RUNG)): value for key, value in trial.system_attrs.items() if key.startswith(RUNG)}


def rising(top: float, epochs: int = 10) -> dict[int, float]:
    return {epoch: top * (epoch + 1) / epochs for epoch in range(epochs)}


def completed(*curves: dict[int, float]) -> list[FrozenTrial]:
    trials = [create_trial(value=max(curve.values()), intermediate_values=curve) for curve in curves]
    for number, trial in enumerate(trials):
        trial.number = number
    return trials


def verdict(
    pruner: Any, trials: Sequence[FrozenTrial], reports: dict[int, float], direction: str = "maximize"
) -> Verdict:
    return judge(spec_of(pruner, direction), len(trials), rivals(trials, len(trials), reports))


# As Optuna's own


OPTUNAS: dict[str, type[BasePruner]] = {
    "median": MedianPruner,
    "successive_halving": SuccessiveHalvingPruner,
    "hyperband": HyperbandPruner,
}
PRUNERS = [
    {"name": "median", "n_startup_trials": 2},
    {"name": "median", "n_startup_trials": 0, "n_warmup_steps": 3, "interval_steps": 4, "n_min_trials": 3},
    {"name": "successive_halving", "min_resource": 1, "reduction_factor": 2},
    {
        "name": "successive_halving",
        "min_resource": 2,
        "reduction_factor": 3,
        "min_early_stopping_rate": 1,
        "bootstrap_count": 3,
    },
    {"name": "successive_halving", "min_resource": "auto", "reduction_factor": 2},
    {"name": "hyperband", "min_resource": 1, "max_resource": 27, "reduction_factor": 3},
    {"name": "hyperband", "min_resource": 2, "max_resource": 40, "reduction_factor": 2, "bootstrap_count": 2},
    {"name": "hyperband", "min_resource": 1, "max_resource": "auto", "reduction_factor": 3},
]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: "-".join(map(str, pruner.values())))
def test_it_says_what_optunas_own_pruner_says_at_every_report(pruner: dict[str, Any], direction: str) -> None:
    """Trials side by side, some longer than others, some values lost, in a random order: judged by both each time."""
    rng = random.Random(f"{pruner} {direction}")
    spec = spec_of(pruner, direction)
    theirs = OPTUNAS[pruner["name"]](**{name: value for name, value in pruner.items() if name != "name"})
    study = optuna.create_study(study_name=NAME, direction=direction, pruner=theirs)
    sign = 1 if direction == "maximize" else -1
    settled: dict[str, Any] = {}
    running: list[tuple[Trial, float, int]] = []
    said: list[bool] = []
    for _ in range(500):
        if len(running) < 4:
            running.append((study.ask(), rng.random(), rng.choice([9, 30, 45])))
        place = rng.randrange(len(running))
        trial, quality, length = running[place]
        stored = study.get_trials(deepcopy=False)
        before = stored[trial.number]
        step = (-1 if before.last_step is None else before.last_step) + rng.choice([1, 1, 2])
        value = math.nan if rng.random() < 0.02 else sign * quality * (step + 1) / 50 + rng.gauss(0, 0.02)
        ours = judge(spec, trial.number, rivals(stored, trial.number, {step: value}, resource=settled.get(RESOURCE)))
        settled |= ours.study_system_attrs
        reached = set(rungs_of(before))
        trial.report(value, step)
        assert ours.prune == trial.should_prune(), (trial.number, step)
        after = rungs_of(study.get_trials(deepcopy=False)[trial.number])
        news = {f"{RUNG}{rung}": after[rung] for rung in after if rung not in reached}
        assert ours.trial_system_attrs == news
        said.append(ours.prune)
        if ours.prune or step >= length:
            running.pop(place)
            if ours.prune:
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, sign * quality)
    assert 5 < sum(said) < len(said) - 5, "both answers were given"


# Ours


def test_without_a_pruner_everything_goes_on() -> None:
    assert verdict("none", completed(rising(0.9)), {0: 0.0}) == Verdict(prune=False)


def test_the_median_stops_what_lags_behind_and_nothing_else() -> None:
    trials = completed(rising(0.5), rising(0.6), rising(0.7))
    pruner = {"name": "median", "n_startup_trials": 3}
    assert verdict(pruner, trials, {0: 0.01, 1: 0.05}).prune
    assert not verdict(pruner, trials, {0: 0.01, 1: 0.2}).prune
    assert not verdict({"name": "median", "n_startup_trials": 4}, trials, {0: 0.0}).prune
    assert not verdict({"name": "median", "n_warmup_steps": 5}, trials * 2, {2: 0.0}).prune


def test_the_median_of_a_study_that_minimizes_stops_what_is_too_high() -> None:
    pruner, trials = {"name": "median", "n_startup_trials": 2}, completed({0: 1.0}, {0: 2.0}, {0: 3.0})
    assert verdict(pruner, trials, {0: 2.5}, "minimize").prune
    assert not verdict(pruner, trials, {0: 0.5}, "minimize").prune


def test_a_trial_without_reports_goes_on() -> None:
    for name in ("median", "successive_halving", "hyperband"):
        assert verdict(name, completed(rising(0.5)), {}) == Verdict(prune=False)


def test_a_value_that_is_not_a_number_is_stopped() -> None:
    assert verdict({"name": "median", "n_startup_trials": 1}, completed(rising(0.5)), {0: math.nan}).prune


def test_what_is_asked_again_before_it_is_stored_is_answered_alike() -> None:
    pruner = {"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}
    first = verdict(pruner, [], {1: 0.5})
    assert first.trial_system_attrs == {f"{RUNG}0": 0.5}
    assert verdict(pruner, [], {1: 0.5}) == first


@pytest.mark.parametrize(("name", "resource"), [("successive_halving", 2), ("hyperband", 250)])
def test_an_automatic_resource_is_resolved_once_and_kept(name: str, resource: int) -> None:
    trials = completed(rising(0.9, 250))
    assert verdict(name, trials, {0: 0.5, 1: 0.5}).study_system_attrs == {RESOURCE: resource}
    longer = rivals(completed(rising(0.9, 250), rising(0.9, 1000)), 2, {0: 0.5}, resource=resource)
    assert judge(spec_of(name), 2, longer).study_system_attrs == {}


def test_an_automatic_resource_waits_for_a_complete_trial() -> None:
    for name in ("successive_halving", "hyperband"):
        assert verdict(name, [], {0: 0.0, 50: 0.0}) == Verdict(prune=False)
