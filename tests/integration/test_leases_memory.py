"""What ran out of memory on one device is not given to another as small, and is still there for a larger one."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from hpo import database, leases
from hpo.errors import Conflict
from tests.integration.leases_harness import Ball, ask, claim, coordinator, point, study, tell


def test_a_point_that_ran_out_of_memory_waits_for_a_larger_device(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.1)]))
    small = claim(desk, "small", memory_bytes=1_000)
    assert small is not None
    tell(desk, small, None, "infeasible", reason="out of memory on cuda:0")
    again = desk.requeue_trial(made.study, small.trial)

    other = claim(desk, "small", memory_bytes=1_000)
    assert other is not None
    assert other.trial != again.trial, "it is passed over, and a new point is found"
    assert other.params != small.params
    as_small = claim(desk, "as-small", memory_bytes=900)
    assert as_small is not None
    assert as_small.trial != again.trial

    large = claim(desk, "large", memory_bytes=2_000)
    assert large is not None
    assert (large.trial, large.params) == (again.trial, small.params)


def test_a_device_too_small_for_all_that_is_left_gets_nothing_and_the_study_goes_on(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    space = [{"name": "x", "type": "integer", "low": 0, "high": 1}]
    made = desk.create_study(study(space=space, budget={"trials": 20}))
    for _ in range(2):
        lease = claim(desk, "small", memory_bytes=1_000)
        assert lease is not None
        tell(desk, lease, None, "infeasible", reason="out of memory on cuda:0")
    assert claim(desk, "small", memory_bytes=1_000) is None
    assert desk.get_study(made.study).state == "running", "nothing is wrong with the study"
    assert claim(desk, "large", memory_bytes=2_000) is not None


def test_what_auto_stands_for_is_stored_with_its_reason(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(sampler="auto"))
    assert claim(desk) is not None
    with engine.connect() as conn:
        picked = conn.execute(sa.text("SELECT picked FROM whetstone.studies WHERE study_id = :s"), {"s": made.study})
        stored = picked.scalar_one()
    assert stored["sampler"] in ("tpe", "gp", "cmaes", "qmc", "random")
    assert stored["why"]


def test_fixed_parameters_hold_for_what_is_suggested_next(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    with engine.begin() as conn:
        conn.execute(
            sa.text("""UPDATE whetstone.studies SET fixed = '{"x": 0.25}' WHERE study_id = :s"""), {"s": made.study}
        )
    lease = claim(desk)
    assert lease is not None
    assert lease.params["x"] == 0.25
    assert lease.params["eta"] != claim(desk, "w2").params["eta"]  # type: ignore[union-attr]


class Measured(Ball):
    """A workload that knows how large a point is."""

    def footprint(self, point: Any, settings: Any) -> float | None:
        return float(point["x"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that is called on its own: a round trip each, and at most a commit."""
    call, made = database.call, []

    def counted(engine: sa.Engine, statement: str, *given: Any) -> Any:
        made.append(statement)
        return call(engine, statement, *given)

    monkeypatch.setattr(database, "call", counted)
    return made


def test_a_long_queue_for_larger_devices_is_passed_over_at_one_look(engine: sa.Engine, calls: list[str]) -> None:
    desk = coordinator(engine, ball=Measured())
    made = desk.create_study(study(points=[point(0.5), *(point(0.5 + place / 1000) for place in range(1, 200))]))
    ran_out = claim(desk, "small", memory_bytes=1_000)
    assert ran_out is not None
    tell(desk, ran_out, None, "infeasible", reason="out of memory on cuda:0")
    desk.add_trial(made.study, {"params": point(0.25)})
    fits = claim(desk, "small", memory_bytes=1_000)
    assert fits is not None
    assert fits.params["x"] == 0.25, "the one that fits, behind all that do not"
    for place in range(3):
        calls.clear()
        more = claim(desk, "small", memory_bytes=1_000)
        assert more is not None
        assert (more.trial, more.params["x"] < 0.5) == (201 + place, True), "a new point"
        assert len(calls) == 2
    desk.add_trial(made.study, {"params": point(0.75)})
    calls.clear()
    assert claim(desk, "small", memory_bytes=1_000) is not None
    assert len(calls) <= 3, "what was queued since the last look is met once"
    assert ask(desk, made.study, "small").params["x"] < 0.5, "its memory is known from what it said before"
    large = claim(desk, "large", memory_bytes=2_000)
    assert large is not None
    assert large.trial == 1


def test_a_long_queue_of_parts_too_large_for_a_device_is_nothing_for_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "MAX_ROUNDS", 5)
    desk = coordinator(engine, ball=Measured())
    made = desk.create_study(study(points=[point(0.5), *({"x": 0.5 + place / 1000} for place in range(1, 9))]))
    ran_out = claim(desk, "small", memory_bytes=1_000)
    assert ran_out is not None
    tell(desk, ran_out, None, "infeasible", reason="out of memory on cuda:0")
    assert claim(desk, "small", memory_bytes=1_000) is None
    with pytest.raises(Conflict, match="A device with more memory is needed"):
        ask(desk, made.study, "small")
    assert desk.get_study(made.study).counts["queued"] == 8
