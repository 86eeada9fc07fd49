"""A pruner stops what lags behind, says the same again, and keeps its rungs where they are."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.history import CONSTRAINT, entry_of
from hpo.pruners import RESOURCE, Verdict, judge
from tests.unit.test_samplers import Study, spec_of

X = [{"name": "x", "type": "float", "low": 0, "high": 1}]


def study_with(pruner: Any, *curves: dict[int, float], direction: str = "maximize") -> Study:
    """A study with one complete trial for each curve, and a running one without reports."""
    study = Study(spec_of("random", X, pruner=pruner, direction=direction))
    for curve in curves:
        study.add(study.ask(), TrialState.COMPLETE, max(curve.values()), {CONSTRAINT: 0}, curve)
    study.add(study.ask(), TrialState.RUNNING)
    return study


def verdict(study: Study, reports: dict[int, float], number: int | None = None) -> Verdict:
    return judge(study.spec, study.snapshot, len(study.entries) - 1 if number is None else number, reports)


def rising(top: float, epochs: int = 10) -> dict[int, float]:
    return {epoch: top * (epoch + 1) / epochs for epoch in range(epochs)}


def test_without_a_pruner_everything_goes_on() -> None:
    assert verdict(study_with("none", rising(0.9)), {0: 0.0}) == Verdict(prune=False)


def test_the_median_stops_what_lags_behind_and_nothing_else() -> None:
    study = study_with({"name": "median", "n_startup_trials": 3}, rising(0.5), rising(0.6), rising(0.7))
    assert verdict(study, {0: 0.01, 1: 0.05}).prune
    assert not verdict(study, {0: 0.01, 1: 0.2}).prune
    assert not verdict(study_with({"name": "median", "n_startup_trials": 4}, *[rising(0.5)] * 3), {0: 0.0}).prune
    assert not verdict(study_with({"name": "median", "n_warmup_steps": 5}, *[rising(0.5)] * 6), {2: 0.0}).prune


def test_the_median_of_a_study_that_minimizes_stops_what_is_too_high() -> None:
    pruner = {"name": "median", "n_startup_trials": 2}
    study = study_with(pruner, {0: 1.0}, {0: 2.0}, {0: 3.0}, direction="minimize")
    assert verdict(study, {0: 2.5}).prune
    assert not verdict(study, {0: 0.5}).prune


def test_diverged_and_cancelled_trials_do_not_lower_the_median() -> None:
    study = study_with({"name": "median", "n_startup_trials": 2}, rising(0.5), rising(0.6))
    for _ in range(5):
        study.add(study.ask(), TrialState.COMPLETE, 0.05, {CONSTRAINT: 1}, dict.fromkeys(range(10), 0.05))
        study.add(study.ask(), TrialState.FAIL, None, {"whetstone:cancelled": True}, dict.fromkeys(range(10), 0.05))
    assert verdict(study, {3: 0.06}, number=2).prune


def test_stored_and_new_reports_are_judged_together() -> None:
    study = study_with({"name": "median", "n_startup_trials": 2}, rising(0.5), rising(0.6))
    running = study.entries.pop().trial
    running.intermediate_values = {0: 0.9}
    study.entries.append(entry_of(running).checked_by(study.spec.space))
    assert not verdict(study, {1: 0.01}).prune, "its best so far is above the median"
    assert running.intermediate_values == {0: 0.9}
    assert not verdict(study, {}).prune


def test_a_trial_without_reports_or_unknown_goes_on() -> None:
    study = study_with("median", rising(0.5))
    assert verdict(study, {}) == Verdict(prune=False)
    assert verdict(study, {0: 0.0}, number=99) == Verdict(prune=False)


def test_halving_promotes_the_best_of_each_rung_through_stored_attributes() -> None:
    study = Study(spec_of("random", X, pruner={"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}))
    outcomes = []
    for number in range(8):
        study.add(study.ask(), TrialState.RUNNING)
        made = verdict(study, {0: 0.1, 1: 0.1 * (number % 4)})
        outcomes.append(made.prune)
        assert made.trial_system_attrs["completed_rung_0"] == pytest.approx(0.1 * (number % 4))
        assert verdict(study, {0: 0.1, 1: 0.1 * (number % 4)}) == made, "asked again before it is stored: the same"
        study.entries[-1].plain.system_attrs.update(made.trial_system_attrs)
    assert outcomes[0] is False
    assert outcomes[3] is False
    assert outcomes[4] is True
    assert outcomes[7] is False


def test_the_rungs_of_a_cancelled_trial_do_not_compete() -> None:
    study = Study(spec_of("random", X, pruner={"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}))
    for mark in ({}, {"whetstone:cancelled": True}):
        study.entries.clear()
        study.add(study.ask(), TrialState.FAIL, None, {"completed_rung_0": 0.9, **mark}, {1: 0.9})
        study.add(study.ask(), TrialState.RUNNING)
        assert verdict(study, {1: 0.5}).prune == (not mark)


@pytest.mark.parametrize(("name", "resource"), [("successive_halving", 2), ("hyperband", 250)])
def test_an_automatic_resource_is_resolved_once_and_kept(name: str, resource: int) -> None:
    study = study_with(name, rising(0.9, 250))
    first = verdict(study, {0: 0.5, 1: 0.5})
    assert first.study_system_attrs == {RESOURCE: resource}
    study.attributes |= first.study_system_attrs
    study.add(study.ask(), TrialState.COMPLETE, 0.9, {CONSTRAINT: 0}, rising(0.9, 1000))
    assert verdict(study, {0: 0.5}, number=1).study_system_attrs == {}


def test_an_automatic_resource_waits_for_a_complete_trial() -> None:
    for name in ("successive_halving", "hyperband"):
        assert verdict(study_with(name), {0: 0.0, 50: 0.0}) == Verdict(prune=False)


def test_hyperband_stops_laggards_and_keeps_each_trial_in_its_bracket() -> None:
    pruner = {"name": "hyperband", "min_resource": 1, "max_resource": 27, "reduction_factor": 3}
    study = Study(spec_of("random", X, pruner=pruner))
    pruned = []
    for number in range(40):
        study.add(study.ask(), TrialState.RUNNING)
        quality = (number * 7 % 40) / 40
        for epoch in (1, 3, 9, 27):
            made = verdict(study, dict.fromkeys(range(epoch + 1), quality))
            study.entries[-1].plain.system_attrs.update(made.trial_system_attrs)
            if made.prune:
                pruned.append(quality)
                break
    assert 10 < len(pruned) < 40
    assert sum(pruned) / len(pruned) < 0.5
    assert max(pruned) < 1.0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_value_that_is_not_a_number_is_stopped_and_not_a_crash() -> None:
    study = study_with({"name": "median", "n_startup_trials": 1}, rising(0.5), rising(0.6))
    assert verdict(study, {0: float("nan")}).prune
