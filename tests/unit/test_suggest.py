"""What is suggested can be trained, was not tried before, and keeps what was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.board import Board
from hpo.errors import Conflict, Fault
from hpo.history import entry_of
from hpo.suggest import NothingFeasible, choose
from tests.unit.test_samplers import ALL, SPACE, Study, bowl, spec_of

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SMALL: list[dict[str, Any]] = [
    {"name": "a", "type": "integer", "low": 0, "high": 3},
    {"name": "b", "type": "categorical", "choices": ["x", True, 1.5]},
    {"name": "c", "type": "float", "low": 0, "high": 0.2, "step": 0.1, "labels": ["p", "q"], "tied": True},
]


class Picky:
    """A workload that trains only points with `a` at most `most`."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.asked = 0

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        return ()

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        self.asked += 1
        a = point.get("a", point.get("x"))
        return None if a <= self.most else "no pixels are left"


@pytest.mark.parametrize("sampler", ALL)
def test_a_small_space_is_tried_out_to_its_last_point_before_any_comes_twice(sampler: str) -> None:
    study = Study(spec_of(sampler, SMALL))
    assert study.spec.space.size == 36
    for number in range(36):
        state = TrialState.RUNNING if number % 6 == 0 else TrialState.COMPLETE
        study.add(study.ask(), state, None if state == TrialState.RUNNING else float(number))
    assert len({entry.key for entry in study.entries}) == 36
    assert study.spec.space.key(study.ask().params) in {entry.key for entry in study.entries}


@pytest.mark.parametrize("sampler", ALL)
def test_a_point_that_can_never_be_trained_is_never_suggested(sampler: str) -> None:
    space = [{"name": "x", "type": "float", "low": 0, "high": 1}, {"name": "y", "type": "float", "low": 0, "high": 1}]
    study, picky = Study(spec_of(sampler, space)), Picky(0.03)
    for _ in range(13):
        made = choose(study.spec, study.snapshot, len(study.entries), workload=picky)
        assert made.params["x"] <= 0.03
        study.add(made, TrialState.COMPLETE, float(made.params["x"]))


def test_the_last_feasible_point_of_a_small_space_is_found() -> None:
    study = Study(spec_of("tpe", SMALL))
    points = [choose(study.spec, study.snapshot, n, fixed=study.spec.space.point(n)) for n in range(36)]
    left = next(made for made in points if made.params["a"] == 0)
    for made in points:
        if made is not left:
            study.add(made, TrialState.COMPLETE, 1.0)
    found = choose(study.spec, study.snapshot, 35, workload=Picky(0))
    assert found.params == left.params


def test_an_impossible_space_is_said_to_be_one_with_the_reason_and_in_bounded_time() -> None:
    study, picky = Study(spec_of("tpe", SPACE[:1] + SMALL)), Picky(-1)
    with pytest.raises(NothingFeasible, match="no pixels are left"):
        choose(study.spec, study.snapshot, 0, workload=picky)
    assert picky.asked < 2_000
    assert issubclass(NothingFeasible, Conflict)


@pytest.mark.parametrize("sampler", ALL)
def test_a_partial_point_is_completed_and_what_was_given_is_kept(sampler: str) -> None:
    study = Study(spec_of(sampler))
    study.play_roughly(18)
    given = {"eta[conv1]": 0.02, "lambda[conv2]": 0.05, "init": "paper"}
    made = choose(study.spec, study.snapshot, 18, fixed=given)
    assert made.params.items() >= given.items()
    assert made.params["lambda[conv1]"] == 0.05, "a tied label speaks for its group"
    assert list(made.params) == list(study.spec.space.names)


def test_a_complete_point_is_taken_as_it_is_even_when_it_was_tried() -> None:
    study = Study(spec_of("tpe"))
    made = study.ask()
    study.add(made, TrialState.COMPLETE, 1.0)
    again = choose(study.spec, study.snapshot, 1, fixed=made.params)
    assert again.params == made.params
    assert again.trial_system_attrs == {}
    impossible = Study(spec_of("tpe", SMALL))
    with pytest.raises(NothingFeasible, match="no pixels are left"):
        choose(impossible.spec, impossible.snapshot, 0, fixed=impossible.spec.space.point(3), workload=Picky(0))


def test_what_stock_optuna_enqueued_is_taken_as_far_as_the_space_can_hold_it() -> None:
    study = Study(spec_of("tpe"))
    given: dict[str, Any] = {"sigma": 1.0, "eta[fc]": 7.0, "init": "zero", "batch": "many", "mu[fc]": 0.5}
    given |= {"lambda[conv1]": 0.01, "lambda[conv2]": 0.02}
    made = choose(study.spec, study.snapshot, 0, fixed=given)
    assert made.params["eta[fc]"] == 0.1
    assert made.params["mu[fc]"] == 0.5
    assert made.params["lambda[conv1]"] == made.params["lambda[conv2]"] == 0.01
    untied = {**made.params, "lambda[conv2]": 0.09}
    assert choose(study.spec, study.snapshot, 0, fixed=untied).params == made.params
    assert study.spec.space.key(made.params) is not None


def test_a_queued_point_that_waits_is_not_suggested_as_well() -> None:
    space = [{"name": "b", "type": "categorical", "choices": ["x", "y"]}]
    study = Study(spec_of("random", space))
    waiting = study.ask()
    rest = study.add(waiting, TrialState.WAITING, None, {"fixed_params": dict(waiting.params)})
    rest.trial.params.clear()
    study.entries = [entry_of(rest.trial).checked_by(study.spec.space)]
    assert study.entries[0].key is None
    assert all(choose(study.spec, study.snapshot, n).params != waiting.params for n in range(1, 8))


def test_a_cancelled_point_may_be_suggested_again_and_a_failed_one_not() -> None:
    space = [{"name": "b", "type": "categorical", "choices": ["x", "y"]}]
    study = Study(spec_of("random", space))
    x = choose(study.spec, study.snapshot, 0, fixed={"b": "x"})
    study.add(x, TrialState.FAIL)
    assert study.ask().params == {"b": "y"}
    study.add(study.ask(), TrialState.FAIL, None, {"whetstone:cancelled": True})
    assert all(choose(study.spec, study.snapshot, number).params == {"b": "y"} for number in range(2, 12))


def test_what_is_stored_is_what_optuna_reads_back() -> None:
    study = Study(spec_of("tpe"))
    study.play(bowl, 12)
    made = study.ask()
    for name, distribution in made.distributions.items():
        assert distribution.to_external_repr(made.internal[name]) == made.params[name]
        assert distribution == study.spec.space.distributions[name]
    assert type(made.params["batch"]) is int
    assert all(type(value) is float for value in made.internal.values())
    assert not any(key.startswith(("tpe:", "gp:")) for key in made.trial_system_attrs)


def test_what_was_tried_follows_corrections_and_trials_that_are_gone() -> None:
    study = Study(spec_of("random", SMALL))
    space = study.spec.space
    for place in range(4):
        study.add(choose(study.spec, study.snapshot, place, fixed=space.point(place)), TrialState.COMPLETE, 1.0)
    keys = [space.key(space.point(place)) for place in range(5)]
    board = Board()
    board.update(study.snapshot.entries)
    assert [board.tried(key, None) for key in keys] == [True, True, True, True, False]
    assert not board.tried(keys[1], but=study.entries[1])
    moved = choose(study.spec, study.snapshot, 2, fixed=space.point(4))
    corrected = Study(study.spec)
    corrected.entries = study.entries[:1]
    corrected.add(moved, TrialState.COMPLETE, 1.0)
    board.update((*study.entries[:1], corrected.entries[1], *study.entries[2:]))
    assert [board.tried(key, None) for key in keys] == [True, False, True, True, True]
    board.update(study.snapshot.entries[:1])
    assert [board.tried(key, None) for key in keys] == [True, False, False, False, False]
