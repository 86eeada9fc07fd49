"""`auto` picks a sampler that this machine has, says why, and does not change its mind back."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo import auto
from hpo.auto import pick
from hpo.history import CONSTRAINT
from hpo.spec import StudySpec, cannot_sample, parse
from tests.unit.test_samplers import Study, needs_torch, spec_of


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"name": f"x{place}", "type": "float", "low": 0, "high": 1} for place in range(count)]


CHOICE = {"name": "init", "type": "categorical", "choices": ["he", "paper"]}


class Counted(Study):
    """A study of random points, of which each is told as it comes."""

    def __init__(self, space: list[dict[str, Any]]) -> None:
        super().__init__(spec_of("random", space))
        self.auto: StudySpec = spec_of("auto", space)

    def told(self, count: int, *, feasible: bool = True) -> Counted:
        for _ in range(count):
            self.add(self.ask(), TrialState.COMPLETE, 1.0, {CONSTRAINT: 0.0 if feasible else 1.0})
        return self

    @property
    def name(self) -> str:
        return pick(self.auto, self.snapshot).choice.name


@needs_torch
def test_many_numbers_begin_with_cmaes_and_go_on_with_a_gaussian_process() -> None:
    study = Counted(numbers(18))
    names = [study.told(1).name for _ in range(30)]
    assert names == ["cmaes"] * (auto.START_TRIALS - 1) + ["gp"] * (31 - auto.START_TRIALS)


@needs_torch
def test_a_gaussian_process_waits_for_points_that_were_feasible_but_not_for_ever() -> None:
    study = Counted(numbers(12)).told(auto.START_TRIALS, feasible=False)
    assert study.name == "cmaes"
    assert study.told(auto.START_FEASIBLE).name == "gp"
    assert Counted(numbers(12)).told(auto.START_LONGEST, feasible=False).name == "gp"


@needs_torch
def test_what_is_seen_changes_a_pick_only_forward() -> None:
    order = {"cmaes": 0, "gp": 1, "tpe": 2}
    study, stages = Counted(numbers(10)), []
    for number in range(auto.GP_TRIALS + 5):
        study.told(1, feasible=number % 3 == 0)
        if number < 80 or number > auto.GP_TRIALS - 5:
            stages.append(order[study.name])
    assert stages == sorted(stages)
    assert stages[-1] == 2


@needs_torch
def test_trials_that_failed_or_still_run_teach_nothing() -> None:
    study = Counted(numbers(12)).told(auto.START_TRIALS - 1)
    study.add(study.ask(), TrialState.FAIL)
    study.add(study.ask(), TrialState.RUNNING)
    assert study.name == "cmaes"
    study.add(study.ask(), TrialState.PRUNED, 0.5)
    assert study.name == "gp"


@needs_torch
@pytest.mark.parametrize(
    ("space", "name"),
    [
        ([CHOICE], "tpe"),
        (numbers(2), "gp"),
        ([*numbers(1), CHOICE], "gp"),
        (numbers(4), "tpe"),
        (numbers(9), "tpe"),
        ([*numbers(10), CHOICE], "cmaes"),
        (numbers(41), "cmaes"),
        ([*numbers(40), CHOICE], "tpe"),
        ([{**numbers(1)[0], "high": 0}], "tpe"),
    ],
)
def test_the_space_alone_decides_how_a_study_begins(space: list[dict[str, Any]], name: str) -> None:
    assert Counted(space).name == name


def test_a_tied_vector_counts_as_the_dimensions_that_vary() -> None:
    tied = [{**numbers(1)[0], "labels": [f"l{place}" for place in range(12)], "tied": True}]
    untied = [{**tied[0], "tied": False}]
    assert Counted(untied).name == "cmaes"
    assert Counted(tied).name != "cmaes"


@pytest.mark.parametrize("space", [numbers(2), numbers(6), numbers(12), numbers(50), [*numbers(12), CHOICE], [CHOICE]])
@pytest.mark.parametrize("told", [0, 25, 400])
@pytest.mark.parametrize("torch", [True, False])
def test_a_pick_can_be_sampled_here_and_its_reason_is_a_sentence(
    space: list[dict[str, Any]], told: int, torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(auto, "_has_torch", lambda: torch)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (object() if torch else None) if name == "torch" else found(name)
    )
    study = Counted(space)
    study.told(1)
    study.entries *= told
    picked = pick(study.auto, study.snapshot)
    assert cannot_sample(dataclasses.replace(study.auto, sampler=picked.choice)) == []
    again = parse({"name": "s", "workload": "external", "space": space, "sampler": picked.choice.document()}, {})
    assert again.sampler == picked.choice, "with all its options"
    assert 20 < len(picked.why) < 160
    assert "\n" not in picked.why


@needs_torch
def test_a_study_asks_the_sampler_that_was_picked() -> None:
    study = Study(spec_of("auto", numbers(12)))
    first = study.ask()
    assert first.pick is not None
    assert first.pick.choice.name == "cmaes"
    for _ in range(auto.START_TRIALS):
        study.add(study.ask(), TrialState.COMPLETE, 1.0)
    later = study.ask()
    assert later.pick is not None
    assert later.pick.choice.name == "gp"
    plain = Study(spec_of("gp", numbers(12)))
    plain.entries = study.entries
    assert plain.ask().params == later.params
