"""The few ways in which a trial is written outside of a lease: queued, recorded, cancelled, ended.

Every function runs inside the caller's transaction, under the study's lock. A queued point is stored the way stock
Optuna's `enqueue_trial` stores it (WAITING, with `fixed_params`), so either may take it. A finished trial is never
opened again: stock readers remember it as finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import rows, statements
from hpo.desk import Known, storable
from hpo.protocol import Value

ORIGIN = "whetstone:origin"
REASON = "whetstone:reason"
CANCELLED = "whetstone:cancelled"
AGAIN = "whetstone:again"
INFEASIBLE = "constraints:infeasible"
FIXED = "fixed_params"

# Trials that a cancel has ended count no longer, if they were ever leased.
GIVEN_BACK = sa.text("""
    UPDATE whetstone.studies s SET trials_used = s.trials_used - begun.trials
    FROM (SELECT study_id, count(*) AS trials FROM whetstone.attempts
          WHERE attempt = 1 AND trial_id = ANY(CAST(:ids AS integer[])) GROUP BY study_id) AS begun
    WHERE s.study_id = begun.study_id
""")

WORST = sa.text("SELECT whetstone.worst(:study, NULL)")


def queue(
    conn: sa.Connection, study: int, flat: Mapping[str, Value], *, reason: str = "", again: int | None = None
) -> int:
    """Queue a point, whole or partial; return its trial id. `again` is the number of the trial that it repeats."""
    marks = _waits(flat)
    if reason:
        marks[REASON] = storable(reason)
    if again is not None:
        marks[AGAIN] = again
    return rows.insert_waiting(conn, study, [marks])[0]


def queue_all(
    conn: sa.Connection, study: int, points: Sequence[Mapping[str, Value]], reasons: Sequence[str] = ()
) -> None:
    """Queue points in their order, at the price of one; `reasons`, where given, are as many."""
    marks = [_waits(flat) for flat in points]
    for mark, reason in zip(marks, reasons, strict=False):
        mark[REASON] = storable(reason)
    rows.insert_waiting(conn, study, marks)


def _waits(flat: Mapping[str, Value]) -> dict[str, Any]:
    return {ORIGIN: "queued", FIXED: dict(flat)}


def record(
    conn: sa.Connection, known: Known, flat: Mapping[str, Value], outcome: str, value: float | None, reason: str
) -> int:
    """Record a finished trial that no worker of ours ran; return its trial id."""
    marks: dict[str, Any] = {ORIGIN: "recorded"}
    if reason:
        marks[REASON] = storable(reason)
    values: list[float] = []
    state = TrialState.FAIL
    if outcome in ("complete", "infeasible"):
        state = TrialState.COMPLETE
        marks[INFEASIBLE] = 1.0 if outcome == "infeasible" else 0.0
        values = [worst_value(conn, known) if value is None else value]
    return rows.insert_trial(conn, known.study, state, internal(known, flat), marks, values=values)[0]


def cancel(conn: sa.Connection, trial_id: int, why: str) -> None:
    """End an unfinished trial, whose row the caller holds, as cancelled."""
    cancel_all(conn, [trial_id], why)


def cancel_all(conn: sa.Connection, trial_ids: Sequence[int], why: str) -> None:
    """End unfinished trials, whose rows the caller holds, as cancelled. Those once begun give their budget back."""
    rows.fail_trials(conn, trial_ids, {CANCELLED: True, REASON: storable(why)})
    conn.execute(GIVEN_BACK, {"ids": list(trial_ids)})


def fail_queued(conn: sa.Connection, trial_id: int, why: str) -> bool:
    """End a queued trial as failed; False (and nothing is changed) if it is queued no more."""
    trial = conn.execute(statements.LOCK_TRIAL, {"trial_id": trial_id}).one_or_none()
    if trial is None or trial.state != "WAITING":
        return False
    return rows.finish_trial(conn, trial_id, TrialState.FAIL, system_attrs={REASON: storable(why)})


def internal(known: Known, flat: Mapping[str, Value]) -> dict[str, rows.Parameter]:
    """A flat point as Optuna stores it."""
    distributions = known.spec.space.distributions
    return {name: (distributions[name].to_internal_repr(value), distributions[name]) for name, value in flat.items()}


def worst_value(conn: sa.Connection, known: Known) -> float:
    """What an infeasible trial is worth that does not know: the worst feasible value so far, and else 0."""
    return float(conn.execute(WORST, {"study": known.study}).scalar_one())
