"""Studies: launched, listed, steered, finished and deleted.

A study is running, paused (no new leases), stopped (queued trials cancelled, running ones asked to stop) or finished
(its budget is spent and no begun trial is open). Whoever ends a trial calls `settle` in the same transaction, so there
is no moment at which the last trial is done and its study is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection

from hpo import events, feasibility, fixed, seeding, statements, trials, writing
from hpo.database import retrying
from hpo.desk import HISTORY_FORMAT, Desk, Known, lock, missing, one_fault, storable, too_new
from hpo.document import tidy
from hpo.errors import Conflict, Fault, Invalid
from hpo.idempotency import Once, answered, guard
from hpo.spec import UNSET, StudyChange, StudySpec, dump, parse, parse_change, read_seeds
from hpo.views import STUDY_STATES, TRIAL_STATES, BudgetView, Page, SeedView, StudyView, TrialView

_ALLOWED = {
    "running": ("paused", "stopped"),
    "paused": ("running", "stopped"),
    "stopped": ("running",),
    "finished": ("running",),
}

INSERT = sa.text("""
    INSERT INTO whetstone.studies
        (study_id, spec, workload, seed, budget_trials, budget_hours, budget_target, concurrency, max_attempts, notes,
         fixed)
    VALUES (:study, CAST(:spec AS jsonb), :workload, :seed, :trials, :hours, :target, :concurrency, :attempts, :notes,
            CAST(:fixed AS jsonb))
""")

CHANGE = sa.text("""
    UPDATE whetstone.studies
    SET budget_trials = :trials, budget_hours = :hours, budget_target = :target, concurrency = :concurrency,
        notes = :notes, fixed = CAST(:fixed AS jsonb)
    WHERE study_id = :study
""")

SET_STATE = sa.text("""
    UPDATE whetstone.studies
    SET state = :state, reason = :reason,
        finished_at = CASE WHEN :state IN ('stopped', 'finished') THEN clock_timestamp() END
    WHERE study_id = :study
""")

# Trials that no worker holds end where their study is stopped.
QUEUED = sa.text("""
    SELECT trial_id FROM public.trials WHERE study_id = :study AND state = 'WAITING' ORDER BY trial_id FOR UPDATE
""")

# Trials that a worker holds are asked for.
ASK_TO_STOP = sa.text("""
    UPDATE whetstone.attempts SET stop_requested = :why
    WHERE study_id = :study AND state = 'leased' AND stop_requested = ''
""")

SETTLE = sa.text("SELECT whetstone.settle(:study)")
SPENT = sa.text("SELECT whetstone.spent(:study)")

NAMED = sa.text("SELECT study_id FROM public.studies WHERE study_name = :name")
LIVE = sa.text("SELECT count(*) FROM whetstone.attempts WHERE study_id = :study AND state = 'leased'")
LOCK_TRIALS = sa.text("SELECT trial_id FROM public.trials WHERE study_id = :study ORDER BY trial_id FOR UPDATE")


@dataclass(frozen=True)
class Used:
    """What of its budget a study has used."""

    trials: int
    hours: float


def create(desk: Desk, document: object, once: Once | None = None) -> StudyView:
    """Launch a study, with what its sources know and its points queued, in this order.

    Raises:
        Invalid: names every fault of the document and of what it is to be seeded from.
        Conflict: a study of that name is there already, and that is all that is wrong.
        KeyReused: the idempotency key came with another body.
    """
    if once is not None:
        with desk.transaction() as conn:
            earlier = answered(conn, once, StudyView)
        if earlier is not None:
            return earlier
    try:
        spec = parse(document, desk.workloads)
    except Invalid as error:
        raise Invalid([*error.faults, *_unstorable(desk, document, error.faults)], what="the study") from None
    try:
        with desk.transaction() as conn:
            return guard(conn, once, StudyView, lambda: store(desk, conn, spec))
    except DuplicatedStudyError:
        faults = _unstorable(desk, document, ())
        if len(faults) > 1:
            raise Invalid(faults, what="the study") from None
        raise Conflict(_taken(spec.name)) from None


def _unstorable(desk: Desk, document: object, faults: Sequence[Fault]) -> list[Fault]:
    """What the database has against a document beside the faults that were found in it: its name, its sources."""
    if not isinstance(document, Mapping) or not tidy(document)[1]:
        return []
    spotted = {re.split(r"[.\[]", fault.at)[0] for fault in faults}
    name = document.get("name")
    found: list[Fault] = []
    with desk.transaction() as conn:
        if "name" not in spotted and conn.execute(NAMED, {"name": name}).scalar() is not None:
            found.append(Fault("name", _taken(str(name))))
        if "seed_from" not in spotted:
            found += seeding.absent(desk, conn, read_seeds(document.get("seed_from"))[0])
    return found


def _taken(name: str) -> str:
    return f"there is a study named {name!r} already: choose another name"


def store(desk: Desk, conn: sa.Connection, spec: StudySpec) -> StudyView:
    """Store a study that was read, with its queued points. Raises `DuplicatedStudyError` where its name is taken."""
    direction = StudyDirection.MAXIMIZE if spec.direction == "maximize" else StudyDirection.MINIMIZE
    study = desk.storage.create_new_study([direction], spec.name)
    row = {
        "study": study,
        "spec": json.dumps(dump(spec)),
        "workload": spec.workload,
        "seed": spec.seed,
        "trials": spec.budget.trials,
        "hours": spec.budget.hours,
        "target": spec.budget.target,
        "concurrency": spec.concurrency,
        "attempts": spec.max_attempts,
        "notes": spec.notes,
        "fixed": json.dumps(spec.fixed),
    }
    conn.execute(INSERT, row)
    seeding.sow(desk, conn, study, spec)
    writing.queue_all(conn, study, spec.points)
    events.notify(conn, "study", study)
    events.notify(conn, "work", study)
    # Nothing may be remembered of a study that could still be rolled back.
    return view_of(conn, desk.fresh(study, spec))


def listing(
    desk: Desk, *, state: str | None = None, name: str | None = None, cursor: str | None = None, limit: int = 50
) -> Page[StudyView]:
    """Return one page of the studies, the newest first.

    `name` selects the studies whose name contains it, in any case; the one that is exactly that comes first.

    Raises:
        Invalid: an unknown state, a limit outside of 1 to 1000, or a cursor that is not of this list.
    """
    if state is not None and state not in STUDY_STATES:
        raise one_fault("state", f"is none of {', '.join(STUDY_STATES)}")
    trials.check_limit(limit)
    if name is not None and storable(name) != name:
        raise one_fault("name", "has a character that no name has")
    before: int | None = None
    if cursor is not None:
        match trials.unpack_cursor(cursor):
            case ["studies", None]:
                pass
            case ["studies", int(number)] if 0 <= number < 2**31 and not isinstance(number, bool):
                before = number
            case _:
                raise trials.damaged_cursor()
    asked = {"state": state, "name": name, "first": cursor is None, "before": before, "limit": limit + 1}
    with desk.transaction() as conn:
        rows = conn.execute(statements.STUDIES, asked).all()
        readable = [row for row in rows[:limit] if row.format <= HISTORY_FORMAT]
        read = {view.study: view for view in _views(conn, [(desk.of_row(row), row) for row in readable])}
        items = [read.get(row.study_id) or _closed(row) for row in rows[:limit]]
    if len(rows) <= limit:
        return Page[StudyView](items=items)
    # The exact match stands outside of the order, so a page that shows only it goes on from the beginning.
    ordered = [row.study_id for row in rows[:limit] if row.study_name != name]
    return Page[StudyView](items=items, next=trials.pack_cursor("studies", ordered[-1] if ordered else None))


def get(desk: Desk, study: int) -> StudyView:
    """Return one study.

    Raises:
        NotFound: there is none with that id.
    """
    with desk.transaction() as conn:
        row = conn.execute(statements.STUDY, {"study": study}).one_or_none()
        if row is None:
            desk.forget(study)
            raise missing(study)
        return _views(conn, [(desk.of_row(row), row)])[0]


def patch(desk: Desk, study: int, document: object) -> StudyView:
    """Change a study's state, budget, concurrency, notes or fixed parameters while it runs.

    A finished study whose budget is raised runs again; one whose new budget is spent already finishes when its running
    trials have. A stopped study may run again: what was cancelled stays so until it is queued anew.
    What is fixed counts from the next suggestion on: trials that run or are queued keep their points.

    Raises:
        NotFound: there is none with that id.
        Invalid: names every fault of the change.
        Conflict: the study's state does not allow it; the message names what is allowed.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
    change = parse_change(document, known.spec.space)
    with desk.transaction() as conn:
        row = lock(conn, study)
        _store(desk, conn, known, row, change)
        row = reread(conn, study)
        state = row.state
        if state == "finished" and spent(conn, study) is None:
            set_state(conn, study, "running", "")
            state = "running"
        if change.state is not None and change.state != state:
            _move(conn, row, state, change.state)
        settle(conn, known)
        events.notify(conn, "study", study)
        events.notify(conn, "work", study)
        return view_of(conn, known)


def _store(desk: Desk, conn: sa.Connection, known: Known, row: Any, change: StudyChange) -> None:
    budget = {"trials": row.budget_trials, "hours": row.budget_hours, "target": row.budget_target} | dict(change.budget)
    concurrency = row.concurrency if change.concurrency is UNSET else change.concurrency
    notes = row.notes if change.notes is None else change.notes
    held = fixed.merged(known.spec.space, row.fixed, change.fixed)
    workload = desk.workloads.get(known.spec.workload)
    if change.fixed and workload is not None:
        faults = feasibility.fixed_faults(known.spec.space, workload, known.spec.settings, held)
        if faults:
            raise Invalid(faults, what="the change")
    changed = {"concurrency": concurrency, "notes": notes, "fixed": json.dumps(held)}
    conn.execute(CHANGE, {"study": row.study_id, **budget, **changed})


def _move(conn: sa.Connection, row: Any, state: str, wanted: str) -> None:
    if state == "finished":
        # Had its budget been raised, it would be running by now.
        raise Conflict(f"the study is finished ({row.reason}): to go on, raise its budget")
    if wanted not in _ALLOWED[state]:
        raise Conflict(f"a {state} study cannot become {wanted}; it can become {' or '.join(_ALLOWED[state])}")
    if wanted == "stopped":
        stop(conn, row.study_id)
    set_state(conn, row.study_id, wanted, "stopped by a person" if wanted == "stopped" else "")


def stop(conn: sa.Connection, study: int) -> None:
    """Cancel what is queued and ask what is running to stop. The caller holds the study's lock and sets its state."""
    why = "the study was stopped"
    writing.cancel_all(conn, conn.execute(QUEUED, {"study": study}).scalars().all(), why)
    conn.execute(ASK_TO_STOP, {"study": study, "why": why})


def delete(desk: Desk, study: int) -> None:
    """Delete a study with all its trials and attempts. Checkpoints in the artifacts folder stay.

    Raises:
        NotFound: there is none with that id.
        Conflict: workers hold trials of it and it has not been stopped.
    """

    def work(conn: sa.Connection) -> None:
        desk.known(conn, study)
        conn.execute(statements.LOCK_STUDY_TO_DELETE, {"study": study})
        row = reread(conn, study)
        live = conn.execute(LIVE, {"study": study}).scalar_one()
        if live and row.state != "stopped":
            held = "1 trial of it is" if live == 1 else f"{live} trials of it are"
            raise Conflict(f"{held} leased: stop the study first, then delete it")
        # Trials before what hangs on them: the order in which reports take their locks.
        conn.execute(LOCK_TRIALS, {"study": study})
        desk.storage.delete_study(study)
        events.notify(conn, "study", study)

    # A report that sets an attribute of the study holds its trial first: where the two meet, this one gives way.
    retrying(desk.engine, work, attempts=2)
    desk.forget(study)


def set_state(conn: sa.Connection, study: int, state: str, reason: str) -> None:
    conn.execute(SET_STATE, {"study": study, "state": state, "reason": reason})


def settle(conn: sa.Connection, known: Known) -> None:
    """Finish the study if its budget is spent and nothing begun is open. The caller holds the study's lock."""
    conn.execute(SETTLE, {"study": known.study})


def reread(conn: sa.Connection, study: int) -> Any:
    row = conn.execute(statements.STUDY, {"study": study}).one_or_none()
    if row is None:
        raise missing(study)
    return row


def spent(conn: sa.Connection, study: int) -> str | None:
    """Say which budget of a study is spent, or return None. The caller holds the study's lock."""
    why: str | None = conn.execute(SPENT, {"study": study}).scalar_one()
    return why


def used_by(conn: sa.Connection, study_ids: Sequence[int]) -> dict[int, Used]:
    rows = conn.execute(statements.USED, {"studies": list(study_ids)})
    return {row.study_id: Used(int(row.trials), float(row.hours)) for row in rows}


def view_of(conn: sa.Connection, known: Known) -> StudyView:
    return _views(conn, [(known, reread(conn, known.study))])[0]


def _views(conn: sa.Connection, pairs: Sequence[tuple[Known, Any]]) -> list[StudyView]:
    study_ids = [known.study for known, _ in pairs]
    if not study_ids:
        return []
    used = used_by(conn, study_ids)
    best = trials.best_of_each(conn, [known for known, _ in pairs])
    counts = {study: dict.fromkeys(TRIAL_STATES, 0) for study in study_ids}
    for row in conn.execute(statements.COUNTS, {"studies": study_ids, "few": statements.LOOKED_UP}):
        counts[row.study_id][row.state] = row.trials
    seeds = seeding.of_studies(conn, [known.study for known, _ in pairs if known.spec.seed_from])
    return [
        _view(known, row, counts[known.study], used[known.study], best.get(known.study), seeds.get(known.study, []))
        for known, row in pairs
    ]


def _closed(row: Any) -> StudyView:
    """A study of a newer format in a list: what its row says, and why no more. Its spec may be of any shape."""
    budget = {"trials": row.budget_trials, "hours": row.budget_hours, "target": row.budget_target}
    names = {part: row.spec.get(part) for part in ("sampler", "pruner")}
    return StudyView(
        study=row.study_id,
        name=row.study_name,
        description=str(row.spec.get("description", "")),
        state=row.state,
        reason=row.reason,
        workload=row.workload,
        direction="maximize" if row.direction == "MAXIMIZE" else "minimize",
        **{part: str(value.get("name", "")) if isinstance(value, dict) else "" for part, value in names.items()},
        counts=dict.fromkeys(TRIAL_STATES, 0),
        best=None,
        budget=BudgetView(**budget, trials_used=row.trials_used, hours_used=row.seconds_used / 3600),
        concurrency=row.concurrency,
        notes=row.notes,
        created_at=row.created_at,
        finished_at=row.finished_at,
        spec=row.spec,
        unreadable=too_new(row.format),
    )


def _view(
    known: Known, row: Any, counts: dict[Any, int], used: Used, best: TrialView | None, seeds: list[SeedView]
) -> StudyView:
    budget = {"trials": row.budget_trials, "hours": row.budget_hours, "target": row.budget_target}
    held = known.spec.space.nest(known.spec.space.cast(row.fixed))
    spec = row.spec | {"budget": budget, "concurrency": row.concurrency, "notes": row.notes, "fixed": held}
    return StudyView(
        study=row.study_id,
        name=row.study_name,
        description=known.spec.description,
        state=row.state,
        reason=row.reason,
        workload=row.workload,
        direction=known.spec.direction,
        sampler=row.spec["sampler"]["name"],
        pruner=row.spec["pruner"]["name"],
        counts=dict(counts),
        best=best,
        budget=BudgetView(**budget, trials_used=used.trials, hours_used=used.hours),
        concurrency=row.concurrency,
        notes=row.notes,
        created_at=row.created_at,
        finished_at=row.finished_at,
        spec=spec,
        fixed=held,
        picked=row.picked,
        seeded=seeds,
    )
