"""What comes back from a worker: reports, the outcome, or the trial itself unfinished.

A message is heard only with the live token of the lease and from the bearer that claimed it; any other changes
nothing. A tell writes Optuna's rows, ours and, where it is the last, the study's end in one transaction; what it was
is kept in short, so that the same tell again gets the same answer. Locks: study, trial, attempt, in this order.
A report takes the attempt's lock only (and a share of the trial's where it brings values), so it waits for no sampler
and no other trial.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import answers, events, pruners, rows, statements, studies, writing
from hpo.desk import Desk, Known, lock, log, one_fault, storable
from hpo.errors import DatabaseUnavailable, LeaseLost, NotFound, Told
from hpo.protocol import (
    EpochReport,
    ReleaseRequest,
    ReportReply,
    ReportRequest,
    TellReply,
    TellRequest,
    Verdict,
)
from hpo.tokens import Principal

# Renew a lease, if it is live and this is its token and its bearer; its worker has been heard of as well, and lives:
# the leave of an earlier process of its name may have come after its own introduction.
RENEW = sa.text("""
    WITH renewed AS (
        UPDATE whetstone.attempts
        SET renewed_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => :term_s),
            checkpoint_epoch = greatest(checkpoint_epoch, :checkpoint_epoch),
            last_epoch = greatest(last_epoch, :last_epoch)
        WHERE attempt_id = :lease AND token = :token AND bearer = :bearer AND state = 'leased'
        RETURNING attempt_id, study_id, trial_id, trial_number, worker_id, stop_requested
    ), seen AS (
        UPDATE whetstone.workers w SET last_seen = clock_timestamp(), stopped = false
        FROM renewed r WHERE w.worker_id = r.worker_id
    )
    SELECT * FROM renewed
""")

# A report with values writes rows that refer to the trial: it shares the trial's lock before it takes the attempt's.
SHARE_TRIAL = sa.text("""
    SELECT t.state::text AS state FROM public.trials t
    WHERE t.trial_id = (SELECT trial_id FROM whetstone.attempts WHERE attempt_id = :lease) FOR KEY SHARE
""")

# What epochs measured; on an epoch reported twice the later report speaks.
METRICS = sa.text("""
    INSERT INTO whetstone.metrics (attempt_id, epoch, value, metrics)
    SELECT :lease, m.epoch, m.value, CAST(m.metrics AS jsonb)
    FROM unnest(CAST(:epochs AS bigint[]), CAST(:vals AS float8[]), CAST(:texts AS text[])) AS m (epoch, value, metrics)
    ON CONFLICT (attempt_id, epoch) DO UPDATE
        SET value = excluded.value, metrics = excluded.metrics, at = clock_timestamp()
""")

ATTEMPT = sa.text("SELECT * FROM whetstone.attempts WHERE attempt_id = :lease")
LOCK_ATTEMPT = sa.text("SELECT * FROM whetstone.attempts WHERE attempt_id = :lease FOR NO KEY UPDATE")

# The end of an attempt, once.
END = sa.text("""
    UPDATE whetstone.attempts
    SET state = :state, reason = :reason, traceback = :traceback, told = CAST(:told AS jsonb),
        checkpoint_epoch = greatest(checkpoint_epoch, :checkpoint_epoch), ended_at = clock_timestamp()
    WHERE attempt_id = :lease AND state = 'leased'
""")

DEATHS = sa.text("""
    SELECT count(*) FROM whetstone.attempts WHERE trial_id = :trial_id AND state IN ('lost', 'stalled')
""")

_ENDED = {
    "lost": "it was silent for longer than its term, and the trial was taken back",
    "released": "the trial was handed back",
    "stalled": "the trial was handed back as stalled",
    "cancelled": "the trial was cancelled",
}


def report(desk: Desk, lease: int, request: ReportRequest, principal: Principal) -> ReportReply:
    """Take down progress, renew the lease, and say how to go on. A lease that is over is answered "lost"."""
    epochs = {item.epoch: item for item in request.reports}  # the later of two reports on an epoch speaks
    finite = {epoch: item.value for epoch, item in epochs.items() if item.value is not None}
    with desk.transaction() as conn:
        state = conn.execute(SHARE_TRIAL, {"lease": lease}).scalar() if epochs else None
        row = conn.execute(
            RENEW,
            {
                "lease": lease,
                "token": request.token,
                "bearer": principal.id,
                "term_s": desk.term_s,
                "checkpoint_epoch": request.checkpoint_epoch,
                "last_epoch": max(epochs, default=None),
            },
        ).one_or_none()
        if row is None:
            return ReportReply(verdict=Verdict.LOST, reason=_why_lost(conn, lease, principal))
        if epochs:
            _store(conn, lease, epochs)
            if finite and state == "RUNNING":
                rows.set_reports(conn, row.trial_id, finite)
            events.notify(conn, "trial", row.study_id)
        known = desk.known(conn, row.study_id)
    if row.stop_requested:
        return ReportReply(verdict=Verdict.STOP, reason=row.stop_requested)
    if state is not None and state != "RUNNING":
        return ReportReply(verdict=Verdict.STOP, reason="another program has ended this trial through Optuna")
    if finite and known.spec.pruner.name != "none" and _prune(desk, known, row):
        return ReportReply(
            verdict=Verdict.PRUNE, reason=f"the {known.spec.pruner.name} pruner judged it not worth more"
        )
    return ReportReply(verdict=Verdict.GO_ON)


def _store(conn: sa.Connection, lease: int, epochs: dict[int, EpochReport]) -> None:
    texts = [json.dumps({storable(name): value for name, value in item.metrics.items()}) for item in epochs.values()]
    values = [item.value for item in epochs.values()]
    conn.execute(METRICS, {"lease": lease, "epochs": list(epochs), "vals": values, "texts": texts})


def _prune(desk: Desk, known: Known, row: Any) -> bool:
    """Ask the pruner, outside of any transaction. One that fails prunes nothing: the trial goes on."""
    try:
        verdict = pruners.should_prune(known.spec, known.history, row.trial_number)
    except (DatabaseUnavailable, NotFound):
        raise
    except Exception:
        log.exception("study %d: the pruner failed on trial %d; it goes on", known.study, row.trial_number)
        return False
    if verdict.trial_system_attrs or verdict.study_system_attrs:
        with desk.transaction() as conn:
            # The study before the trial: the order of all locks.
            for key, value in verdict.study_system_attrs.items():
                desk.storage.set_study_system_attr(known.study, key, value)
            rows.set_system_attrs(conn, row.trial_id, verdict.trial_system_attrs)
    return verdict.prune


def tell(desk: Desk, lease: int, request: TellRequest, principal: Principal) -> TellReply:
    """Store the outcome of a trial, once. The same tell again gets the same answer.

    Raises:
        NotFound: there is no such lease.
        Invalid: a complete trial without a value, a failed one with one, or answers of a trial that has none.
        LeaseLost: the lease is over, or was never this bearer's. Nothing was changed.
        Told: another outcome was told before, or another program ended the trial. Nothing was changed.
    """
    if request.outcome == "complete" and request.value is None:
        raise one_fault("value", "is missing: a complete trial has one", "the tell")
    if request.outcome == "failed" and request.value is not None:
        raise one_fault("value", "a failed trial has none", "the tell")
    if request.answers is not None and request.outcome not in ("complete", "pruned"):
        raise one_fault("answers", "only a complete or a pruned trial has them", "the tell")
    said: dict[str, Any] = {
        "tell": request.outcome,
        "value": request.value,
        "reason": request.reason,
        "traceback": request.traceback,
    }
    if request.answers is not None:
        said["answers"] = [request.answers.tasks, request.answers.bits.hex()]
    digest = _digest(said)
    with desk.transaction() as conn:
        known, attempt, trial_state = hold(desk, conn, lease)
        earlier = _check(attempt, request.token, principal, digest)
        if earlier is not None:
            return earlier
        if trial_state != "RUNNING":
            raise Told("another program has ended this trial through Optuna: its outcome stands")
        value = _finish(conn, known, attempt.trial_id, request)
        if request.answers is not None:
            answers.store(conn, attempt.trial_id, request.answers)
        reply = TellReply(study=known.study, trial=attempt.trial_number, state=request.outcome, value=value)
        _end(
            conn,
            lease,
            request.outcome,
            storable(request.reason),
            reply,
            digest=digest,
            checkpoint_epoch=request.checkpoint_epoch,
            traceback=storable(request.traceback),
        )
        _after(conn, known)
    return reply


def _finish(conn: sa.Connection, known: Known, trial_id: int, request: TellRequest) -> float | None:
    """Write a trial's end into Optuna's rows; return its value."""
    marks: dict[str, Any] = {writing.REASON: storable(request.reason)} if request.reason else {}
    value = request.value
    state = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}.get(request.outcome, TrialState.COMPLETE)
    if request.outcome == "infeasible" and value is None:
        value = writing.worst_value(conn, known, trial_id)
    if request.outcome == "pruned" and value is None:
        value = writing.last_report(conn, trial_id)  # as stock Optuna does
    if state == TrialState.COMPLETE:
        marks[writing.INFEASIBLE] = 1.0 if request.outcome == "infeasible" else 0.0
    finished = rows.finish_trial(conn, trial_id, state, value, marks)
    assert finished, "the trial's row is locked and was running"
    return value


def release(desk: Desk, lease: int, request: ReleaseRequest, principal: Principal) -> TellReply:
    """Take a trial back unfinished: it is queued again, before all others; or cancelled, if that was asked for.

    "stalled" and "broken" count as a death of its worker, and the last one a trial may have fails it. The same release
    again gets the same answer.

    Raises:
        NotFound: there is no such lease.
        LeaseLost: the lease is over, or was never this bearer's. Nothing was changed.
        Told: the trial was told an outcome before. Nothing was changed.
    """
    digest = _digest({"release": request.reason})
    with desk.transaction() as conn:
        known, attempt, _ = hold(desk, conn, lease)
        earlier = _check(attempt, request.token, principal, digest)
        if earlier is not None:
            return earlier
        how = {"stalled": "stalled", "broken": "lost"}.get(request.reason, "released")
        why = {
            "shutdown": "its worker was shut down",
            "stopped": "its worker was asked to stop",
            "drained": "its worker was drained",
            "stalled": "it made no step for too long",
            "broken": "its worker's device stopped working",
        }[request.reason]
        state = give_back(
            desk, conn, known, attempt, how, why, digest=digest, checkpoint_epoch=request.checkpoint_epoch
        )
    return TellReply(study=known.study, trial=attempt.trial_number, state=state, value=None)


def give_back(
    desk: Desk,
    conn: sa.Connection,
    known: Known,
    attempt: Any,
    how: str,
    why: str,
    *,
    digest: str | None = None,
    checkpoint_epoch: int | None = None,
) -> str:
    """End a live attempt without an outcome ("released", "stalled" or "lost"); return what becomes of its trial.

    The caller holds study, trial and attempt. The trial is cancelled where that was asked for or its study is stopped,
    failed where its workers have died too often, and queued otherwise.
    """
    study = studies.reread(conn, known.study)
    asked = attempt.stop_requested or ("the study was stopped" if study.state == "stopped" else "")
    trial_id = attempt.trial_id
    deaths = conn.execute(DEATHS, {"trial_id": trial_id}).scalar_one() + (how != "released")
    if asked:
        state = "cancelled"
        moved = writing.cancel(conn, trial_id, asked)
    elif how != "released" and deaths >= study.max_attempts:
        state = "failed"
        tries = "1 attempt" if deaths == 1 else f"{deaths} attempts"
        moved = writing.fail(conn, trial_id, f"given up: {tries} died; the last: {why}")
    else:
        state = "queued"
        moved = rows.move_trial(conn, trial_id, TrialState.WAITING)
    if not moved:
        # Stock Optuna has ended the trial meanwhile: its word stands, only our attempt is over.
        state = conn.execute(statements.STATE_OF, {"trial_id": trial_id}).scalar_one()
    reply = TellReply(study=known.study, trial=attempt.trial_number, state=state, value=None)
    ended = "cancelled" if asked and how == "released" else how
    _end(conn, attempt.attempt_id, ended, why, reply, digest=digest, checkpoint_epoch=checkpoint_epoch)
    _after(conn, known)
    return state


def hold(desk: Desk, conn: sa.Connection, lease: int) -> tuple[Known, Any, str]:
    """Lock study, trial and attempt of a lease, in this order; return what is known, the attempt, the trial's state.

    Raises:
        NotFound: there is no such lease.
    """
    found = conn.execute(ATTEMPT, {"lease": lease}).one_or_none()
    if found is None:
        raise NotFound(f"there is no lease {lease}")
    known = desk.known(conn, found.study_id)
    lock(conn, found.study_id)
    trial = conn.execute(statements.LOCK_TRIAL, {"trial_id": found.trial_id}).one_or_none()
    attempt = conn.execute(LOCK_ATTEMPT, {"lease": lease}).one_or_none()
    if trial is None or attempt is None:
        raise NotFound(f"there is no lease {lease}")
    return known, attempt, trial.state


def _check(attempt: Any, token: int, principal: Principal, digest: str) -> TellReply | None:
    """Return the stored answer if this very message came before, None if the lease is live.

    Raises:
        LeaseLost: the lease is over, or was never this bearer's.
        Told: something else was told before.
    """
    if attempt.bearer != principal.id:
        raise LeaseLost("this lease belongs to another token")
    if attempt.token != token:
        raise LeaseLost("this is not the lease's fencing token")
    if attempt.state == "leased":
        return None
    if attempt.told is not None and attempt.told["digest"] == digest:
        return TellReply.model_validate(attempt.told["reply"])
    if attempt.state in _ENDED:
        raise LeaseLost(f"the lease is over: {_ENDED[attempt.state]}")
    raise Told(f"the trial was told {attempt.state} before, with other words: that stands")


def _end(
    conn: sa.Connection,
    lease: int,
    state: str,
    reason: str,
    reply: TellReply,
    *,
    digest: str | None,
    checkpoint_epoch: int | None = None,
    traceback: str = "",
) -> None:
    told = None if digest is None else json.dumps({"digest": digest, "reply": reply.model_dump(mode="json")})
    ended = {"lease": lease, "state": state, "reason": reason, "traceback": traceback, "told": told}
    changed = conn.execute(END, ended | {"checkpoint_epoch": checkpoint_epoch}).rowcount
    assert changed == 1, "the attempt's row is locked and was live"


def _after(conn: sa.Connection, known: Known) -> None:
    """A lease has ended: the study may be done, and where it is not, there is room for another lease."""
    studies.settle(conn, known)
    events.notify(conn, "trial", known.study)
    events.notify(conn, "work", known.study)


def _why_lost(conn: sa.Connection, lease: int, principal: Principal) -> str:
    found = conn.execute(ATTEMPT, {"lease": lease}).one_or_none()
    if found is None or found.bearer != principal.id:
        return "this lease is not known, or belongs to another token"
    if found.state == "leased":
        return "this is not the lease's fencing token"
    return f"the lease is over: {_ENDED.get(found.state, f'the trial was told {found.state}')}"


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
