"""What ran out of memory on one device is not given to another as small, and is still there for a larger one."""

from __future__ import annotations

import sqlalchemy as sa

from tests.integration.leases_harness import claim, coordinator, point, study, tell


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
