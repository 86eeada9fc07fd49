"""When a study is over: by trials, hours or a target, raised and lowered while it runs."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from hpo.errors import Conflict
from hpo.protocol import Verdict
from tests.integration.leases_harness import (
    ask,
    claim,
    coordinator,
    must_claim,
    point,
    release,
    report,
    study,
    tell,
)


def test_a_study_finishes_with_its_last_trial(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 2}))
    first, second = must_claim(desk), must_claim(desk)
    assert claim(desk) is None
    tell(desk, first)
    assert desk.get_study(made.study).state == "running", "a trial still runs"
    tell(desk, second, None, "failed")
    view = desk.get_study(made.study)
    assert (view.state, view.reason, view.budget.trials_used) == ("finished", "all 2 trials are done", 2)
    assert view.finished_at is not None


def test_the_budget_counts_every_trial_ever_leased_but_the_cancelled(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 3}, points=[point(0.1), point(0.2)]))
    desk.add_trial(made.study, {"params": point(0.9), "value": 0.4})  # recorded: does not count
    desk.cancel_trial(made.study, 1)  # never leased: does not count
    lease = must_claim(desk)
    assert lease.trial == 0
    desk.cancel_trial(made.study, 0)
    assert report(desk, lease).verdict == Verdict.STOP
    release(desk, lease, "stopped")  # leased and cancelled: does not count
    assert desk.get_study(made.study).budget.trials_used == 0
    again = must_claim(desk)
    release(desk, again)
    assert must_claim(desk).attempt == 2  # the same trial again counts once
    must_claim(desk), must_claim(desk)
    assert claim(desk) is None
    assert desk.get_study(made.study).budget.trials_used == 3


def test_a_begun_trial_is_finished_when_the_budget_is_spent(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 1}))
    lease = must_claim(desk)
    release(desk, lease)
    assert desk.get_study(made.study).state == "running", "a trial between two attempts is open"
    desk.add_trial(made.study, {"params": point(0.5)})
    again = must_claim(desk)
    assert (again.trial, again.attempt) == (0, 2)
    assert claim(desk) is None
    tell(desk, again)
    view = desk.get_study(made.study)
    assert (view.state, view.counts["queued"]) == ("finished", 1), "a point that was never begun waits for more budget"
    desk.patch_study(made.study, {"budget": {"trials": 2}})
    assert must_claim(desk).trial == 1


def test_hours_stop_new_leases_and_running_trials_finish(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"hours": 1.0}))
    first, second = must_claim(desk), must_claim(desk)
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE whetstone.attempts SET leased_at = leased_at - interval '31 minutes'"))
    assert claim(desk) is None, "the running attempts count"
    tell(desk, first)
    assert desk.get_study(made.study).state == "running"
    tell(desk, second)
    view = desk.get_study(made.study)
    assert (view.state, view.reason) == ("finished", "its budget of training time is used (1 h)")
    assert view.budget.hours_used == pytest.approx(62 / 60, abs=0.01)


@pytest.mark.parametrize(("direction", "far", "near"), [("maximize", 0.7, 0.8), ("minimize", 0.9, 0.8)])
def test_a_target_reached_ends_the_study(engine: sa.Engine, direction: str, far: float, near: float) -> None:
    desk = coordinator(engine)
    document = study(budget={"target": 0.8}, direction=direction, workload="external", settings={})
    made = desk.create_study(document)
    running = ask(desk, made.study)
    tell(desk, ask(desk, made.study), far)
    tell(desk, ask(desk, made.study), 0.8, "infeasible")
    tell(desk, ask(desk, made.study), near)
    with pytest.raises(Conflict, match="target"):
        ask(desk, made.study)
    assert desk.get_study(made.study).state == "running"
    tell(desk, running, far)
    view = desk.get_study(made.study)
    assert (view.state, view.reason) == ("finished", "trial 3 reached 0.8; the target was 0.8")


def test_a_recorded_trial_may_reach_the_target(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"target": 0.8}))
    desk.add_trial(made.study, {"params": point(0.5), "value": 0.9})
    assert desk.get_study(made.study).state == "finished"


def test_a_raised_budget_sets_a_finished_study_running(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 1}))
    tell(desk, must_claim(desk))
    with pytest.raises(Conflict, match="raise its budget"):
        desk.patch_study(made.study, {"state": "running"})
    view = desk.patch_study(made.study, {"budget": {"trials": 2}})
    assert (view.state, view.reason, view.finished_at) == ("running", "", None)
    assert view.spec["budget"]["trials"] == 2
    tell(desk, must_claim(desk))
    assert claim(desk) is None
    assert desk.patch_study(made.study, {"budget": {"trials": None}}).state == "running"
    assert claim(desk) is not None


def test_a_lowered_budget_finishes_the_study_once_nothing_runs(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    tell(desk, must_claim(desk))
    lease = must_claim(desk)
    assert desk.patch_study(made.study, {"budget": {"trials": 1}}).state == "running"
    assert claim(desk) is None
    tell(desk, lease)
    assert desk.get_study(made.study).state == "finished"
