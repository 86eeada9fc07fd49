"""Expiry against a real PostgreSQL: a silent worker's trial goes on elsewhere, a healthy worker's never."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import optuna
import pytest
import sqlalchemy as sa

from hpo import expiry
from hpo.coordinator import Coordinator
from hpo.errors import DatabaseUnavailable, LeaseLost
from hpo.expiry import Contact, Reaper
from hpo.protocol import Verdict
from tests.integration.leases_harness import (
    claim,
    coordinator,
    must_claim,
    release,
    report,
    study,
    tell,
    together,
)

TERM = 30.0
"""Longer than any test takes: what is to be over is put back in time."""


def overdue(engine: sa.Engine) -> None:
    """As if all live leases had run out a moment ago."""
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE whetstone.attempts SET expires_at = clock_timestamp() WHERE state = 'leased'"))


def later(desk: Coordinator, seconds: float) -> None:
    """As if so many seconds had passed since the last contact with PostgreSQL, by both clocks."""
    assert desk._contact._last is not None
    ours, theirs = desk._contact._last
    desk._contact._last = ours - seconds, theirs - timedelta(seconds=seconds)


def in_touch(desk: Coordinator) -> None:
    """Have been in contact with PostgreSQL for more than a term, every third of it."""
    desk.expire()
    for _ in range(4):
        later(desk, desk.term_s / 3)
        desk.expire()


def test_a_silent_workers_trial_goes_on_elsewhere(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=1.0)
    made = desk.create_study(study())
    first = must_claim(desk, "dies")
    report(desk, first, {0: 0.2, 1: 0.3}, checkpoint_epoch=1)
    with Reaper(desk, 0.25):
        deadline = time.monotonic() + 120
        while desk.get_trial(made.study, 0).state == "leased":
            assert time.monotonic() < deadline, "the lease never expired"
            time.sleep(0.05)
    trial = desk.get_trial(made.study, 0)
    assert trial.state == "queued"
    assert trial.history[0].state == "lost"
    assert "dies was silent" in trial.reason
    again = must_claim(desk, "lives")
    assert (again.trial, again.attempt, again.resume, again.params) == (0, 2, first.artifacts, first.params)
    assert report(desk, first, {2: 0.9}).verdict == Verdict.LOST
    with pytest.raises(LeaseLost, match="silent"):
        tell(desk, first, 0.9)
    with pytest.raises(LeaseLost):
        release(desk, first)
    assert tell(desk, again, 0.5).value == 0.5
    assert desk.get_study(made.study).budget.trials_used == 1


def test_a_worker_that_reports_keeps_its_lease(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=3.0)
    desk.create_study(study())
    lease = must_claim(desk)
    with Reaper(desk, 0.5):
        for _ in range(20):
            time.sleep(0.3)
            assert report(desk, lease).verdict == Verdict.GO_ON
    assert tell(desk, lease).state == "complete"


def test_a_late_report_renews_a_lease_that_nobody_has_taken(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    desk.create_study(study())
    in_touch(desk)
    lease = must_claim(desk)
    overdue(engine)
    assert report(desk, lease).verdict == Verdict.GO_ON
    assert desk.expire() == 0
    assert tell(desk, lease).state == "complete"


def test_a_coordinator_just_started_expires_nothing_for_a_term(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study())
    must_claim(desk)
    overdue(engine)
    after = coordinator(engine, term_s=TERM)
    assert after.expire() == 0
    later(after, TERM / 3)
    assert after.expire() == 0
    assert desk.get_trial(made.study, 0).state == "leased"
    in_touch(after)
    assert desk.get_trial(made.study, 0).state == "queued"


def test_a_gap_in_the_contact_grants_every_worker_a_term(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study())
    in_touch(desk)
    must_claim(desk)
    overdue(engine)
    later(desk, TERM)  # as if frozen
    assert desk.expire() == 0
    assert desk.get_trial(made.study, 0).state == "leased"
    in_touch(desk)
    assert desk.get_trial(made.study, 0).state == "queued"


def test_an_outage_of_the_database_grants_every_worker_a_term(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study())
    in_touch(desk)
    must_claim(desk)
    overdue(engine)
    address = engine.url

    def away(*_: object) -> None:
        raise sa.exc.OperationalError("connect", {}, Exception("could not connect"))

    sa.event.listen(engine, "do_connect", away)
    engine.dispose()
    with pytest.raises(DatabaseUnavailable):
        desk.expire()
    sa.event.remove(engine, "do_connect", away)
    assert engine.url == address
    assert desk.expire() == 0
    assert desk.get_trial(made.study, 0).state == "leased"


def test_contact_counts_the_shorter_of_two_clocks_and_breaks_at_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    contact, now = Contact(30.0), datetime.now(UTC)

    def made(ours: float, theirs: float) -> bool:
        """A contact at so many seconds of either clock."""
        monkeypatch.setattr(expiry, "_uptime_s", lambda: ours)
        return contact.made(now + timedelta(seconds=theirs))

    assert not made(0, 0)
    assert not made(10, 3600), "PostgreSQL's clock jumped: no contact for an hour"
    assert not made(20, 0), "and back"
    assert not made(28, 12)
    assert not made(40, 20)
    assert not made(51, 31), "31 s have passed by either, but by both no more than 8, 8 and 11"
    assert made(56, 36)


def test_after_so_many_deaths_the_trial_is_failed_with_its_reason(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study(max_attempts=2, budget={"trials": 1}))
    in_touch(desk)
    for attempt in (1, 2):
        lease = must_claim(desk, f"w{attempt}")
        assert lease.attempt == attempt
        overdue(engine)
        assert desk.expire() == 1
    view = desk.get_study(made.study)
    assert (view.state, view.counts["failed"]) == ("finished", 1), "the expiry that ends a study finishes it"
    assert "2 attempts died" in desk.get_trial(made.study, 0).reason
    assert "w2 was silent" in desk.get_trial(made.study, 0).reason
    assert claim(desk) is None


def test_what_was_asked_to_stop_and_dies_is_cancelled(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study())
    in_touch(desk)
    must_claim(desk)
    must_claim(desk)
    desk.cancel_trial(made.study, 0)
    desk.patch_study(made.study, {"state": "stopped"})
    overdue(engine)
    assert desk.expire() == 2
    assert desk.get_study(made.study).counts["cancelled"] == 2
    assert desk.get_trial(made.study, 0).reason == "cancelled by a person"
    assert desk.get_trial(made.study, 1).reason == "the study was stopped"


def test_trials_that_stock_optuna_runs_never_expire(engine: sa.Engine) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study())
    url = engine.url.render_as_string(hide_password=False)
    outside = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(url))
    trial = outside.ask()
    with engine.begin() as conn:
        conn.execute(sa.text("UPDATE public.trials SET datetime_start = datetime_start - interval '2 days'"))
    in_touch(desk)
    assert desk.get_trial(made.study, 0).state == "leased"
    outside.tell(trial, 0.5)
    assert desk.get_trial(made.study, 0).value == 0.5


@pytest.mark.parametrize("rival", ["tell", "release", "report"])
def test_an_expiry_and_a_message_at_once_leave_one_truth(engine: sa.Engine, rival: str) -> None:
    desk = coordinator(engine, term_s=TERM)
    made = desk.create_study(study(max_attempts=100))
    for _ in range(8):
        in_touch(desk)
        lease = must_claim(desk)
        overdue(engine)
        calls = {
            "tell": lambda: tell(desk, lease),  # noqa: B023
            "release": lambda: release(desk, lease),  # noqa: B023
            "report": lambda: report(desk, lease),  # noqa: B023
        }
        expired, answer = together(desk.expire, calls[rival])
        trial = desk.get_trial(made.study, lease.trial)
        last = trial.history[-1].state
        if expired:
            assert (trial.state, last) == ("queued", "lost")
            assert isinstance(answer, LeaseLost) or answer.verdict == Verdict.LOST  # type: ignore[union-attr]
        else:
            expected = {
                "tell": ("complete", "complete"),
                "release": ("queued", "released"),
                "report": ("leased", "leased"),
            }
            assert (trial.state, last) == expected[rival]
            if rival == "report":
                tell(desk, lease)
