"""What people do to trials: queue a point of their own, record a finished one, cancel, correct, try again.

A finished trial is never opened again, since stock Optuna remembers it as finished for as long as it runs: to try a
trial again is to queue a new one with the same parameters, which says of which trial it is the repetition.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpo import corrections, events, statements, studies, trials, writing
from hpo.desk import Desk, Known, lock, one_fault, storable
from hpo.errors import Conflict
from hpo.idempotency import Once, guard
from hpo.protocol import CorrectionRequest
from hpo.spec import TrialAdd, parse_trial
from hpo.views import TrialView

BY_A_PERSON = "cancelled by a person"
CORRECTED = "its outcome was corrected by a person"

LIVE_ATTEMPT = sa.text("""
    SELECT attempt_id FROM whetstone.attempts WHERE trial_id = :trial_id AND state = 'leased' FOR NO KEY UPDATE
""")
ASK_TO_STOP = sa.text("""
    UPDATE whetstone.attempts SET stop_requested = :why WHERE attempt_id = :lease AND stop_requested = ''
""")

# Repetitions of a trial that are not finished yet.
REPEATED = sa.text("""
    SELECT t.number FROM public.trials t
    JOIN public.trial_system_attributes m ON m.trial_id = t.trial_id AND m.key = 'whetstone:again'
    WHERE t.study_id = :study AND t.state IN ('WAITING', 'RUNNING') AND m.value_json = :number LIMIT 1
""")


def add(desk: Desk, study: int, document: object, once: Once | None = None) -> TrialView:
    """Queue a point, or record a finished trial (one with a value or an outcome).

    Raises:
        NotFound: there is no such study.
        Invalid: names every fault of the document.
        Conflict: a point for a stopped or finished study, which leases nothing.
        KeyReused: the idempotency key came with another body.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
    point = parse_trial(document, known.spec, desk.workloads)
    with desk.transaction() as conn:
        return guard(conn, once, TrialView, lambda: _add(conn, known, point))


def _add(conn: sa.Connection, known: Known, point: TrialAdd) -> TrialView:
    row = lock(conn, known.study)
    if point.outcome is None:
        _refuse_if_over(row)
        trial_id = writing.queue(conn, known.study, point.params, reason=point.reason)
        events.notify(conn, "work", known.study)
    else:
        trial_id = writing.record(conn, known, point.params, point.outcome, point.value, point.reason)
        studies.settle(conn, known)
    events.notify(conn, "trial", known.study)
    return trials.view_of(conn, known, trial_id)


def cancel(desk: Desk, study: int, number: int) -> TrialView:
    """Cancel a trial. A queued one ends at once; a leased one when its worker has been told, or has died.

    A worker that tells an outcome before it hears of this is believed: the result is there. To cancel a cancelled
    trial again changes nothing.

    Raises:
        NotFound: there is no such study or trial.
        Conflict: the trial has ended otherwise.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        lock(conn, study)
        trial_id = trials.find(conn, study, number)
        state = conn.execute(statements.LOCK_TRIAL, {"trial_id": trial_id}).one().state
        if state in ("WAITING", "RUNNING"):
            attempt = conn.execute(LIVE_ATTEMPT, {"trial_id": trial_id}).scalar()
            if attempt is None:  # queued, or started by stock Optuna, where nobody can be asked
                writing.cancel(conn, trial_id, BY_A_PERSON)
                studies.settle(conn, known)
            else:
                conn.execute(ASK_TO_STOP, {"lease": attempt, "why": BY_A_PERSON})
            events.notify(conn, "trial", study)
            events.notify(conn, "work", study)
        view = trials.view_of(conn, known, trial_id)
        if view.state not in ("cancelled", "queued", "leased"):
            raise Conflict(f"trial {number} is {view.state} already: only a queued or leased trial can be cancelled")
        return view


def requeue(desk: Desk, study: int, number: int, once: Once | None = None) -> TrialView:
    """Queue the point of a failed, cancelled, pruned or infeasible trial once more, as a new trial; return that one.

    Raises:
        NotFound: there is no such study or trial.
        Conflict: the trial is in another state, is being repeated already, or its study leases nothing.
        KeyReused: the idempotency key came with another body.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        return guard(conn, once, TrialView, lambda: _requeue(conn, known, number))


def _requeue(conn: sa.Connection, known: Known, number: int) -> TrialView:
    study = known.study
    row = lock(conn, study)
    trial_id = trials.find(conn, study, number)
    conn.execute(statements.LOCK_TRIAL, {"trial_id": trial_id})
    stored = conn.execute(statements.TRIAL_ROWS, {"trial_ids": [trial_id]}).one()
    if stored.state not in ("failed", "cancelled", "pruned", "infeasible"):
        raise Conflict(
            f"trial {number} is {stored.state}: only a failed, cancelled, pruned or infeasible one is tried again"
        )
    again = conn.execute(REPEATED, {"study": study, "number": str(number)}).scalar()
    if again is not None:
        raise Conflict(f"trial {again} is trying trial {number} again already")
    _refuse_if_over(row)
    flat = trials.flat_params(known, stored)
    new = writing.queue(conn, study, flat, reason=f"trial {number} once more", again=number)
    events.notify(conn, "work", study)
    events.notify(conn, "trial", study)
    return trials.view_of(conn, known, new)


def correct(desk: Desk, study: int, number: int, request: CorrectionRequest) -> TrialView:
    """Give a trial that has ended another outcome; what is suggested next follows it, in every process.

    Raises:
        NotFound: there is no such study or trial.
        Invalid: a complete trial without a value.
        Conflict: the trial has not ended, or was cancelled.
    """
    if request.outcome == "complete" and request.value is None:
        raise one_fault("value", "is missing: a complete trial has one", "the correction")
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        lock(conn, study)
        trial_id = trials.find(conn, study, number)
        conn.execute(statements.LOCK_TRIAL, {"trial_id": trial_id})
        view = trials.view_of(conn, known, trial_id)
        if view.state in ("queued", "leased", "cancelled"):
            raise Conflict(f"trial {number} is {view.state}: only a trial that has ended has an outcome to correct")
        value = None if request.outcome == "infeasible" else request.value
        corrections.overwrite(conn, known, trial_id, value, storable(request.reason) or CORRECTED)
        studies.settle(conn, known)
        events.notify(conn, "trial", study)
        return trials.view_of(conn, known, trial_id)


def _refuse_if_over(row: Any) -> None:
    if row.state == "stopped":
        raise Conflict("the study is stopped and leases nothing: set it running first")
    if row.state == "finished":
        raise Conflict(f"the study is finished ({row.reason}) and leases nothing: raise its budget first")
