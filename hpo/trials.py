"""Trials as people see them: one row a trial whatever its attempts, in pages, never all at once.

State, value and parameters are read from Optuna's own rows and nowhere else. Pages are keyset pages: the cursor says
after which (value, number) to go on, so a page costs the same at the end of a long study as at its beginning.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, cast

import sqlalchemy as sa

from hpo import answers, statements
from hpo.desk import Desk, Known, one_fault
from hpo.errors import Invalid, NotFound
from hpo.protocol import Value
from hpo.views import (
    TRIAL_STATES,
    AttemptView,
    MetricPoint,
    OriginView,
    Page,
    ProgressPoint,
    TrialDetail,
    TrialState,
    TrialView,
)

MAX_LIMIT = 1000
Order = Literal["number", "-value", "value"]

FIND_TRIAL = sa.text("SELECT trial_id FROM public.trials WHERE study_id = :study AND number = :number")

# All attempts of one trial, in order.
ATTEMPTS = sa.text("""
    SELECT a.*, w.name AS worker,
           extract(epoch FROM coalesce(a.ended_at, clock_timestamp()) - a.leased_at) AS seconds
    FROM whetstone.attempts a LEFT JOIN whetstone.workers w ON w.worker_id = a.worker_id
    WHERE a.trial_id = ANY(CAST(:trial_ids AS integer[])) ORDER BY a.trial_id, a.attempt
""")

# The learning curve of one trial; on an epoch trained twice the later attempt speaks.
CURVE = sa.text("""
    SELECT DISTINCT ON (m.epoch) a.attempt, m.epoch, m.value, m.metrics, m.at
    FROM whetstone.attempts a JOIN whetstone.metrics m ON m.attempt_id = a.attempt_id
    WHERE a.trial_id = :trial_id ORDER BY m.epoch, a.attempt DESC
""")


def artifacts(study: int, number: int, attempt: int | None = None) -> str:
    """The folder of a trial, or of one attempt's checkpoints, relative to the artifacts root. Made of integers only."""
    trial = f"studies/{study}/trials/{number}"
    return trial if attempt is None else f"{trial}/attempts/{attempt}"


def listing(
    desk: Desk,
    study: int,
    *,
    state: str | None = None,
    order: str = "number",
    cursor: str | None = None,
    limit: int = 50,
) -> Page[TrialView]:
    """Return one page of a study's trials. Trials without a value come last in both orders by value.

    Raises:
        NotFound: there is no such study.
        Invalid: an unknown state or order, a limit outside of 1 to 1000, or a cursor that is not of this list.
    """
    if state is not None and state not in TRIAL_STATES:
        raise one_fault("state", f"is none of {', '.join(TRIAL_STATES)}")
    if order not in ("number", "-value", "value"):
        raise one_fault("order", "is none of number, -value, value")
    check_limit(limit)
    value, number = _read_cursor(cursor, order)
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        place: dict[str, Any] = {"study": study, "number": number, "limit": limit + 1}
        if order == "number":
            found = conn.execute(statements.trials_by_number(state), place).all()
        else:
            found = []
            if value is not None or number < 0:
                by_value = statements.trials_by_value(state, descending=order == "-value", cursor=value is not None)
                found = list(conn.execute(by_value, place | {"value": value}).all())
                number = -1
            if len(found) <= limit:
                place |= {"number": number, "limit": limit + 1 - len(found)}
                found += conn.execute(statements.trials_without_value(state), place).all()
        rows = found[:limit]
        items = views(conn, known, [row.trial_id for row in rows])
    after = pack_cursor(order, rows[-1].value, rows[-1].number) if len(found) > limit else None
    return Page[TrialView](items=items, next=after)


def get(desk: Desk, study: int, number: int) -> TrialDetail:
    """Return one trial with its attempts and its learning curve.

    Raises:
        NotFound: there is no such study or trial.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        trial_id = find(conn, study, number)
        view = view_of(conn, known, trial_id)
        history = attempts_of(conn, study, [(trial_id, number)])[trial_id]
        score = answers.score_of(conn, trial_id)
        curve = [MetricPoint.model_validate(row._asdict()) for row in conn.execute(CURVE, {"trial_id": trial_id})]
    saved = [attempt for attempt in history if attempt.checkpoint_epoch is not None]
    return TrialDetail(
        **view.model_dump(),
        seed=known.trial_seed(number),
        history=history,
        curve=curve,
        score=score,
        checkpoint=saved[-1].artifacts if saved else None,
    )


def best(desk: Desk, study: int, top: int = 10) -> list[TrialView]:
    """Return the best complete trials, the best first; infeasible ones are never among them.

    Raises:
        NotFound: there is no such study.
        Invalid: `top` is outside of 1 to 1000.
    """
    check_limit(top, at="top")
    with desk.transaction() as conn:
        return best_of(conn, desk.known(conn, study), top)


def best_of(conn: sa.Connection, known: Known, top: int) -> list[TrialView]:
    found = conn.execute(statements.best_trials(known.spec.direction), {"study": known.study, "limit": top})
    return views(conn, known, [row.trial_id for row in found])


def best_of_each(conn: sa.Connection, studies: Sequence[Known]) -> dict[int, TrialView]:
    """The best complete trial of each study that has one, by study, in few statements whatever their number."""
    by_study = {known.study: known for known in studies}
    found: list[int] = []
    for direction in {known.spec.direction for known in studies}:
        alike = [known.study for known in studies if known.spec.direction == direction]
        asked = {"studies": alike, "limit": 1}
        found += [row.trial_id for row in conn.execute(statements.best_of_each(direction), asked)]
    if not found:
        return {}
    rows = conn.execute(statements.TRIAL_ROWS, {"trial_ids": found})
    return {row.study_id: _view(row, by_study[row.study_id]) for row in rows}


def progress(desk: Desk, study: int) -> list[ProgressPoint]:
    """Return every finished trial in order of finishing, with the best value so far.

    Raises:
        NotFound: there is no such study.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
        rows = conn.execute(statements.progress(known.spec.direction), {"study": study})
        return [
            ProgressPoint(trial=row.number, state=row.state, value=row.value, best=row.best, ended_at=row.ended_at)
            for row in rows
        ]


def find(conn: sa.Connection, study: int, number: int) -> int:
    """Return Optuna's trial id of a study's trial.

    Raises:
        NotFound: there is none with that number.
    """
    trial_id: int | None = conn.execute(FIND_TRIAL, {"study": study, "number": number}).scalar()
    if trial_id is None:
        raise NotFound(f"study {study} has no trial {number}")
    return trial_id


def view_of(conn: sa.Connection, known: Known, trial_id: int) -> TrialView:
    return views(conn, known, [trial_id])[0]


def views(conn: sa.Connection, known: Known, trial_ids: Sequence[int]) -> list[TrialView]:
    """Read the rows of these trials, in this order, in one statement."""
    if not trial_ids:
        return []
    rows = conn.execute(statements.TRIAL_ROWS, {"trial_ids": list(trial_ids)})
    return [_view(row, known) for row in rows]


def attempts_of(conn: sa.Connection, study: int, trials: Sequence[tuple[int, int]]) -> dict[int, list[AttemptView]]:
    """Read the attempts of some trials, given as (trial id, number)."""
    found: dict[int, list[AttemptView]] = {trial_id: [] for trial_id, _ in trials}
    numbers = dict(trials)
    for row in conn.execute(ATTEMPTS, {"trial_ids": list(found)}):
        found[row.trial_id].append(
            AttemptView(
                lease=row.attempt_id,
                attempt=row.attempt,
                state=row.state,
                worker=row.worker,
                device=row.device,
                leased_at=row.leased_at,
                renewed_at=row.renewed_at,
                ended_at=row.ended_at,
                seconds=max(0.0, float(row.seconds)),
                reason=row.reason,
                traceback=row.traceback,
                artifacts=artifacts(study, numbers[row.trial_id], row.attempt),
                checkpoint_epoch=row.checkpoint_epoch,
                resumed_from=row.resumed_from,
            )
        )
    return found


def flat_params(known: Known, row: Any, marks: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """A trial's values by flat name: what was fixed when it was queued, under what was suggested since."""
    fixed = (marks_of(row) if marks is None else marks).get("fixed_params")
    return flat_of(known, fixed, row.names or (), row.internals or ())


def flat_of(known: Known, fixed: object, names: Sequence[str], internals: Sequence[float]) -> dict[str, Value]:
    """The same of what was fixed and of the parameters as Optuna stores them."""
    distributions = known.spec.space.distributions
    flat: dict[str, Value] = {}
    if isinstance(fixed, Mapping):  # stock Optuna's enqueue_trial takes anything
        flat = {name: value for name, value in fixed.items() if name in distributions and _plain(value)}
    for name, internal in zip(names, internals, strict=True):
        if name in distributions:
            flat[name] = cast(Value, distributions[name].to_external_repr(internal))
    return flat


def marks_of(row: Any) -> dict[str, Any]:
    """A trial's system attributes that are ours, and its fixed parameters."""
    return {key: json.loads(text) for key, text in zip(row.keys or (), row.marks or (), strict=True)}


def _plain(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _view(row: Any, known: Known) -> TrialView:
    marks = marks_of(row)
    state = cast(TrialState, row.state)
    finished = state not in ("queued", "leased")
    started: datetime | None = row.first_leased_at or row.started_at
    ended: datetime | None = row.ended_at if finished else None
    seconds = float(row.seconds or 0.0)
    if not row.attempts and started and ended:
        seconds = (ended - started).total_seconds()
    reason = str(marks.get("whetstone:reason", ""))
    if state == "leased" and row.stop_requested:
        reason = f"asked to stop: {row.stop_requested}"
    elif state == "queued" and row.attempts:
        reason = row.last_reason
    return TrialView(
        study=row.study_id,
        trial=row.number,
        state=state,
        value=row.value,
        params=known.spec.space.nest(flat_params(known, row, marks)),
        origin=_origin(marks),
        reason=reason,
        attempts=row.attempts,
        worker=row.worker,
        epoch=row.last_epoch,
        started_at=started,
        ended_at=ended,
        seconds=max(0.0, seconds),
        seeded_from=_seeded_from(marks),
    )


def _origin(marks: Mapping[str, Any]) -> Literal["suggested", "queued", "recorded", "seeded"]:
    origin = marks.get("whetstone:origin")
    if origin in ("suggested", "queued", "recorded", "seeded"):
        return cast(Literal["suggested", "queued", "recorded", "seeded"], origin)
    return "queued" if "fixed_params" in marks else "suggested"


def _seeded_from(marks: Mapping[str, Any]) -> OriginView | None:
    match marks.get("whetstone:seeded_from"):
        case [int(study), int(trial)]:
            return OriginView(study=study, trial=trial)
    return None


def check_limit(limit: int, at: str = "limit") -> None:
    """Raise `Invalid` unless `limit` is within 1 and 1000."""
    if not 1 <= limit <= MAX_LIMIT:
        raise one_fault(at, f"must be 1 to {MAX_LIMIT}")


def pack_cursor(*parts: str | int | float | None) -> str:
    """Make an opaque cursor."""
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def unpack_cursor(cursor: str) -> list[Any]:
    """Read an opaque cursor.

    Raises:
        Invalid: it was damaged, or never made here.
    """
    try:
        parts = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        raise damaged_cursor() from None
    if not isinstance(parts, list):
        raise damaged_cursor()
    return parts


def damaged_cursor() -> Invalid:
    return one_fault("cursor", "is not one that this list has given: begin again without a cursor")


def _read_cursor(cursor: str | None, order: str) -> tuple[float | None, int]:
    if cursor is None:
        return None, -1
    match unpack_cursor(cursor):
        case [str(kind), value, int(number)] if kind == order and 0 <= number < 2**31 and not isinstance(number, bool):
            if value is None or (order != "number" and isinstance(value, float) and math.isfinite(value)):
                return value, number
    raise damaged_cursor()
