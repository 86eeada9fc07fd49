"""Leases: the one way in which a trial comes into a worker's hands.

The invariant: a trial has at most one live attempt, and that attempt's token is larger than all before it. A new point
is sampled outside of any transaction, under the study's lock in this process; the short transaction after it locks the
study's row, looks at state, budget and concurrency again, and writes trial, parameters, attributes and attempt
together. Whatever changed meanwhile sends it back to the beginning; nothing half-made is left.

Queued trials go first: those between two attempts before points that were never begun, then by number. A trial once
begun may always be taken up again; only a trial's first lease counts against the budget.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import events, fleet, rows, statements, studies, trials, writing
from hpo.desk import Desk, Known, lock, log, storable
from hpo.errors import Conflict, DatabaseUnavailable, KeyReused, NotFound
from hpo.idempotency import Once, answered, guard
from hpo.protocol import MAX_WAIT_S, AskRequest, ClaimRequest, Lease, Value
from hpo.spec import EXTERNAL
from hpo.suggest import NothingFeasible, Suggestion, suggest
from hpo.tokens import Principal

MAX_ROUNDS = 50
"""A round fails only because somebody else got on; after so many in a row the others are given way to."""
FAILURES_BEFORE_PAUSE = 3

# Studies that may have work, those with the fewest leases first, then the oldest.
CANDIDATES = sa.text("""
    SELECT s.study_id FROM whetstone.studies s
    CROSS JOIN LATERAL (
        SELECT count(*) AS leased FROM whetstone.attempts a WHERE a.study_id = s.study_id AND a.state = 'leased'
    ) l
    WHERE s.state = 'running' AND s.workload <> :external AND (s.concurrency IS NULL OR l.leased < s.concurrency)
    ORDER BY l.leased, s.study_id
""")

# The first of the queue. `begun_only`: the budget is spent, so only what was begun goes on.
HEAD = sa.text("""
    SELECT t.trial_id, t.number, b.begun FROM public.trials t
    CROSS JOIN LATERAL (SELECT EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = t.trial_id) AS begun) b
    WHERE t.study_id = :study AND t.state = 'WAITING' AND (b.begun OR NOT :begun_only)
    ORDER BY b.begun DESC, t.number LIMIT 1
""")

NEXT_NUMBER = sa.text("SELECT coalesce(max(number) + 1, 0) FROM public.trials WHERE study_id = :study")

# What the earlier attempts of a trial come to: how many, the newest that left a checkpoint, the last epoch reported.
EARLIER = sa.text("""
    SELECT coalesce(max(attempt), 0) AS attempts, max(last_epoch) AS last_epoch,
           max(attempt) FILTER (WHERE checkpoint_epoch IS NOT NULL) AS saved
    FROM whetstone.attempts WHERE trial_id = :trial_id
""")

# The lease itself. Its token is the next of a sequence; its term counts from now, not from when the transaction began.
ATTEMPT = sa.text("""
    INSERT INTO whetstone.attempts (study_id, trial_id, trial_number, attempt, token, worker_id, bearer, device,
                                    resumed_from, leased_at, renewed_at, expires_at)
    SELECT :study, :trial_id, :number, :attempt, nextval('whetstone.fencing'), :worker_id, :bearer, :device,
           :resumed_from, clock.now, clock.now, clock.now + make_interval(secs => :term_s)
    FROM (SELECT clock_timestamp() AS now) AS clock
    RETURNING attempt_id, token
""")


@dataclass(frozen=True)
class Head:
    """The queued trial that is next. `given` are its flat values so far; `whole` says that all are stored."""

    trial_id: int
    number: int
    given: Mapping[str, Value]
    whole: bool


@dataclass(frozen=True)
class Bearer:
    """Who gets the lease."""

    principal: Principal
    worker_id: int
    device: str


class _Changed(Exception):
    """Somebody was quicker: the transaction rolls back, and all is looked at again."""


class _Nothing(Exception):
    """The study has no lease to give; the reason is for people."""


class _Busy(Exception):
    """Others are being served with this study, and the time to wait for them is over."""


def claim(desk: Desk, request: ClaimRequest, principal: Principal, once: Once | None = None) -> Lease | None:
    """Give a worker a trial of any running study, or None when there is none to give.

    Among several studies the one with the fewest leased trials is asked first, then the oldest. A study whose sampler
    fails is passed over; after three failures in a row it is paused with the reason.

    Raises:
        KeyReused: the idempotency key came with another body.
    """
    with desk.transaction() as conn:
        worker = fleet.seen(
            conn,
            principal,
            request.worker,
            device=request.device,
            memory_bytes=request.memory_bytes,
            version=request.version,
        )
        earlier = answered(conn, once, Lease)
        found = conn.execute(CANDIDATES, {"external": EXTERNAL}).scalars().all()
    if earlier is not None or worker.draining:
        return earlier
    bearer = Bearer(principal, worker.worker_id, worker.device)
    deadline = time.monotonic() + MAX_WAIT_S
    # First the studies where nobody is sampling at this moment, then the others, one after another.
    for patience in (0.0, None):
        busy: list[int] = []
        for study in found:
            wait_s = max(0.0, deadline - time.monotonic()) if patience is None else patience
            try:
                return _from_study(desk, study, bearer, once, wait_s)
            except _Busy:
                busy.append(study)
            except (_Nothing, NotFound):
                continue
            except (DatabaseUnavailable, KeyReused):
                raise
            except Exception:
                log.exception("study %d could not be asked for a trial; the others are", study)
        found = busy
    return None


def ask(desk: Desk, study: int, request: AskRequest, principal: Principal, once: Once | None = None) -> Lease:
    """Give a client a trial of this study.

    Raises:
        NotFound: there is no such study.
        Conflict: the study has nothing to give; the message says why.
        KeyReused: the idempotency key came with another body.
    """
    with desk.transaction() as conn:
        desk.known(conn, study)
        worker = fleet.seen(conn, principal, request.worker)
        earlier = answered(conn, once, Lease)
    if earlier is not None:
        return earlier
    if worker.draining:
        raise Conflict("this worker is drained: introduce it anew to give it work again")
    try:
        return _from_study(desk, study, Bearer(principal, worker.worker_id, worker.device), once, MAX_WAIT_S)
    except _Busy:
        raise Conflict("the study is busy with other requests: ask again") from None
    except _Nothing as nothing:
        raise Conflict(str(nothing)) from None


def _from_study(desk: Desk, study: int, bearer: Bearer, once: Once | None, wait_s: float) -> Lease:
    with desk.transaction() as conn:
        known = desk.known(conn, study)
    for _ in range(MAX_ROUNDS):
        with desk.transaction() as conn:
            head, _ = _look(conn, known)
        try:
            if head is not None and head.whole:
                return _lease(desk, known, bearer, once, head, None, head.number)
            if not known.sampling.acquire(timeout=wait_s):
                raise _Busy
            try:
                return _sampled(desk, known, bearer, once)
            finally:
                known.sampling.release()
        except _Changed:
            continue
    log.warning("study %d changed %d times while a trial of it was being leased", study, MAX_ROUNDS)
    raise _Busy


def _sampled(desk: Desk, known: Known, bearer: Bearer, once: Once | None) -> Lease:
    """Make a suggestion and store it. The caller holds the study's sampling lock."""
    with desk.transaction() as conn:
        head, number = _look(conn, known)  # again: what was queued when we began to wait may be leased by now
    workload = desk.workloads.get(known.spec.workload)
    suggestion: Suggestion | None = None
    if head is None or not head.whole:
        impossible = None if head is None else _impossible(desk, known, head)
        if head is not None and impossible is not None:
            _refuse(desk, known, head, impossible)
            raise _Changed
        given = None if head is None else head.given
        try:
            suggestion = suggest(known.spec, known.history, number, known.spec.seed, given, workload=workload)
        except (NotFound, DatabaseUnavailable):
            raise
        except Exception as error:
            if head is not None and isinstance(error, NothingFeasible):
                # A queued point that cannot be completed must not stand in the way of the whole study.
                _refuse(desk, known, head, str(error))
                raise _Changed from error
            raise _Nothing(_failed(desk, known, error)) from error
        known.failures = 0
    return _lease(desk, known, bearer, once, head, suggestion, number)


def _look(conn: sa.Connection, known: Known) -> tuple[Head | None, int]:
    """Return the trial that is next in the queue, if any, and the number that the lease is going to have.

    Raises:
        _Nothing: state, concurrency or budget allow no lease.
    """
    row = studies.reread(conn, known.study)
    if row.state != "running":
        raise _Nothing(f"the study is {row.state}" + (f" ({row.reason})" if row.reason else ""))
    if known.unusable:
        raise _Nothing(f"this server cannot sample for the study: {known.unusable}")
    if row.concurrency is not None:
        live = conn.execute(studies.LIVE, {"study": known.study}).scalar_one()
        if live >= row.concurrency:
            raise _Nothing(f"{live} trials of the study are leased: its concurrency allows no more")
    spent = studies.spent(conn, known, row)
    head = conn.execute(HEAD, {"study": known.study, "begun_only": spent is not None}).one_or_none()
    if head is None:
        if spent is not None:
            raise _Nothing(f"the study's budget is spent: {spent}")
        number: int = conn.execute(NEXT_NUMBER, {"study": known.study}).scalar_one()
        return None, number
    stored = conn.execute(statements.TRIAL_ROWS, {"trial_ids": [head.trial_id]}).one()
    names = set(stored.names or ())
    given = trials.flat_params(known, stored)
    whole = all(name in names for name in known.spec.space.names)
    return Head(head.trial_id, head.number, given, whole), head.number


def _impossible(desk: Desk, known: Known, head: Head) -> str | None:
    """Say why a queued point can never be trained. Stock Optuna's `enqueue_trial` takes anything."""
    space = known.spec.space
    flat, faults = space.read(space.nest(head.given), at="params", partial=True)
    if faults:
        return "; ".join(str(fault) for fault in faults[:4])
    workload = desk.workloads.get(known.spec.workload)
    if workload is None or len(flat) < len(space.names):
        return None
    return workload.feasible(space.nest(flat), known.spec.settings)


def _refuse(desk: Desk, known: Known, head: Head, why: str) -> None:
    """Fail a queued trial that can never be leased, unless stock Optuna has taken it meanwhile."""
    with desk.transaction() as conn:
        lock(conn, known.study)
        trial = conn.execute(statements.LOCK_TRIAL, {"trial_id": head.trial_id}).one_or_none()
        if trial is None or trial.state != "WAITING":
            return
        writing.fail(conn, head.trial_id, f"never leased: {why}")
        studies.settle(conn, known)
        events.notify(conn, "trial", known.study)


def _failed(desk: Desk, known: Known, error: Exception) -> str:
    """Count a failure of the sampler; pause the study at the third in a row."""
    known.failures += 1
    log.exception("study %d: the sampler failed (%d in a row)", known.study, known.failures, exc_info=error)
    why = f"the sampler failed: {type(error).__name__}: {error}"
    if known.failures >= FAILURES_BEFORE_PAUSE:
        known.failures = 0
        with desk.transaction() as conn:
            if lock(conn, known.study).state == "running":
                reason = f"paused after {FAILURES_BEFORE_PAUSE} failures in a row; {why}"
                studies.set_state(conn, known.study, "paused", storable(reason[:500]))
                events.notify(conn, "study", known.study)
    return why


def _lease(
    desk: Desk,
    known: Known,
    bearer: Bearer,
    once: Once | None,
    head: Head | None,
    suggestion: Suggestion | None,
    number: int,
) -> Lease:
    def work() -> Lease:
        lock(conn, known.study)
        now, next_number = _look(conn, known)
        if next_number != number or (now is None) != (head is None):
            raise _Changed
        return _write(desk, conn, known, bearer, head, suggestion)

    with desk.transaction() as conn:
        return guard(conn, once, Lease, work)


def _write(
    desk: Desk, conn: sa.Connection, known: Known, bearer: Bearer, head: Head | None, suggestion: Suggestion | None
) -> Lease:
    study, space = known.study, known.spec.space
    if suggestion is not None:
        for key, value in suggestion.study_system_attrs.items():
            desk.storage.set_study_system_attr(study, key, value)
    if head is None:
        assert suggestion is not None, "a new trial needs a point"
        marks: dict[str, Any] = {writing.ORIGIN: "suggested", **suggestion.trial_system_attrs}
        params = writing.internal(known, suggestion.params)
        trial_id, number = rows.insert_trial(conn, study, TrialState.RUNNING, params, marks)
        flat: Mapping[str, Value] = suggestion.params
    else:
        trial_id, number, flat = head.trial_id, head.number, head.given
        if not rows.move_trial(conn, trial_id, TrialState.RUNNING):
            raise _Changed  # stock Optuna has taken it
        if suggestion is not None:
            flat = suggestion.params
            rows.add_params(conn, trial_id, writing.internal(known, flat))
            rows.set_system_attrs(conn, trial_id, suggestion.trial_system_attrs)
    earlier = conn.execute(EARLIER, {"trial_id": trial_id}).one()
    attempt = earlier.attempts + 1
    made = conn.execute(
        ATTEMPT,
        {
            "study": study,
            "trial_id": trial_id,
            "number": number,
            "attempt": attempt,
            "worker_id": bearer.worker_id,
            "bearer": bearer.principal.id,
            "device": bearer.device,
            "resumed_from": earlier.saved,
            "term_s": desk.term_s,
        },
    ).one()
    events.notify(conn, "trial", study)
    return Lease(
        lease=made.attempt_id,
        token=made.token,
        study=study,
        study_name=known.spec.name,
        trial=number,
        attempt=attempt,
        workload=known.spec.workload,
        params=space.nest(flat),
        settings=dict(known.spec.settings),
        seed=known.trial_seed(number),
        term_s=desk.term_s,
        heartbeat_s=desk.heartbeat_s,
        stall_s=desk.stall_s,
        artifacts=trials.artifacts(study, number, attempt),
        resume=None if earlier.saved is None else trials.artifacts(study, number, earlier.saved),
        last_epoch=earlier.last_epoch,
    )
