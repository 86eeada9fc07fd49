"""Claims, reports, tells and releases against a real PostgreSQL: one live token a trial, each outcome told once."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import leases
from hpo.errors import Conflict, Invalid, LeaseLost, NotFound
from hpo.protocol import EpochReport, ReportRequest, Verdict
from tests.integration.leases_harness import (
    ALICE,
    MALLORY,
    Ball,
    ask,
    claim,
    coordinator,
    deadlocks,
    must_claim,
    point,
    release,
    report,
    study,
    tell,
    together,
)


def attempts(engine: sa.Engine, trial: int = 0) -> list[tuple[int, str]]:
    with engine.connect() as conn:
        found = conn.execute(
            sa.text("SELECT attempt, state FROM whetstone.attempts WHERE trial_number = :n ORDER BY attempt"),
            {"n": trial},
        )
        return [(row.attempt, row.state) for row in found]


def stock(engine: sa.Engine, name: str = "s") -> optuna.Study:
    url = engine.url.render_as_string(hide_password=False)
    return optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(url))


# The plain way


def test_a_trial_goes_from_claim_to_tell(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    lease = must_claim(desk)
    assert (lease.study, lease.study_name, lease.trial, lease.attempt) == (made.study, "s", 0, 1)
    assert set(lease.params) == {"x", "eta"}
    assert lease.settings == {"net": "mini"}
    assert lease.artifacts == f"studies/{made.study}/trials/0/attempts/1"
    assert lease.resume is None
    assert desk.get_trial(made.study, 0).state == "leased"
    assert report(desk, lease, {0: 0.2, 1: 0.4}, checkpoint_epoch=2).verdict == Verdict.GO_ON
    reply = tell(desk, lease, 0.61)
    assert (reply.study, reply.trial, reply.state, reply.value) == (made.study, 0, "complete", 0.61)
    trial = desk.get_trial(made.study, 0)
    assert (trial.state, trial.value, trial.epoch, trial.attempts) == ("complete", 0.61, 1, 1)
    assert trial.params == lease.params
    assert trial.seed == lease.seed
    assert [(item.epoch, item.value, item.metrics["loss"]) for item in trial.curve] == [(0, 0.2, 0.1), (1, 0.4, 0.1)]
    assert trial.checkpoint == lease.artifacts
    assert trial.history[0].worker == "w1"


def test_there_is_nothing_to_claim_without_a_running_study(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    assert claim(desk) is None
    made = desk.create_study(study())
    desk.patch_study(made.study, {"state": "paused"})
    assert claim(desk) is None
    desk.patch_study(made.study, {"state": "running"})
    assert claim(desk) is not None


def test_workers_are_not_given_trials_of_external_studies(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(workload="external", settings={}))
    assert claim(desk) is None
    assert ask(desk, made.study).workload == "external"


def test_asking_says_why_there_is_nothing(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    with pytest.raises(NotFound):
        ask(desk, 77)
    made = desk.create_study(study(concurrency=1))
    ask(desk, made.study)
    with pytest.raises(Conflict, match="concurrency"):
        ask(desk, made.study)
    desk.patch_study(made.study, {"state": "paused"})
    with pytest.raises(Conflict, match="paused"):
        ask(desk, made.study)


def test_studies_take_turns_by_their_leases(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first, second = desk.create_study(study("a")), desk.create_study(study("b"))
    leases = [must_claim(desk, f"w{place}") for place in range(4)]
    assert [lease.study for lease in leases] == [first.study, second.study, first.study, second.study]
    tell(desk, leases[1])
    tell(desk, leases[3])
    assert must_claim(desk).study == second.study


def test_points_of_ones_own_come_first_and_in_order(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(points=[point(0.25), {"x": 0.75}]))
    first, second, third = (must_claim(desk) for _ in range(3))
    assert (first.trial, first.params) == (0, point(0.25))
    assert (second.trial, second.params["x"]) == (1, 0.75)
    assert set(second.params["eta"]) == {"conv", "fc"}  # type: ignore[arg-type]
    assert third.trial == 2
    assert [desk.get_trial(made.study, n).origin for n in range(3)] == ["queued", "queued", "suggested"]


def test_points_that_stock_optuna_enqueued_are_leased(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    stock(engine).enqueue_trial({"x": 0.125, "eta[conv]": 0.01})
    assert desk.get_trial(made.study, 0).state == "queued"
    assert desk.get_trial(made.study, 0).params == {"x": 0.125, "eta": {"conv": 0.01}}
    lease = must_claim(desk)
    assert (lease.trial, lease.params["x"]) == (0, 0.125)
    assert lease.params["eta"]["conv"] == 0.01  # type: ignore[index]
    tell(desk, lease)
    assert stock(engine).trials[0].params["x"] == 0.125


def test_an_impossible_point_that_stock_optuna_took_meanwhile_is_left_to_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    desk.create_study(study())
    theirs = stock(engine)
    theirs.enqueue_trial({"x": 7.0})
    judge = leases._impossible

    def judge_too_late(*args: Any) -> str | None:
        assert theirs.ask().number == 0
        return judge(*args)

    monkeypatch.setattr(leases, "_impossible", judge_too_late)
    assert must_claim(desk).trial == 1
    assert stock(engine).trials[0].state == TrialState.RUNNING


def test_an_impossible_point_is_never_leased(engine: sa.Engine) -> None:
    desk = coordinator(engine, ball=Ball(limit=0.1))
    made = desk.create_study(study())
    stock(engine).enqueue_trial({"x": 0.9, "eta[conv]": 0.01, "eta[fc]": 0.01})
    stock(engine).enqueue_trial({"x": 7.0})
    held = [must_claim(desk) for _ in range(20)]
    assert [lease.trial for lease in held] == list(range(2, 22))
    assert all(lease.params["x"] < 0.1 for lease in held)  # type: ignore[operator]
    refused = [desk.get_trial(made.study, n) for n in (0, 1)]
    assert [trial.state for trial in refused] == ["failed", "failed"]
    assert "x must be below 0.1" in refused[0].reason
    assert "outside" in refused[1].reason


def test_stock_optuna_reads_the_study_as_it_is(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    desk.create_study(study(pruner="median"))
    outcomes = [("complete", 0.4), ("infeasible", 0.9), ("pruned", None), ("failed", None), ("complete", 0.6)]
    for outcome, value in outcomes:
        lease = must_claim(desk)
        report(desk, lease, {0: 0.1, 3: 0.3})
        tell(desk, lease, value, outcome)
    running = must_claim(desk)
    seen = stock(engine)
    states = [trial.state for trial in seen.trials]
    assert states == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]
    assert [trial.value for trial in seen.trials] == [0.4, 0.9, 0.3, None, 0.6, None]
    assert seen.best_trial.number == 4, "the infeasible trial has the highest value and is not the best"
    assert seen.trials[0].intermediate_values == {0: 0.1, 3: 0.3}
    assert seen.trials[0].constraints == {"infeasible": 0.0}
    assert seen.trials[5].params["eta[conv]"] == running.params["eta"]["conv"]  # type: ignore[index]
    assert set(seen.trials[5].distributions) == {"x", "eta[conv]", "eta[fc]"}
    assert all(trial.datetime_start and trial.datetime_complete for trial in seen.trials[:5])


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

    monkeypatch.setattr("hpo.pruners.should_prune", broken)
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
    with pytest.raises(Conflict):
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


# At once


def test_of_two_tells_at_once_exactly_one_is_stored(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    for number in range(15):
        lease = must_claim(desk)
        results = together(lambda: tell(desk, lease, 0.25), lambda: tell(desk, lease, 0.75))  # noqa: B023
        errors = [result for result in results if isinstance(result, Exception)]
        assert len(errors) == 1
        assert isinstance(errors[0], Conflict)
        (winner,) = [result for result in results if not isinstance(result, Exception)]
        assert desk.get_trial(made.study, number).value == winner.value
        assert attempts(engine, number) == [(1, "complete")]


def test_sixteen_claimers_of_twenty_trials_get_twenty_numbers(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 20}))
    numbers: list[int] = []
    guard = threading.Lock()

    def work(worker: str) -> None:
        # Two coordinators, as two processes would be: they share no lock in memory.
        mine = coordinator(engine) if worker.endswith(("1", "3", "5")) else desk
        while (lease := claim(mine, worker)) is not None:
            with guard:
                numbers.append(lease.trial)
            tell(mine, lease, 0.5)

    results = together(*[lambda worker=f"w{place}": work(worker) for place in range(16)])  # type: ignore[misc]
    assert results == [None] * 16
    assert sorted(numbers) == list(range(20))
    view = desk.get_study(made.study)
    assert (view.state, view.reason, view.budget.trials_used) == ("finished", "all 20 trials are done", 20)
    points = {tuple(trial.params["eta"].values()) for trial in desk.list_trials(made.study).items}  # type: ignore[union-attr]
    assert len(points) == 20, "no point was suggested twice"


def test_concurrency_is_never_exceeded(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    made = desk.create_study(study(concurrency=3, points=[point(place / 10) for place in range(4)]))
    calls = [lambda worker=f"w{n}", mine=(desk, other)[n % 2]: claim(mine, worker) for n in range(10)]  # type: ignore[misc]
    leases = [lease for lease in together(*calls) if lease is not None]
    assert len(leases) == 3
    assert desk.get_study(made.study).counts["leased"] == 3
    tell(desk, leases[0])
    assert claim(desk) is not None
    assert claim(desk) is None


def test_a_tell_and_a_release_at_once_leave_one_outcome(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    told = 0
    for _ in range(12):
        lease = must_claim(desk)
        results = together(lambda: tell(desk, lease, 0.5), lambda: release(desk, lease))  # noqa: B023
        assert sum(isinstance(result, Exception) for result in results) == 1
        state = desk.get_trial(made.study, lease.trial).state
        assert state == ("queued" if isinstance(results[0], Exception) else "complete")
        told += state == "complete"
    assert desk.get_study(made.study).counts["complete"] == told


def test_tells_and_reports_do_not_wait_for_a_sampler(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = coordinator(engine)
    desk.create_study(study(pruner="median"))
    lease = must_claim(desk)
    from hpo import leases

    begun, go_on = threading.Event(), threading.Event()
    suggest = leases.suggest

    def slow(*args: object, **kwargs: object) -> object:
        begun.set()
        assert go_on.wait(30)
        return suggest(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(leases, "suggest", slow)
    found: list[object] = []
    claimer = threading.Thread(target=lambda: found.append(claim(desk, "w2")))
    claimer.start()
    assert begun.wait(30)
    began = time.monotonic()
    assert report(desk, lease, {0: 0.5}).verdict == Verdict.GO_ON
    assert tell(desk, lease).state == "complete"
    assert time.monotonic() - began < 10
    assert claimer.is_alive(), "the sampler is still at it"
    go_on.set()
    claimer.join(30)
    assert found[0] is not None


def test_a_study_whose_sampler_fails_is_paused_and_stands_in_nobodys_way(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    broken, healthy = desk.create_study(study("broken")), desk.create_study(study("healthy"))
    from hpo import leases

    suggest = leases.suggest

    def failing(spec: object, *args: object, **kwargs: object) -> object:
        if spec.name == "broken":  # type: ignore[attr-defined]
            raise FloatingPointError("singular")
        return suggest(spec, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(leases, "suggest", failing)
    with pytest.raises(Conflict, match="singular"):
        ask(desk, broken.study)
    for _ in range(3):
        assert must_claim(desk).study == healthy.study
    view = desk.get_study(broken.study)
    assert view.state == "paused"
    assert "FloatingPointError: singular" in view.reason
    monkeypatch.undo()
    desk.patch_study(broken.study, {"state": "running"})
    assert desk.get_study(broken.study).reason == ""
    assert ask(desk, broken.study).trial == 0


def test_a_coordinator_started_anew_goes_on_where_it_was(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study(budget={"trials": 3}))
    lease = must_claim(desk)
    report(desk, lease, {0: 0.5})
    after = coordinator(engine)
    assert report(after, lease, {1: 0.6}).verdict == Verdict.GO_ON
    tell(after, lease, 0.6)
    assert must_claim(after).trial == 1
    assert after.get_study(made.study).spec == desk.get_study(made.study).spec


def test_no_deadlock_under_load(engine: sa.Engine) -> None:
    """Claims, reports, tells, releases, cancels, expiries, patches, stock asks: all at once, on two studies."""
    desk = coordinator(engine, term_s=0.3)
    made = [desk.create_study(study(name, pruner="median")).study for name in ("a", "b")]
    stop = time.monotonic() + 6
    errors: list[Exception] = []

    def repeat(call: object) -> None:
        turn = 0
        while time.monotonic() < stop:
            turn += 1
            try:
                call(turn)  # type: ignore[operator]
            except (Conflict, NotFound):
                pass
            except Exception as error:
                errors.append(error)
                return

    def work(turn: int) -> None:
        lease = claim(desk, threading.current_thread().name)
        if lease is None:
            return
        for epoch in range(3):
            report(desk, lease, {epoch: math.sin(turn)}, checkpoint_epoch=epoch)
        if turn % 4 == 0:
            release(desk, lease, "stalled" if turn % 8 == 0 else "shutdown")
        elif turn % 4 == 1:
            time.sleep(0.4)  # past its term
        tell(desk, lease, 0.5)

    def steer(turn: int) -> None:
        number = made[turn % 2]
        desk.patch_study(number, {"state": ("paused", "running", "stopped", "running")[turn % 4]})
        desk.list_trials(number, order="-value")
        desk.get_study(number)
        desk.add_trial(number, {"params": {"x": 0.5}})

    def cancel(turn: int) -> None:
        number = made[turn % 2]
        for trial in (
            desk.list_trials(number, state="leased").items[:2] + desk.list_trials(number, state="queued").items[:2]
        ):
            try:
                desk.cancel_trial(number, trial.trial)
            except Conflict:
                continue
        time.sleep(0.05)

    def expire(turn: int) -> None:
        desk.expire()
        time.sleep(0.05)

    outside = stock(engine, "a")

    def ask_stock(turn: int) -> None:
        trial = outside.ask()
        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # cancelled meanwhile
            outside.tell(trial, 0.5)

    calls = [work] * 6 + [steer, cancel, expire, ask_stock]
    together(*[lambda call=call: repeat(call) for call in calls])  # type: ignore[misc]
    assert errors == []
    assert deadlocks(engine) == 0
    for number in made:
        with engine.connect() as conn:
            numbers = (
                conn.execute(
                    sa.text("SELECT number FROM public.trials WHERE study_id = :s ORDER BY number"), {"s": number}
                )
                .scalars()
                .all()
            )
            assert list(numbers) == list(range(len(numbers)))
            live = conn.execute(
                sa.text("""SELECT count(*) FROM whetstone.attempts a JOIN public.trials t USING (trial_id)
                           WHERE a.state = 'leased' AND t.state <> 'RUNNING'""")
            ).scalar_one()
            assert live == 0
