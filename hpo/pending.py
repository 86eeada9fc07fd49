"""Suggestions without a lease: an Optuna trial that runs until somebody writes its outcome or deletes it.

Whetlab's clients have no heartbeat, so a pending trial never expires and no worker is behind it. A new point is
sampled as for a lease: outside of any transaction, under the study's lock in this process, and stored in a short
transaction that looks at number, state and budget again. Invariant: what is stored was chosen with every trial of a
smaller number in sight, so two suggestions differ while the space holds another point. Queued points go first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import corrections, events, rows, statements, studies, trials, writing
from hpo.desk import Desk, Known, lock, log
from hpo.errors import Busy, Conflict, DatabaseUnavailable, NotFound
from hpo.protocol import MAX_WAIT_S, Value
from hpo.suggest import NothingFeasible, Suggestion

MAX_ROUNDS = 50

# The first queued point that was never begun; what a worker has begun goes on with a worker.
HEAD = sa.text("""
    SELECT t.trial_id, t.number FROM public.trials t
    WHERE t.study_id = :study AND t.state = 'WAITING'
      AND NOT EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = t.trial_id)
    ORDER BY t.number LIMIT 1
""")

NEXT_NUMBER = sa.text("SELECT coalesce(max(number) + 1, 0) FROM public.trials WHERE study_id = :study")

# Points handed out here: they count in a budget of trials beside those that were leased.
HANDED_OUT = sa.text(f"""
    SELECT count(*) FROM public.trials t
    JOIN public.trial_system_attributes o ON o.trial_id = t.trial_id AND o.key = 'whetstone:origin'
    WHERE t.study_id = :study AND t.state <> 'WAITING' AND o.value_json IN ('"suggested"', '"queued"')
      AND NOT EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = t.trial_id)
      AND NOT (t.state = 'FAIL' AND {statements.CANCELLED})
""")  # noqa: S608

# What the sampler "auto" stands for at this moment, for the study's view.
PICKED = sa.text("UPDATE whetstone.studies SET picked = CAST(:picked AS jsonb) WHERE study_id = :study")


@dataclass(frozen=True)
class _Next:
    """The number that the next suggestion has, and the queued trial that it is, if any, with its values so far."""

    number: int
    trial_id: int | None
    given: Mapping[str, Value]


def suggest(desk: Desk, study: int) -> int:
    """Suggest a point; return the id of the trial that waits for its outcome.

    Raises:
        NotFound: there is no such study.
        Conflict: the study has nothing to give; the message says why.
        Busy: others are being served.
    """
    with desk.transaction() as conn:
        known = desk.known(conn, study)
    if known.unusable:
        raise Conflict(f"this server cannot sample for the experiment: {known.unusable}")
    if not known.sampling.acquire(timeout=MAX_WAIT_S):
        raise Busy("others are waiting for a suggestion of this experiment: ask again")
    try:
        for _ in range(MAX_ROUNDS):
            made = _once(desk, known)
            if made is not None:
                return made
    finally:
        known.sampling.release()
    raise Busy("the experiment changed too often while a suggestion was made: ask again")


def _once(desk: Desk, known: Known) -> int | None:
    """Make one suggestion and store it; None where the study changed meanwhile."""
    with desk.transaction() as conn:
        found = _look(conn, known)
    known.history.refresh()  # after the number was read: it holds every trial of a smaller one
    try:
        made = known.suggester.next(found.number, found.given)
    except (NotFound, DatabaseUnavailable):
        raise
    except Exception as error:
        if found.trial_id is None or not isinstance(error, NothingFeasible):
            log.exception("study %d: the sampler failed", known.study)
            raise Conflict(f"the sampler failed: {type(error).__name__}: {error}") from error
        with desk.transaction() as conn:  # a queued point that nobody can evaluate must not stand in the way
            lock(conn, known.study)
            if writing.fail_queued(conn, found.trial_id, f"never begun: {error}"):
                events.notify(conn, "trial", known.study)
        return None
    with desk.transaction() as conn:
        lock(conn, known.study)
        if _look(conn, known) != found:
            return None
        trial_id = _write(desk, conn, known, found, made)
    known.suggester.foresee(found.number + 1)
    return trial_id


def _look(conn: sa.Connection, known: Known) -> _Next:
    """See what is next. Raises `Conflict` where state or budget allow no suggestion."""
    row = studies.reread(conn, known.study)
    if row.state != "running":
        raise Conflict(f"the experiment is {row.state}" + (f" ({row.reason})" if row.reason else ""))
    spent = studies.spent(conn, known.study)
    if spent is None and row.budget_trials is not None:
        handed_out = conn.execute(HANDED_OUT, {"study": known.study}).scalar_one()
        if studies.used_by(conn, [known.study])[known.study].trials + handed_out >= row.budget_trials:
            spent = f"all {row.budget_trials} trials have been handed out"
    if spent is not None:
        raise Conflict(f"the experiment's budget is spent: {spent}")
    fixed: dict[str, Value] = dict(row.fixed)
    head = conn.execute(HEAD, {"study": known.study}).one_or_none()
    if head is None:
        return _Next(conn.execute(NEXT_NUMBER, {"study": known.study}).scalar_one(), None, fixed)
    stored = conn.execute(statements.TRIAL_ROWS, {"trial_ids": [head.trial_id]}).one()
    return _Next(head.number, head.trial_id, fixed | trials.flat_params(known, stored))


def _write(desk: Desk, conn: sa.Connection, known: Known, found: _Next, made: Suggestion) -> int | None:
    if made.pick is not None:
        picked = {"sampler": made.pick.choice.name, "why": made.pick.why}
        conn.execute(PICKED, {"study": known.study, "picked": json.dumps(picked)})
    for key, value in made.study_system_attrs.items():
        desk.storage.set_study_system_attr(known.study, key, value)
    trial_id = found.trial_id
    if trial_id is None:
        trial_id = add(conn, known, made.params, {writing.ORIGIN: "suggested", **made.trial_system_attrs})
    else:
        if not rows.move_trial(conn, trial_id, TrialState.RUNNING):
            return None  # stock Optuna has taken it
        rows.add_params(conn, trial_id, writing.internal(known, made.params))
        rows.set_system_attrs(conn, trial_id, made.trial_system_attrs)
        corrections.note(conn, known.study, trial_id, "begun")
    events.notify(conn, "trial", known.study)
    return trial_id


def add(conn: sa.Connection, known: Known, flat: Mapping[str, Value], marks: Mapping[str, Any]) -> int:
    """Store a point whose outcome is to come; return its trial id. The caller holds the study's lock."""
    return rows.insert_trial(conn, known.study, TrialState.RUNNING, writing.internal(known, flat), marks)[0]
