"""Leases: the one way in which a trial comes into a worker's hands.

The invariant: a trial has at most one live attempt, and that attempt's token is larger than all before it. A lease is
two calls of PostgreSQL: one look at everything that an ask depends on, and one write of trial, parameters, attributes,
attempt and counters together (`hpo/functions/look.sql` and `lease.sql`). Between the two a new point is sampled, under
the study's lock in this process and outside of any transaction. The write looks again at what may have changed and
sends the ask back to its beginning; nothing half-made is left.

Queued trials go first: those between two attempts before points that were never begun, then by number. A trial once
begun may always be taken up again; only a trial's first lease counts against the budget.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from hpo import events, studies, trials, writing
from hpo.asking import Answered, Asking, Changed, Head, Nothing, TooLarge
from hpo.desk import Desk, Known, lock, log, storable
from hpo.errors import Busy, Conflict, DatabaseUnavailable, KeyReused, NotFound
from hpo.idempotency import Once
from hpo.protocol import MAX_WAIT_S, AskRequest, ClaimRequest, Lease, Value
from hpo.suggest import NothingFeasible, TooSmall, too_small
from hpo.tokens import Principal

MAX_ROUNDS = 50
"""A round fails because somebody else got on, or because a queued point that is new or not whole is too large for the
device; after so many in a row the others are given way to."""
FAILURES_BEFORE_PAUSE = 3
BUSY = "the study is busy with other requests: ask again"
SHORTLY_S = 0.05
"""How long an ask waits for another one of its study before it looks whether there is a queue that needs no sampler."""


def claim(desk: Desk, request: ClaimRequest, principal: Principal, once: Once | None = None) -> Lease | None:
    """Give a worker a trial of any running study, or None when there is none to give.

    Among several studies the one with the fewest leased trials is asked first, then the oldest. A study whose sampler
    fails is passed over; after three failures in a row it is paused with the reason.

    Raises:
        KeyReused: the idempotency key came with another body.
    """
    asking = Asking(desk, principal, request, once)
    try:
        return _claim(desk, asking)
    except Answered as answer:
        return answer.lease


def _claim(desk: Desk, asking: Asking) -> Lease | None:
    # The study that was claimed from last is likely the next as well: then this look is the only one.
    guess, seen = desk.guess, None
    if guess is not None and guess.sampling.acquire(timeout=SHORTLY_S):
        try:
            seen = asking.look(None, guess)
            if seen.get("study") == guess.study:
                return _of_look(desk, guess, asking, seen)
        except (Changed, Nothing, NotFound):
            pass
        except (DatabaseUnavailable, KeyReused, Answered):
            raise
        except Exception:
            log.exception("study %d could not be asked for a trial; the others are", guess.study)
        finally:
            guess.sampling.release()
    if seen is None:
        seen = asking.look(None, None)
    deadline = time.monotonic() + MAX_WAIT_S
    found = cast("list[int]", seen["studies"])
    # First the studies where nobody is sampling at this moment, then the others, one after another.
    for patience in (0.0, None):
        busy: list[int] = []
        for study in found:
            wait_s = max(0.0, deadline - time.monotonic()) if patience is None else patience
            try:
                known = desk.recall(study)
                lease = _from_study(desk, known, asking, wait_s)
            except Busy:
                busy.append(study)
            except (Nothing, NotFound):
                continue
            except (DatabaseUnavailable, KeyReused, Answered):
                raise
            except Exception:
                log.exception("study %d could not be asked for a trial; the others are", study)
            else:
                desk.guess = known
                return lease
        found = busy
    asking.heard_of(seen)
    return None


def ask(desk: Desk, study: int, request: AskRequest, principal: Principal, once: Once | None = None) -> Lease:
    """Give a client a trial of this study.

    Raises:
        NotFound: there is no such study.
        Conflict: the study has nothing to give; the message says why.
        Busy: others are being served with this study, and the time to wait for them is over.
        KeyReused: the idempotency key came with another body.
    """
    try:
        return _from_study(desk, desk.recall(study), Asking(desk, principal, request, once), MAX_WAIT_S)
    except Answered as answer:
        if answer.lease is None:
            raise Conflict("this worker is drained: introduce it anew to give it work again") from None
        return answer.lease
    except Nothing as nothing:
        raise Conflict(str(nothing)) from None


def _from_study(desk: Desk, known: Known, asking: Asking, wait_s: float) -> Lease:
    study = known.study
    for _ in range(MAX_ROUNDS):
        took = known.sampling.acquire(timeout=min(wait_s, SHORTLY_S))
        try:
            if not took:
                # Somebody is sampling, perhaps for seconds: what is queued and whole needs no sampler.
                seen = asking.look(study, None)
                head = _allowed(known, seen)
                if head is not None and head.whole and not known.suggester.marked:
                    return asking.lease(known, head, None, head.number)
                took = known.sampling.acquire(timeout=wait_s)
                if not took:
                    raise Busy(BUSY)
            return _of_look(desk, known, asking, asking.look(study, known))
        except TooLarge as one:
            beyond = str(one)
        except Changed:
            beyond = ""
        finally:
            if took:
                known.sampling.release()
    if beyond:
        raise Nothing(beyond)
    log.warning("study %d changed %d times while a trial of it was being leased", study, MAX_ROUNDS)
    raise Busy(BUSY)


def _of_look(desk: Desk, known: Known, asking: Asking, seen: Mapping[str, Any]) -> Lease:
    """Lease what the look has found, a new point if there is no queue. The caller holds the study's sampling lock."""
    head = _allowed(known, seen)
    if head is not None and head.whole:
        if known.suggester.fits(dict(head.given), asking.memory):
            return asking.lease(known, head, None, head.number)
        asking.pass_over(head)
        raise TooLarge(too_small(asking.memory))
    number = seen["next"] if head is None else head.number
    given: dict[str, Value] = dict(seen["fixed"])
    if head is not None:
        impossible = _impossible(desk, known, head)
        if impossible is not None:
            _refuse(desk, known, head, impossible)
            raise Changed
        given |= head.given
    try:
        suggestion = known.suggester.next(number, given, asking.memory)
    except (NotFound, DatabaseUnavailable):
        raise
    except TooSmall as error:
        if head is None:
            raise Nothing(str(error)) from error
        asking.pass_over(head)
        raise TooLarge(str(error)) from error
    except Exception as error:
        if head is not None and isinstance(error, NothingFeasible):
            # A queued point that cannot be completed must not stand in the way of the whole study.
            _refuse(desk, known, head, str(error))
            raise Changed from error
        raise Nothing(_failed(desk, known, error)) from error
    known.failures = 0
    lease = asking.lease(known, head, suggestion, number)
    known.suggester.foresee(number + 1)
    return lease


def _allowed(known: Known, seen: Mapping[str, Any]) -> Head | None:
    """Return the trial that is next in the queue, if any.

    Raises:
        Nothing: state, concurrency or budget allow no lease.
    """
    if seen["closed"] is not None:
        raise Nothing(seen["closed"])
    if known.unusable:
        raise Nothing(f"this server cannot sample for the study: {known.unusable}")
    head = seen["head"]
    if head is None:
        if seen["spent"] is not None:
            raise Nothing(f"the study's budget is spent: {seen['spent']}")
        return None
    names = head["names"] or []
    # As text: stock Optuna stores NaN, which is JSON to Python and not to PostgreSQL.
    fixed = None if head["fixed"] is None else json.loads(head["fixed"])
    given = trials.flat_of(known, fixed, names, head["internals"] or [])
    return Head(head["trial_id"], head["number"], given, set(names) >= set(known.spec.space.names))


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
    """Fail a queued trial that can never be leased, unless somebody has taken it meanwhile."""
    with desk.transaction() as conn:
        lock(conn, known.study)
        if writing.fail_queued(conn, head.trial_id, f"never leased: {why}"):
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
