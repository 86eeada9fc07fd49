"""Claims against a real PostgreSQL: who gets which trial, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import leases
from hpo.asking import Asking
from hpo.errors import Conflict, NotFound
from hpo.protocol import Verdict
from tests.integration.leases_harness import (
    Ball,
    ask,
    claim,
    coordinator,
    must_claim,
    point,
    report,
    stock,
    study,
    tell,
)


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


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_a_number_that_stock_optuna_queues_and_json_lacks_stops_nobody(engine: sa.Engine, x: float) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    must_claim(desk)
    stock(engine).enqueue_trial({"x": x})
    for lease in (must_claim(desk, "w2"), ask(desk, made.study)):
        assert 0 <= lease.params["x"] <= 1  # type: ignore[operator]  # it is a number


def test_a_study_that_cannot_be_asked_keeps_no_other_from_being_claimed_from(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    broken, sound = desk.create_study(study("broken")), desk.create_study(study("sound"))
    assert must_claim(desk).study == broken.study

    def look(asking: Asking, study: int | None, known: Any) -> Any:
        if study == broken.study or (known is not None and known.study == broken.study):
            raise ValueError("broken")
        return real(asking, study, known)

    real = Asking.look
    monkeypatch.setattr(Asking, "look", look)
    assert must_claim(desk, "w2").study == sound.study


def test_a_study_deleted_while_it_is_claimed_from_leaves_nothing_to_claim(engine: sa.Engine) -> None:
    desk, other = coordinator(engine), coordinator(engine)
    made = desk.create_study(study())
    tell(desk, must_claim(desk))
    guess = desk._desk.guess
    assert guess is not None
    suggest = guess.suggester.next

    def late(*given: Any) -> Any:
        other.delete_study(made.study)
        return suggest(*given)

    guess.suggester.next = late  # type: ignore[method-assign]
    assert claim(desk) is None


def test_a_claim_that_was_made_is_answered_although_its_study_is_deleted_since(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, lease = coordinator(engine), Asking.lease
    made = desk.create_study(study())

    def deleted_after(*given: Any) -> Any:
        found = lease(*given)
        desk.patch_study(made.study, {"state": "stopped"})
        desk.delete_study(made.study)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Asking, "lease", deleted_after)
        held = must_claim(desk)
    assert report(desk, held, {0: 0.5}).verdict == Verdict.LOST
    assert claim(desk) is None
