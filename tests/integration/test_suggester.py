"""Coordinators on one database never give two workers the same point, and all of them suggest from the same study."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from hpo import database
from hpo.protocol import Lease
from tests.integration.leases_harness import ask, coordinator, study, tell, together

POINTS = [
    {"name": "x", "type": "integer", "low": 0, "high": 3},
    {"name": "c", "type": "categorical", "choices": ["u", "v", "w"]},
]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random"])
def test_replicas_asked_at_once_never_give_a_point_twice(engine: sa.Engine, sampler: str) -> None:
    replicas = [coordinator(engine), coordinator(engine)]
    document = study(workload="external", space=POINTS, sampler=sampler, settings={})
    made = replicas[0].create_study(document)
    leases: list[Lease] = []
    for _ in range(3):
        given = together(*(partial(ask, desk, made.study) for desk in replicas * 2))
        assert all(isinstance(lease, Lease) for lease in given), given
        leases += [lease for lease in given if isinstance(lease, Lease)]
        tell(replicas[0], leases[-1], 0.5)
    assert sorted(lease.trial for lease in leases) == list(range(12))
    assert len({(lease.params["x"], lease.params["c"]) for lease in leases}) == 12  # every point there is


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random"])
def test_whichever_replica_is_asked_the_study_goes_the_same_way(engine: sa.Engine, sampler: str) -> None:
    went = []
    for name, replicas in [("one", 1), ("two", 2)]:
        desks = [coordinator(engine) for _ in range(replicas)]
        made = desks[0].create_study(study(name, sampler=sampler, workload="external", settings={}))
        way = []
        for number in range(14):
            lease = ask(desks[number % replicas], made.study)
            tell(desks[number // 3 % replicas], lease, float(lease.params["x"]))  # type: ignore[arg-type]
            way.append(lease.params)
        went.append(way)
    assert went[0] == went[1]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_what_was_read_ahead_is_there_when_a_lease_is_asked_for_and_changes_nothing_of_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    first = coordinator(engine)
    made = [first.create_study(study(name, sampler=sampler, workload="external", settings={})).study for name in "ab"]
    for number in range(12):
        for each in made:
            tell(first, ask(first, each), number / 12)
    first.patch_study(made[1], {"state": "paused"})
    started = coordinator(engine)
    started.read_ahead()
    assert set(started._desk._known) == {made[0]}, "what leases nothing is not read"
    calls: list[str] = []
    call = database.call

    def counted(engine: sa.Engine, statement: str, values: Any = None) -> Any:
        calls.append(statement)
        return call(engine, statement, values)

    monkeypatch.setattr(database, "call", counted)
    lease = ask(started, made[0])
    assert len(calls) == 2, "one look and one write: nothing is left to be read"
    tell(started, lease, 0.0)
    first.patch_study(made[1], {"state": "running"})
    assert lease.params == ask(first, made[1]).params, "the same study, not read ahead"
