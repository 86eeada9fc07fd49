"""Every sampler learns, survives every kind of trial, and says the same again after a restart."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.history import CONSTRAINT, Entry, Snapshot, View, entry_of
from hpo.samplers import Session, shown
from hpo.spec import StudySpec, parse
from hpo.suggest import Suggestion, choose

LABELS = ["conv1", "conv2", "fc"]
TIED = {"convs": LABELS[:2], "fc": ["fc"]}
SPACE: list[dict[str, Any]] = [
    {"name": "eta", "type": "float", "low": 1e-4, "high": 0.1, "log": True, "labels": LABELS},
    {"name": "mu", "type": "float", "low": 0, "high": 1, "labels": LABELS},
    {"name": "lambda", "type": "float", "low": 0, "high": 0.1, "labels": LABELS, "tied": TIED},
    {"name": "batch", "type": "integer", "low": 32, "high": 256, "step": 32},
    {"name": "init", "type": "categorical", "choices": ["he", "paper"]},
    {"name": "fixed", "type": "integer", "low": 3, "high": 3},
]  # fmt: skip
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the GP sampler needs torch")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
ALL = ["tpe", pytest.param("gp", marks=needs_torch), "cmaes", "random", "qmc", pytest.param("auto", marks=needs_torch)]


def spec_of(sampler: Any, space: list[dict[str, Any]] = SPACE, **changes: Any) -> StudySpec:
    return parse({"name": "s", "workload": "external", "seed": 5, "sampler": sampler, "space": space, **changes}, {})


class Study:
    """A study played through in memory, storing what a coordinator would store."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        self.entries: list[Entry] = []
        self.attributes: dict[str, Any] = {}

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.spec.name, StudyDirection[self.spec.direction.upper()], tuple(self.entries), dict(self.attributes)
        )

    def ask(self) -> Suggestion:
        return choose(self.spec, self.snapshot, len(self.entries))

    def add(
        self,
        made: Suggestion,
        state: TrialState,
        value: float | None = None,
        marks: dict[str, Any] | None = None,
        curve: dict[int, float] | None = None,
    ) -> Entry:
        # Attributes pass through JSON, as they do in PostgreSQL.
        self.attributes |= json.loads(json.dumps(made.study_system_attrs))
        trial = FrozenTrial(
            number=len(self.entries),
            state=state,
            value=value,
            datetime_start=None,
            datetime_complete=None,
            params=dict(made.params),
            distributions=made.distributions,
            user_attrs={},
            system_attrs={**json.loads(json.dumps(made.trial_system_attrs)), **(marks or {})},
            intermediate_values=curve or {},
            trial_id=100 + len(self.entries),
        )
        self.entries.append(entry_of(trial).checked_by(self.spec.space))
        return self.entries[-1]

    def play(self, objective: Callable[[Any], float], trials: int) -> float:
        values = []
        for _ in range(trials):
            made = self.ask()
            values.append(objective(made.params))
            self.add(made, TrialState.COMPLETE, values[-1], {CONSTRAINT: 0})
        return max(values)

    def play_roughly(self, trials: int) -> None:
        """All that may happen to trials: complete, infeasible, pruned, failed, cancelled, waiting again, running."""
        for number in range(len(self.entries), trials):
            made, kind = self.ask(), number % 10
            value = bowl(made.params)
            if kind == 1:
                self.add(made, TrialState.COMPLETE, -9.0, {CONSTRAINT: 1})
            elif kind == 3:
                self.add(made, TrialState.PRUNED, None, {}, {0: value, 1: value})
            elif kind == 5:
                self.add(made, TrialState.FAIL, None, {"whetstone:cancelled": True} if number % 20 == 5 else {})
            elif kind == 7:
                self.add(made, TrialState.RUNNING, None, {}, {0: value})
            elif kind == 8:
                self.add(made, TrialState.WAITING)
            elif kind == 9:  # from stock Optuna, without a mark
                self.add(made, TrialState.COMPLETE, value)
            else:
                self.add(made, TrialState.COMPLETE, value, {CONSTRAINT: 0})


def bowl(params: Any) -> float:
    """Best (0) at eta .01, mu .8, lambda .02, batch 128, init he."""
    loss = sum(
        (math.log10(params[f"eta[{label}]"]) + 2) ** 2 + 4 * (params[f"mu[{label}]"] - 0.8) ** 2 for label in LABELS
    )
    loss += sum((10 * params[f"lambda[{label}]"] - 0.2) ** 2 for label in LABELS)
    return -loss - ((params["batch"] - 128) / 100) ** 2 - (params["init"] != "he")


@pytest.mark.parametrize("sampler", ALL)
def test_sixty_asks_among_trials_of_every_kind_give_valid_points_never_twice(sampler: str) -> None:
    # A Gaussian process takes its time: most of the asks come before it begins.
    study = Study(spec_of({"name": "gp", "n_startup_trials": 30} if sampler == "gp" else sampler))
    study.play_roughly(60)
    space = study.spec.space
    keys = [entry.key for entry in study.entries]
    assert None not in keys
    assert len(set(keys)) == 60
    for entry in study.entries:
        assert space.flatten(space.nest(entry.trial.params)) == entry.trial.params
        assert entry.trial.params["fixed"] == 3
        assert entry.trial.params["lambda[conv1]"] == entry.trial.params["lambda[conv2]"]


@pytest.mark.parametrize("sampler", ALL)
def test_a_coordinator_restarted_at_any_trial_suggests_the_same_point(sampler: str) -> None:
    study = Study(spec_of(sampler))
    study.play_roughly(18)
    first = study.ask()
    again = Study(parse(_document(sampler), {}))
    again.entries, again.attributes = list(study.entries), dict(study.attributes)
    assert again.ask() == first
    study.add(first, TrialState.RUNNING)
    second = study.ask()
    assert study.spec.space.key(second.params) != study.spec.space.key(first.params)
    other = Study(dataclasses.replace(study.spec, seed=6))
    other.entries, other.attributes = list(again.entries), dict(again.attributes)
    assert other.ask().params != first.params


def _document(sampler: str) -> dict[str, Any]:
    return {"name": "s", "workload": "external", "seed": 5, "sampler": sampler, "space": SPACE}


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=needs_torch), "cmaes"])
def test_samplers_that_learn_beat_chance(sampler: str) -> None:
    seeds, trials = ((1,), 35) if sampler == "gp" else ((1, 2, 3), 120)
    learnt = [Study(spec_of(sampler, seed=seed)).play(bowl, trials) for seed in seeds]
    chance = [Study(spec_of("random", seed=seed)).play(bowl, trials) for seed in seeds]
    assert statistics.median(learnt) > statistics.median(chance) + 0.3


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=needs_torch)])
def test_a_region_that_diverges_is_learnt_to_be_avoided(sampler: str) -> None:
    space = [
        {"name": "eta", "type": "float", "low": 0, "high": 1},
        {"name": "mu", "type": "float", "low": 0, "high": 1},
    ]
    study = Study(spec_of(sampler, space))
    for _ in range(30):
        made = study.ask()
        bad = made.params["eta"] > 0.4
        study.add(made, TrialState.COMPLETE, 0.05 if bad else made.params["mu"], {CONSTRAINT: int(bad)})
    late = [entry.infeasible for entry in study.entries[15:]]
    assert sum(late) <= 5, "chance would give 9"


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=needs_torch)])
def test_running_and_waiting_trials_weigh_in(sampler: str) -> None:
    space = [{"name": "x", "type": "float", "low": 0, "high": 1}, {"name": "y", "type": "float", "low": 0, "high": 1}]
    study = Study(spec_of(sampler, space))
    for _ in range(20):
        made = study.ask()
        study.add(made, TrialState.COMPLETE, -((made.params["x"] - 0.5) ** 2) - (made.params["y"] - 0.5) ** 2)
    alone = study.ask()
    study.entries.append(entry_of(_moved(study.add(alone, TrialState.WAITING).trial, 21)).checked_by(study.spec.space))
    del study.entries[20]
    beside = choose(study.spec, study.snapshot, 20)
    assert beside.params != alone.params
    states = [trial.state for trial in shown(study.spec, study.entries)]
    assert states.count(TrialState.RUNNING) == 1, "what waits between two attempts is going to run"


def _moved(trial: FrozenTrial, number: int) -> FrozenTrial:
    trial.number = number
    return trial


def test_cmaes_moves_on_through_the_attributes_alone() -> None:
    study = Study(spec_of("cmaes"))
    study.play(bowl, 80)
    generations = [entry.trial.system_attrs.get("cma:generation") for entry in study.entries]
    assert generations[0] is None, "the first trial is drawn at random"
    assert max(generation for generation in generations if generation is not None) >= 5
    assert bowl(study.ask().params) > statistics.median(bowl(entry.trial.params) for entry in study.entries[:10])
    for entry in study.entries:
        del entry.trial.system_attrs["constraints:infeasible"]
        for key in [key for key in entry.trial.system_attrs if key.startswith("cma:")]:
            del entry.trial.system_attrs[key]
    study.entries = [entry_of(entry.trial).checked_by(study.spec.space) for entry in study.entries]
    assert study.ask().trial_system_attrs["cma:generation"] == 0, "without them it begins anew"


class Harm:
    """Whoever unpickles this makes the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_what_stands_in_the_database_as_the_state_of_cmaes_runs_no_code(tmp_path: Path) -> None:
    study = Study(spec_of("cmaes"))
    study.play(bowl, 3)
    marks = study.entries[-1].trial.system_attrs
    for key in [key for key in marks if key.startswith("cma:optimizer")]:
        del marks[key]
    marks["cma:optimizer:0"] = pickle.dumps(Harm(tmp_path / "harm")).hex()
    study.entries[-1] = entry_of(study.entries[-1].trial).checked_by(study.spec.space)
    with pytest.raises(pickle.UnpicklingError, match="none: pathlib"):
        study.ask()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"use_separable_cma": True},
        {"with_margin": True},
        {"lr_adapt": True},
        {"popsize": 6},
        {"consider_pruned_trials": True},
    ],
)
def test_every_variant_of_cmaes_runs(options: dict[str, Any]) -> None:
    study = Study(spec_of({"name": "cmaes", **options}))
    study.play_roughly(30)


def test_a_sobol_sequence_is_one_sequence_for_the_whole_study() -> None:
    space = [{"name": "x", "type": "float", "low": 0, "high": 1}, {"name": "y", "type": "float", "low": 0, "high": 1}]
    study = Study(spec_of("qmc", space))
    study.play(lambda params: 0.0, 64)
    cells = {(int(e.trial.params["x"] * 8), int(e.trial.params["y"] * 8)) for e in study.entries}
    assert len(cells) == 64, "64 points of a scrambled Sobol sequence fill an 8 x 8 grid, one a cell"
    (place,) = study.attributes.values()
    assert place == 63


def test_gp_looks_at_the_best_the_newest_and_the_running_only() -> None:
    spec = spec_of({"name": "gp", "max_trials": 10})
    study = Study(dataclasses.replace(spec, sampler=spec_of("random").sampler))
    for number in range(100):
        study.add(study.ask(), TrialState.COMPLETE, float(-number), {CONSTRAINT: int(number == 0)})
    study.add(study.ask(), TrialState.RUNNING)
    assert [trial.number for trial in shown(spec, study.entries)] == [1, 2, 3, 4, 5, 95, 96, 97, 98, 99, 100]


def test_constraints_are_shown_to_those_who_heed_them_once_there_is_an_infeasible_trial() -> None:
    study = Study(spec_of("tpe"))
    study.add(study.ask(), TrialState.COMPLETE, 0.5, {CONSTRAINT: 0})
    study.add(study.ask(), TrialState.COMPLETE, 0.6)
    assert [trial.constraints for trial in shown(study.spec, study.entries)] == [{}, {}]
    study.add(study.ask(), TrialState.COMPLETE, 0.1, {CONSTRAINT: 1})
    study.add(study.ask(), TrialState.COMPLETE, 0.1, {"constraints:memory": 3.0, "constraints:time": -1.0})
    study.add(study.ask(), TrialState.PRUNED, None, {}, {0: 0.1})
    seen = [trial.constraints for trial in shown(study.spec, study.entries)]
    assert seen == [{"infeasible": 0}, {"infeasible": 0}, {"infeasible": 1}, {"infeasible": 1}, {}]
    for sampler in ("cmaes", "random", "qmc"):
        assert not any(trial.constraints for trial in shown(spec_of(sampler), study.entries))


def test_points_outside_of_the_space_and_ended_trials_are_never_shown() -> None:
    study = Study(spec_of("tpe"))
    made = study.ask()
    study.add(made, TrialState.FAIL, None, {"whetstone:cancelled": True})
    foreign = Suggestion(
        {"x": 1.0, "init": "zero"}, {}, {"x": FloatDistribution(0, 2), "init": CategoricalDistribution(["zero"])}
    )
    study.add(foreign, TrialState.COMPLETE, 9.0)
    outside = dataclasses.replace(made, params={**made.params, "eta[fc]": 5.0})
    study.add(outside, TrialState.COMPLETE, 9.0)
    assert shown(study.spec, study.entries) == []
    assert choose(study.spec, study.snapshot, 3).params["eta[fc]"] <= 0.1


def test_a_view_takes_no_writes_but_attributes_of_the_pending_trial_and_the_study() -> None:
    study = Study(spec_of("random"))
    other = study.add(study.ask(), TrialState.RUNNING).trial
    session = Session(study.spec, study.snapshot, 1, 5, {})
    view = session._view
    assert isinstance(view, View)
    for write in (
        lambda: view.set_trial_system_attr(other._trial_id, "a", 1),
        lambda: view.create_new_trial(0),
        lambda: view.set_trial_state_values(-1, TrialState.FAIL),
        lambda: view.set_trial_user_attr(-1, "a", 1),
        lambda: view.delete_study(0),
    ):
        with pytest.raises(RuntimeError):
            write()
    view.set_study_system_attr(0, "b", 2)
    assert view.get_study_system_attrs(0) == {"b": 2}
    assert study.attributes == {}


def test_nothing_is_printed_while_suggesting() -> None:
    """Neither Optuna's log lines nor its experimental warnings reach the server's output."""
    code = """
from tests.unit.test_samplers import Study, spec_of
for sampler in ("tpe", "cmaes", "qmc", "random", {"name": "cmaes", "use_separable_cma": True}):
    Study(spec_of(sampler)).play_roughly(20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
