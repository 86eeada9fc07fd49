"""Parameters fixed and released while a study runs, against a real PostgreSQL."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from hpo.errors import Fault, Invalid
from tests.integration.leases_harness import (
    Ball,
    coordinator,
    must_claim,
    point,
    study,
)


def test_parameters_are_fixed_and_released_while_a_study_runs(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(fixed={"x": 0.25}))
    assert made.fixed == {"x": 0.25} == made.spec["fixed"]
    changed = desk.patch_study(made.study, {"fixed": {"eta": {"fc": 0.01}}, "notes": "the last layer stays"})
    assert changed.fixed == {"x": 0.25, "eta": {"fc": 0.01}}, "what a change does not name stays fixed"
    released = desk.patch_study(made.study, {"fixed": {"x": None}})
    assert (released.fixed, released.spec["fixed"]) == ({"eta": {"fc": 0.01}},) * 2
    assert desk.export(made.study)["study"]["fixed"] == {"eta": {"fc": 0.01}}
    assert desk.list_studies().items[0].fixed == {"eta": {"fc": 0.01}}
    assert desk.patch_study(made.study, {"fixed": None}).fixed == {}


def test_what_is_fixed_must_leave_a_point_that_can_be_trained(engine: sa.Engine) -> None:
    desk = coordinator(engine, ball=Ball(limit=0.5))
    made = desk.create_study(study(fixed={"eta": 0.01}))
    with pytest.raises(Invalid) as partly:
        desk.patch_study(made.study, {"fixed": {"eta": None, "x": 0.75}})
    assert "x must be below 0.5" in partly.value.faults[0].fault
    with pytest.raises(Invalid) as wholly:
        desk.patch_study(made.study, {"fixed": {"x": 0.75}, "notes": "unchanged"})
    assert wholly.value.faults[0] == Fault("fixed", "this point can never be trained: x must be below 0.5")
    view = desk.get_study(made.study)
    assert (view.fixed, view.notes) == ({"eta": {"conv": 0.01, "fc": 0.01}}, "")


def test_what_is_fixed_counts_for_the_next_suggestion_and_no_earlier_one(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    made = desk.create_study(study(points=[{"x": 0.9}]))
    desk.patch_study(made.study, {"fixed": {"x": 0.25, "eta": {"fc": 0.01}}})
    queued = must_claim(desk)
    assert (queued.params["x"], queued.params["eta"]["fc"]) == (0.9, 0.01), "a queued point's own values win"  # type: ignore[index]
    first, second = must_claim(desk), must_claim(other)
    for lease in (first, second):
        assert lease.params["x"] == 0.25
        assert lease.params["eta"]["fc"] == 0.01  # type: ignore[index]
    assert first.params["eta"] != second.params["eta"], "the sampler chooses the others"
    other.patch_study(made.study, {"fixed": {"x": 0.75}})
    assert must_claim(desk).params["x"] == 0.75, "in every process, at once"
    desk.patch_study(made.study, {"fixed": None})
    free = must_claim(other)
    assert free.params["x"] != 0.75
    assert desk.get_trial(made.study, first.trial).params["x"] == 0.25


def test_a_group_is_fixed_by_one_of_its_labels(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    tied = {"name": "eta", "type": "float", "low": 0.0, "high": 1.0, "labels": ["conv", "fc"], "tied": True}
    made = desk.create_study(study(space=[tied, {"name": "x", "type": "float", "low": 0.0, "high": 1.0}]))
    desk.patch_study(made.study, {"fixed": {"eta": {"fc": 0.5}}})
    assert must_claim(desk).params["eta"] == {"conv": 0.5, "fc": 0.5}


def test_with_everything_fixed_each_trial_measures_the_same_point(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study(fixed=point(0.5)))
    assert [must_claim(desk).params for _ in range(3)] == [point(0.5)] * 3
