"""Reports, tells and releases against a real PostgreSQL: one live token a trial, each outcome told once."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import database, outcomes
from hpo.errors import Invalid, LeaseLost, NotFound, Told
from hpo.protocol import EpochReport, ReportRequest, Verdict
from tests.integration.leases_harness import (
    ALICE,
    MALLORY,
    attempts,
    claim,
    coordinator,
    must_claim,
    point,
    release,
    report,
    stock,
    study,
    tell,
)

# Reports


def test_a_null_value_is_kept_as_a_hole_in_the_curve(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    report(desk, lease, {0: 0.5, 1: None})
    assert [(item.epoch, item.value) for item in desk.get_trial(made.study, 0).curve] == [(0, 0.5), (1, None)]
    assert stock(engine).trials[0].intermediate_values == {0: 0.5}


def test_an_epoch_reported_twice_keeps_the_later_report(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    report(desk, lease, {0: 0.5})
    reports = [EpochReport(epoch=0, value=0.6), EpochReport(epoch=0, value=0.7)]
    desk.report(lease.lease, ReportRequest(token=lease.token, reports=reports), ALICE)
    assert [(item.epoch, item.value) for item in desk.get_trial(made.study, 0).curve] == [(0, 0.7)]
    assert stock(engine).trials[0].intermediate_values == {0: 0.7}


def test_a_report_with_the_wrong_token_or_bearer_is_lost_and_changes_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    older = lease.model_copy(update={"token": lease.token - 1})
    unknown = lease.model_copy(update={"lease": 10**20})
    for verdict in (
        report(desk, older, {0: 0.5}),
        report(desk, lease, {0: 0.5}, who=MALLORY),
        report(desk, unknown, {0: 0.5}),
    ):
        assert verdict.verdict == Verdict.LOST
        assert verdict.reason
    assert desk.get_trial(made.study, 0).curve == []


def test_a_bad_trial_is_pruned_by_the_median_of_the_others(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    pruner = {"name": "median", "n_startup_trials": 3, "n_warmup_steps": 1}
    made = desk.create_study(study(pruner=pruner))
    for _ in range(3):
        lease = must_claim(desk)
        report(desk, lease, {epoch: 0.5 + epoch / 10 for epoch in range(4)})
        tell(desk, lease, 0.8)
    good, bad = must_claim(desk), must_claim(desk)
    assert report(desk, bad, {0: 0.1}).verdict == Verdict.GO_ON, "within the warm-up"
    assert report(desk, bad, {1: 0.1, 2: 0.1}).verdict == Verdict.PRUNE
    assert report(desk, good, {0: 0.6, 1: 0.9, 2: 0.9}).verdict == Verdict.GO_ON
    assert tell(desk, bad, None, "pruned").state == "pruned"
    assert desk.get_trial(made.study, bad.trial).value == 0.1
    assert stock(engine).trials[bad.trial].state == TrialState.PRUNED


def test_a_report_that_was_taken_down_is_answered_although_its_study_is_deleted_since(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(pruner={"name": "median", "n_startup_trials": 1}))
    first = must_claim(desk)
    report(desk, first, {0: 0.9})
    tell(desk, first, 0.9)
    bad, call = must_claim(desk), database.call

    def deleted_after(engine: sa.Engine, statement: str, arguments: Any) -> Any:
        said = call(engine, statement, arguments)
        if statement == outcomes.REPORT:
            desk.patch_study(made.study, {"state": "stopped"})
            desk.delete_study(made.study)
        return said

    with monkeypatch.context() as patch:
        patch.setattr(database, "call", deleted_after)
        reply = report(desk, bad, {0: 0.1})
    assert (reply.verdict, reply.reason) == (Verdict.PRUNE, "the median pruner judged it not worth more")
    assert report(desk, bad, {1: 0.1}).verdict == Verdict.LOST


def test_successive_halving_remembers_its_rungs(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study(pruner={"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}))
    verdicts = []
    for value in (0.9, 0.8, 0.1):
        lease = must_claim(desk)
        verdicts.append(report(desk, lease, {1: value}).verdict)
    assert verdicts[0] == Verdict.GO_ON
    assert verdicts[-1] == Verdict.PRUNE
    assert any(key.startswith("completed_rung") for key in stock(engine).trials[0].system_attrs)


def test_a_pruner_that_fails_prunes_nothing(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = coordinator(engine)
    desk.create_study(study(pruner="median"))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hpo.pruners.judge_now", broken)
    assert report(desk, must_claim(desk), {0: 0.1}).verdict == Verdict.GO_ON


# Tells


def test_the_same_tell_again_gets_the_same_answer(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    first = tell(desk, lease, 0.1 + 0.2, reason="done")
    assert tell(desk, lease, 0.1 + 0.2, reason="done") == first
    # Also from a coordinator that has been started anew.
    assert tell(coordinator(engine), lease, 0.1 + 0.2, reason="done") == first
    assert desk.get_study(made.study).counts["complete"] == 1


@pytest.mark.parametrize(("value", "outcome"), [(0.7, "complete"), (None, "failed"), (0.5, "infeasible")])
def test_another_tell_changes_nothing(engine: sa.Engine, value: float | None, outcome: str) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    tell(desk, lease, 0.5)
    before = desk.get_trial(made.study, 0)
    with pytest.raises(Told):
        tell(desk, lease, value, outcome)
    assert desk.get_trial(made.study, 0) == before


def test_a_tell_with_the_wrong_token_or_bearer_changes_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    with pytest.raises(LeaseLost):
        tell(desk, lease.model_copy(update={"token": lease.token - 1}))
    with pytest.raises(LeaseLost):
        tell(desk, lease, who=MALLORY)
    with pytest.raises(NotFound):
        tell(desk, lease.model_copy(update={"lease": 10**20}))
    assert desk.get_trial(made.study, 0).state == "leased"
    assert tell(desk, lease).state == "complete"
    with pytest.raises(LeaseLost):
        tell(desk, lease, who=MALLORY)


def test_a_complete_trial_has_a_value_and_a_failed_one_has_none(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    lease = must_claim(desk)
    with pytest.raises(Invalid) as missing:
        tell(desk, lease, None)
    assert missing.value.faults[0].at == "value"
    with pytest.raises(Invalid):
        tell(desk, lease, 0.5, "failed")
    assert tell(desk, lease).state == "complete"


def test_an_infeasible_trial_is_worth_chance_or_the_worst_so_far(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    told = must_claim(desk)
    assert tell(desk, told, 0.05, "infeasible", reason="diverged").value == 0.05
    unknown = must_claim(desk)
    report(desk, unknown, {0: 0.2})
    assert tell(desk, unknown, None, "infeasible").value == 0.2, "nothing feasible yet: its own last report"
    for value in (0.6, 0.3, 0.7):
        tell(desk, must_claim(desk), value)
    assert tell(desk, must_claim(desk), None, "infeasible").value == 0.3
    view = desk.get_study(made.study)
    assert view.counts["infeasible"] == 3
    assert view.best is not None
    assert view.best.value == 0.7
    assert desk.get_trial(made.study, 0).reason == "diverged"


def test_a_failed_trial_keeps_its_traceback_and_is_not_tried_again(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    tell(desk, must_claim(desk), None, "failed", reason="KeyError: 'x\x00'", traceback="Traceback \x00\n...")
    trial = desk.get_trial(made.study, 0)
    assert trial.state == "failed"
    assert "KeyError" in trial.reason
    assert trial.history[0].traceback.startswith("Traceback")
    assert must_claim(desk).trial == 1


# Releases


def test_a_released_trial_is_next_and_resumes_from_its_checkpoint(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.1), point(0.2), point(0.3)]))
    first = must_claim(desk, "w1")
    second = must_claim(desk, "w2")
    report(desk, second, {0: 0.3, 1: 0.4}, checkpoint_epoch=1)
    assert release(desk, second, checkpoint_epoch=2).state == "queued"
    assert desk.get_trial(made.study, 1).state == "queued"
    assert stock(engine).trials[1].state == TrialState.WAITING
    again = must_claim(desk, "w3")
    assert (again.trial, again.attempt, again.params) == (1, 2, second.params)
    assert again.token > second.token
    assert again.resume == second.artifacts
    assert again.seed == second.seed
    assert again.artifacts.endswith("attempts/2")
    with pytest.raises(LeaseLost):
        tell(desk, second)
    assert report(desk, second, {5: 0.9}).verdict == Verdict.LOST
    tell(desk, again, 0.5)
    trial = desk.get_trial(made.study, 1)
    assert [(attempt.attempt, attempt.state, attempt.resumed_from) for attempt in trial.history] == [
        (1, "released", None),
        (2, "complete", 1),
    ]
    assert trial.history[0].checkpoint_epoch == 2
    tell(desk, first)


def test_a_resume_skips_attempts_that_left_no_checkpoint(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    first = must_claim(desk)
    release(desk, first, checkpoint_epoch=4)
    second = must_claim(desk)
    release(desk, second)
    third = must_claim(desk)
    assert (third.attempt, third.resume) == (3, first.artifacts)


def test_the_same_release_again_gets_the_same_answer(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    lease = must_claim(desk)
    first = release(desk, lease)
    must_claim(desk, "w2")
    assert release(desk, lease) == first
    with pytest.raises(LeaseLost):
        release(desk, lease, "stalled")
    with pytest.raises(LeaseLost):
        release(desk, lease, who=MALLORY)


def test_stalls_and_broken_devices_are_deaths_and_the_last_one_fails_the_trial(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(max_attempts=2))
    assert release(desk, must_claim(desk), "shutdown").state == "queued"
    assert release(desk, must_claim(desk), "stalled").state == "queued"
    assert release(desk, must_claim(desk), "drained").state == "queued"
    assert release(desk, must_claim(desk), "broken").state == "failed"
    trial = desk.get_trial(made.study, 0)
    assert trial.state == "failed"
    assert "2 attempts died" in trial.reason
    assert "device stopped working" in trial.reason
    assert [state for _, state in attempts(engine)] == ["released", "stalled", "released", "lost"]
    assert must_claim(desk).trial == 1


def test_a_stopped_study_asks_its_workers_to_stop_and_cancels_what_they_release(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.1), point(0.2), point(0.3)]))
    lease, finishing = must_claim(desk), must_claim(desk)
    view = desk.patch_study(made.study, {"state": "stopped"})
    assert (view.state, view.counts["cancelled"], view.counts["leased"]) == ("stopped", 1, 2)
    verdict = report(desk, lease)
    assert verdict.verdict == Verdict.STOP
    assert "stopped" in verdict.reason
    assert release(desk, lease, "stopped", checkpoint_epoch=3).state == "cancelled"
    assert tell(desk, finishing, 0.4).state == "complete", "a result that is there is kept"
    assert claim(desk) is None
    view = desk.get_study(made.study)
    assert (view.counts["cancelled"], view.counts["complete"], view.budget.trials_used) == (2, 1, 1)
    assert [trial.state for trial in stock(engine).trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL]
