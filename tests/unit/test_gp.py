"""The Gaussian process is Optuna's, looks at fewer candidates, and is not shown the cliff of what diverged."""

from __future__ import annotations

import dataclasses

import pytest
from optuna.samplers import GPSampler
from optuna.trial import TrialState

from hpo.gp import LeanGPSampler
from hpo.history import CONSTRAINT
from hpo.samplers import shown
from tests.unit.test_samplers import Study, needs_torch, spec_of

SPACE = [{"name": name, "type": "float", "low": 0, "high": 1} for name in ("x", "y")]


@needs_torch
def test_the_numbers_that_are_lowered_are_those_that_optuna_reads() -> None:
    lowered = {
        name for name, value in vars(LeanGPSampler(seed=1)).items() if vars(GPSampler(seed=1)).get(name) != value
    }
    assert {"_n_preliminary_samples", "_n_local_search", "_n_qmc_samples_qei"} <= lowered
    assert set(vars(LeanGPSampler(seed=1))) == set(vars(GPSampler(seed=1))), "a name that Optuna does not know"


@pytest.mark.parametrize(("direction", "worst"), [("maximize", 0.4), ("minimize", 0.7)])
def test_an_infeasible_trial_is_shown_at_the_worst_value_of_a_feasible_one(direction: str, worst: float) -> None:
    study = Study(spec_of("random", SPACE, direction=direction))
    for value, infeasible in ((0.7, 0), (0.05, 1), (0.4, 0), (9.0, 1)):
        study.add(study.ask(), TrialState.COMPLETE, value, {CONSTRAINT: infeasible})
    study.add(study.ask(), TrialState.RUNNING)
    spec = dataclasses.replace(study.spec, sampler=spec_of("gp", SPACE).sampler)
    trials = shown(spec, study.entries)
    assert [trial.value for trial in trials] == [0.7, worst, 0.4, worst, None]
    assert not any(trial.constraints for trial in trials)
    assert [entry.value for entry in study.entries] == [0.7, 0.05, 0.4, 9.0, None], "what is stored stays"


def test_where_nothing_was_feasible_values_stay_what_they_are() -> None:
    study = Study(spec_of("random", SPACE))
    study.add(study.ask(), TrialState.COMPLETE, 0.05, {CONSTRAINT: 1})
    spec = dataclasses.replace(study.spec, sampler=spec_of("gp", SPACE).sampler)
    assert [trial.value for trial in shown(spec, study.entries)] == [0.05]
