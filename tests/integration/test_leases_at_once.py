"""Many clients at one moment against a real PostgreSQL: one live token a trial, each outcome told once, no deadlock."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from hpo import asking, database, leases
from hpo.errors import Busy, Conflict, NotFound
from hpo.protocol import Verdict
from hpo.suggest import Suggestion
from hpo.suggester import Suggester
from tests.integration.leases_harness import (
    ask,
    attempts,
    claim,
    coordinator,
    deadlocks,
    must_claim,
    point,
    release,
    report,
    stock,
    study,
    tell,
    together,
)


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

    begun, go_on = threading.Event(), threading.Event()
    choose = Suggester.next

    def slow(suggester: Suggester, *args: Any) -> Suggestion:
        begun.set()
        assert go_on.wait(30)
        return choose(suggester, *args)

    monkeypatch.setattr(Suggester, "next", slow)
    found: list[object] = []
    claimer = threading.Thread(target=lambda: found.append(claim(desk, "w2")))
    claimer.start()
    assert begun.wait(60)
    assert report(desk, lease, {0: 0.5}).verdict == Verdict.GO_ON
    assert tell(desk, lease).state == "complete"
    assert claimer.is_alive(), "the sampler is still at it"
    go_on.set()
    claimer.join(60)
    assert found[0] is not None


def test_an_ask_that_waits_too_long_for_others_is_to_be_made_again(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    monkeypatch.setattr(leases, "MAX_WAIT_S", 0.2)
    with desk._desk.recall(made.study).sampling, pytest.raises(Busy, match="ask again"):
        ask(desk, made.study)
    assert ask(desk, made.study).trial == 0


def test_a_study_whose_sampler_fails_is_paused_and_stands_in_nobodys_way(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    broken, healthy = desk.create_study(study("broken")), desk.create_study(study("healthy"))

    choose = Suggester.next

    def failing(suggester: Suggester, *args: Any) -> Suggestion:
        if suggester.spec.name == "broken":
            raise FloatingPointError("singular")
        return choose(suggester, *args)

    monkeypatch.setattr(Suggester, "next", failing)
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


def test_a_call_cut_off_and_repeated_while_the_server_is_still_at_it_gives_one_lease_and_its_own_point(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study())
    real, cut = database.call, []

    def call(engine: sa.Engine, statement: str, values: Any = None) -> Any:
        if statement is not asking.LEASE or cut:
            return real(engine, statement, values)
        answers: list[Any] = []
        with engine.begin() as other:  # so that neither copy gets on before the other has begun
            other.execute(sa.text("SELECT 1 FROM public.studies FOR UPDATE"))
            cut.extend(
                threading.Thread(target=lambda: answers.append(real(engine, statement, values))) for _ in range(2)
            )
            for place, thread in enumerate(cut, 1):
                thread.start()
                _until_waiting(engine, place)
        for thread in cut:
            thread.join(60)
        # What the client hears is the second one's answer: the first one's was lost.
        return answers[-1]

    monkeypatch.setattr(database, "call", call)
    lease = ask(desk, made.study)
    stored = desk.list_trials(made.study).items
    assert [(trial.trial, trial.params) for trial in stored] == [(lease.trial, lease.params)]
    assert tell(desk, lease, 0.5).trial == lease.trial


def _until_waiting(engine: sa.Engine, calls: int) -> None:
    """Wait until so many calls of this database wait for a lock."""
    waiting = sa.text("""
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
    """)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with engine.connect() as conn:
            if conn.execute(waiting).scalar_one() >= calls:
                return
        time.sleep(0.01)
    raise AssertionError("nobody waits")
