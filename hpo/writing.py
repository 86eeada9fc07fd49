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

# The last finite value that a trial reported.
LAST_REPORT = sa.text("""
    SELECT intermediate_value FROM public.trial_intermediate_values
    WHERE trial_id = :trial_id AND intermediate_value_type = 'FINITE' ORDER BY step DESC LIMIT 1
""")


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


def queue_all(conn: sa.Connection, study: int, points: Sequence[Mapping[str, Value]]) -> None:
    """Queue points in their order, at the price of one."""
    rows.insert_waiting(conn, study, [_waits(flat) for flat in points])


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


def cancel(conn: sa.Connection, trial_id: int, why: str) -> bool:
    """End an unfinished trial as cancelled; False if it had ended."""
    marks = {CANCELLED: True, REASON: storable(why)}
    return rows.finish_trial(conn, trial_id, TrialState.FAIL, system_attrs=marks)


def cancel_all(conn: sa.Connection, trial_ids: Sequence[int], why: str) -> None:
    """End unfinished trials, whose rows the caller holds, as cancelled."""
    rows.fail_trials(conn, trial_ids, {CANCELLED: True, REASON: storable(why)})


def fail(conn: sa.Connection, trial_id: int, why: str) -> bool:
    """End an unfinished trial as failed; False if it had ended."""
    return rows.finish_trial(conn, trial_id, TrialState.FAIL, system_attrs={REASON: storable(why)})


def internal(known: Known, flat: Mapping[str, Value]) -> dict[str, rows.Parameter]:
    """A flat point as Optuna stores it."""
    distributions = known.spec.space.distributions
    return {name: (distributions[name].to_internal_repr(value), distributions[name]) for name, value in flat.items()}


def worst_value(conn: sa.Connection, known: Known, trial_id: int | None = None) -> float:
    """What an infeasible trial is worth that does not know: the worst feasible value so far.

    Where there is none yet it is the last value the trial itself reported, and else 0: its constraint, not this
    number, is what tells samplers that it is bad.
    """
    opposite = "minimize" if known.spec.direction == "maximize" else "maximize"
    worst = conn.execute(statements.best_trials(opposite), {"study": known.study, "limit": 1}).one_or_none()
    if worst is not None:
        return float(worst.value)
    last = None if trial_id is None else last_report(conn, trial_id)
    return 0.0 if last is None else last


def last_report(conn: sa.Connection, trial_id: int) -> float | None:
    value: float | None = conn.execute(LAST_REPORT, {"trial_id": trial_id}).scalar()
    return value
