"""A point that ran out of memory, and any larger one, is kept from devices as small; larger devices get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from hpo.errors import Fault
from hpo.history import CONSTRAINT, entry_of
from hpo.protocol import Sized
from hpo.room import OUT_OF_MEMORY, Marks
from hpo.suggest import NothingFeasible, TooSmall, choose
from tests.unit.test_samplers import Study, spec_of

GIB = 2**30
SPACE: list[dict[str, Any]] = [{"name": "batch", "type": "integer", "low": 1, "high": 12}]


class Plain:
    """A workload that cannot say how large a point is."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        return ()

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        return None


class Measured(Plain):
    def footprint(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
        return float(point["batch"]) ** 2


def ran_out(study: Study, batch: int, memory_bytes: Any) -> None:
    made = choose(study.spec, study.snapshot, len(study.entries), fixed={"batch": batch})
    study.add(made, TrialState.COMPLETE, 0.05, {CONSTRAINT: 1, OUT_OF_MEMORY: memory_bytes})


def left(study: Study, workload: Plain, memory_bytes: int | None) -> set[int]:
    """What such a device is given until there is nothing more for it."""
    fresh, found = Study(study.spec), set()
    fresh.entries = list(study.entries)
    for _ in range(12):
        number = len(fresh.entries)
        try:
            made = choose(fresh.spec, fresh.snapshot, number, workload=workload, memory_bytes=memory_bytes)
        except TooSmall:
            break
        found.add(made.params["batch"])
        fresh.add(made, TrialState.RUNNING)
    return {int(batch) for batch in found}


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random", "qmc"])
def test_what_is_as_large_as_the_smallest_that_ran_out_goes_to_larger_devices_only(sampler: str) -> None:
    study = Study(spec_of(sampler, SPACE))
    ran_out(study, 8, 16 * GIB)
    ran_out(study, 5, 8 * GIB)
    assert left(study, Measured(), 8 * GIB) == {1, 2, 3, 4}
    assert left(study, Measured(), 4 * GIB) == {1, 2, 3, 4}
    assert left(study, Measured(), 12 * GIB) == {1, 2, 3, 4, 6, 7}
    assert left(study, Measured(), 16 * GIB) == {1, 2, 3, 4, 6, 7}
    assert left(study, Measured(), 24 * GIB) >= {6, 7, 9, 10, 11, 12}
    assert left(study, Measured(), None) >= {6, 7, 9, 10, 11, 12}


def test_a_workload_that_knows_no_sizes_refuses_the_same_point_alone() -> None:
    study = Study(spec_of("random", SPACE))
    ran_out(study, 5, 8 * GIB)
    assert left(study, Plain(), 8 * GIB) == {1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12}
    assert not isinstance(Plain(), Sized)
    with pytest.raises(TooSmall):
        choose(study.spec, study.snapshot, 1, fixed={"batch": 5}, memory_bytes=8 * GIB)
    again = choose(study.spec, study.snapshot, 1, fixed={"batch": 5}, memory_bytes=9 * GIB)
    assert again.params == {"batch": 5}


@pytest.mark.parametrize("nonsense", [0, None, True, "8", -4, 2.5])
def test_a_mark_that_says_no_size_is_passed_over(nonsense: Any) -> None:
    study = Study(spec_of("random", SPACE))
    ran_out(study, 5, nonsense)
    assert left(study, Measured(), 1) >= {6, 7, 8, 9, 10, 11, 12}


def test_a_device_too_small_for_all_that_is_left_is_told_so_and_nobody_else_suffers() -> None:
    study = Study(spec_of("tpe", SPACE))
    ran_out(study, 1, 2 * GIB)
    with pytest.raises(TooSmall, match=r"memory of this device \(2\.0 GiB\) is too small .* more memory is needed"):
        choose(study.spec, study.snapshot, 1, workload=Measured(), memory_bytes=2 * GIB)
    assert issubclass(TooSmall, NothingFeasible)
    assert choose(study.spec, study.snapshot, 1, workload=Measured(), memory_bytes=3 * GIB).params["batch"] > 1


def test_a_continuous_space_is_searched_for_what_fits() -> None:
    space = [{"name": "batch", "type": "float", "low": 1, "high": 1000}]
    study = Study(spec_of("random", space))
    ran_out(study, 20, GIB)
    for number in range(1, 20):
        made = choose(study.spec, study.snapshot, number, workload=Measured(), memory_bytes=GIB)
        assert made.params["batch"] < 20
        study.add(made, TrialState.RUNNING)


def test_marks_follow_corrections() -> None:
    study = Study(spec_of("random", SPACE))
    marks = Marks(study.spec, Measured())
    ran_out(study, 5, 8 * GIB)
    marks.update(study.snapshot.entries)
    assert not marks.room(8 * GIB).holds({"batch": 6})
    assert marks.room(8 * GIB).holds({"batch": 4})
    corrected = Study(study.spec)
    ran_out(corrected, 9, 8 * GIB)
    marks.update(corrected.snapshot.entries)
    assert marks.room(8 * GIB).holds({"batch": 6})
    marks.update(())
    assert len(marks) == 0
    assert marks.room(8 * GIB).holds({"batch": 12})


def test_what_is_queued_beyond_a_device_follows_corrections() -> None:
    study = Study(spec_of("random", SPACE))
    ran_out(study, 5, 8 * GIB)
    for place, fixed in enumerate(({"batch": 4}, {"batch": 7}, {}, {"batch": "many"}), start=1):
        waits = create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": fixed})
        waits.number = waits._trial_id = place
        study.entries.append(entry_of(waits).checked_by(study.spec.space))
    marks = Marks(study.spec, Measured())
    marks.update(study.snapshot.entries)
    assert marks.beyond(8 * GIB) == [2]
    assert marks.beyond(9 * GIB) == marks.beyond(None) == []
    corrected = Study(study.spec)
    ran_out(corrected, 3, 8 * GIB)
    marks.update((*corrected.entries, *study.entries[1:]))
    assert marks.beyond(8 * GIB) == [1, 2]
    marks.update((corrected.entries[0], corrected.entries[0], *study.entries[2:]))
    assert marks.beyond(8 * GIB) == [2], "what was begun is queued no more"
    marks.update((*corrected.entries, *study.entries[1:2]))
    assert marks.beyond(8 * GIB) == [1]
    study.entries[0] = study.entries[1]
    marks.update(study.entries[:2])
    assert marks.beyond(8 * GIB) == []
