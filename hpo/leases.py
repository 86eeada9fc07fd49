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
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from optuna.distributions import distribution_to_json

from hpo import database, events, studies, trials, writing
from hpo.desk import HISTORY_FORMAT, Desk, Known, check_format, lock, log, missing, storable
from hpo.errors import Conflict, DatabaseUnavailable, KeyReused, NotFound
from hpo.idempotency import REUSED, Once
from hpo.protocol import MAX_WAIT_S, AskRequest, ClaimRequest, Lease, Value
from hpo.suggest import NothingFeasible, Suggestion, TooSmall
from hpo.tokens import Principal

MAX_ROUNDS = 50
"""A round fails only because somebody else got on; after so many in a row the others are given way to."""
FAILURES_BEFORE_PAUSE = 3
SHORTLY_S = 0.05
"""How long an ask waits for another one of its study before it looks whether there is a queue that needs no sampler."""
HEARD_S = 5.0
"""A worker for whom there is nothing is taken down as alive no more often than this."""

LOOK = """
    SELECT whetstone.look(%(study)s, %(guess)s, %(skip)s::integer[], %(owner)s, %(route)s, %(key)s, %(worker)s,
                          %(newest)s, %(running)s::integer[], %(waiting)s::integer[], %(revision)s, %(format)s)
"""
LEASE = """
    SELECT whetstone.lease(
        %(study)s, %(head)s, %(number)s, %(skip)s::integer[],
        %(names)s::text[], %(internals)s::double precision[], %(distributions)s::text[],
        %(keys)s::text[], %(texts)s::text[], %(study_keys)s::text[], %(study_texts)s::text[], %(picked)s::jsonb,
        %(worker)s, %(device)s, %(memory)s, %(version)s, %(owner)s,
        %(route)s, %(key)s, %(digest)s, %(request)s, %(template)s::jsonb, %(term_s)s)
"""
SEEN = "SELECT (whetstone.seen(%(worker)s, %(device)s, %(memory)s, %(version)s, %(owner)s)).draining"

_NOWHERE: dict[str, Any] = {"newest": None, "running": [], "waiting": [], "revision": None}
"""In place of a history's cursor where the history is not wanted."""


@dataclass(frozen=True)
class Head:
    """The queued trial that is next. `given` are its flat values so far; `whole` says that all are stored."""

    trial_id: int
    number: int
    given: Mapping[str, Value]
    whole: bool


class _Changed(Exception):
    """Somebody was quicker: all is looked at again."""


class _Nothing(Exception):
    """The study has no lease to give; the reason is for people."""


class _Busy(Exception):
    """Others are being served with this study, and the time to wait for them is over."""


class _Answered(Exception):
    """The request was answered before (`lease`), or its worker gets nothing (None)."""

    def __init__(self, lease: Lease | None) -> None:
        super().__init__()
        self.lease = lease


class _Asking:
    """One request for a lease, and who gets it. The same request, made again, gets the same lease."""

    def __init__(self, desk: Desk, principal: Principal, request: ClaimRequest | AskRequest, once: Once | None) -> None:
        self._desk = desk
        self._once = once
        self._skip: list[int] = []
        self.who: dict[str, Any] = {
            "worker": request.worker,
            "device": storable(request.device) if isinstance(request, ClaimRequest) else "",
            "memory": request.memory_bytes if isinstance(request, ClaimRequest) else None,
            "version": storable(request.version) if isinstance(request, ClaimRequest) else "",
            "owner": principal.id,
            "route": None if once is None else once.route,
            "key": None if once is None else once.key,
            "digest": None if once is None else once.digest,
            "request": uuid.uuid4().hex,
            "format": HISTORY_FORMAT,
        }

    def look(self, study: int | None, known: Known | None) -> dict[str, Any]:
        """Look at `study`, or at any (None; `known` is then the likeliest). `known`'s history is caught up.

        Raises:
            NotFound: there is no such study.
            _Answered: there is nothing more to do for this request.
            KeyReused: the idempotency key came with another body.
        """
        cursor = _NOWHERE
        if known is not None:
            if not known.history.version:
                known.history.refresh()  # a cold one is read in bulk, once
            cursor = known.history.cursor().arguments()
        guess = None if known is None else known.study
        seen: dict[str, Any] = database.call(
            self._desk.engine, LOOK, self.who | cursor | {"study": study, "guess": guess, "skip": self._skip}
        )
        if seen.get("missing"):
            assert study is not None
            self._desk.forget(study)
            raise missing(study)
        earlier = seen["answered"]
        if earlier is not None:
            assert self._once is not None
            if bytes.fromhex(earlier["digest"]) != self._once.digest:
                raise KeyReused(REUSED)
            raise _Answered(Lease.model_validate(earlier["answer"]))
        if seen["worker"] is not None and seen["worker"]["draining"]:
            self.heard_of(seen)
            raise _Answered(None)
        if known is not None and seen.get("study") == known.study:
            check_format(known.study, seen["format"])
            known.history.apply(seen["changes"])
        return seen

    def pass_over(self, head: Head) -> None:
        """Look beyond a queued trial from now on: it waits for a larger device."""
        self._skip.append(head.trial_id)

    def heard_of(self, seen: Mapping[str, Any]) -> None:
        """Take down that the worker lives, if nobody has of late."""
        worker = seen["worker"]
        same = worker is not None and not worker["stopped"] and worker["bearer"] == self.who["owner"]
        if not same or worker["silent_s"] > HEARD_S:
            database.call(self._desk.engine, SEEN, self.who)

    def lease(self, known: Known, head: Head | None, suggestion: Suggestion | None, number: int) -> Lease:
        """Write the lease of `head`, or of a new trial `number`.

        Raises:
            _Changed: what was looked at is no longer so.
            _Nothing: state, concurrency or budget allow no lease any more.
            _Answered, KeyReused, NotFound: as in `look`.
        """
        study, space = known.study, known.spec.space
        new: Mapping[str, Value] = {} if suggestion is None else suggestion.params
        flat = new if head is None or not head.whole else head.given
        marks: dict[str, Any] = {} if suggestion is None else dict(suggestion.trial_system_attrs)
        if head is None:
            assert suggestion is not None, "a new trial needs a point"
            marks = {writing.ORIGIN: "suggested", **marks}
        params = writing.internal(known, new)
        study_marks = {} if suggestion is None else suggestion.study_system_attrs
        picked = None if suggestion is None or suggestion.pick is None else suggestion.pick
        wire = {
            "lease": 0,
            "token": 0,
            "study": study,
            "study_name": known.spec.name,
            "trial": number,
            "attempt": 0,
            "workload": known.spec.workload,
            "params": space.nest(flat),
            "settings": dict(known.spec.settings),
            "seed": known.trial_seed(number),
            "term_s": self._desk.term_s,
            "heartbeat_s": self._desk.heartbeat_s,
            "stall_s": self._desk.stall_s,
            "artifacts": trials.artifacts(study, number),
        }
        made: dict[str, Any] = database.call(
            self._desk.engine,
            LEASE,
            self.who
            | {
                "study": study,
                "head": None if head is None else head.trial_id,
                "number": number,
                "skip": self._skip,
                "names": list(params),
                "internals": [internal for internal, _ in params.values()],
                "distributions": [distribution_to_json(distribution) for _, distribution in params.values()],
                "keys": list(marks),
                "texts": [json.dumps(value) for value in marks.values()],
                "study_keys": list(study_marks),
                "study_texts": [json.dumps(value) for value in study_marks.values()],
                "picked": None if picked is None else json.dumps({"sampler": picked.choice.name, "why": picked.why}),
                "template": None if self._once is None else json.dumps(wire),
                "term_s": self._desk.term_s,
            },
        )
        if "lease" not in made:
            self._refused(study, made)
        self._desk.leased(made["lease"], study, made["trial_id"], number)
        saved = made["saved"]
        return Lease.model_validate(
            wire
            | {
                "lease": made["lease"],
                "token": made["token"],
                "attempt": made["attempt"],
                "artifacts": trials.artifacts(study, number, made["attempt"]),
                "resume": None if saved is None else trials.artifacts(study, number, saved),
                "last_epoch": made["last_epoch"],
            }
        )

    def _refused(self, study: int, made: Mapping[str, Any]) -> NoReturn:
        if "again" in made:
            raise _Changed
        if "nothing" in made:
            raise _Nothing(made["nothing"])
        if "earlier" in made:
            raise _Answered(Lease.model_validate(made["earlier"]))
        if "reused" in made:
            raise KeyReused(REUSED)
        if "draining" in made:
            raise _Answered(None)
        self._desk.forget(study)
        raise missing(study)


def claim(desk: Desk, request: ClaimRequest, principal: Principal, once: Once | None = None) -> Lease | None:
    """Give a worker a trial of any running study, or None when there is none to give.

    Among several studies the one with the fewest leased trials is asked first, then the oldest. A study whose sampler
    fails is passed over; after three failures in a row it is paused with the reason.

    Raises:
        KeyReused: the idempotency key came with another body.
    """
    asking = _Asking(desk, principal, request, once)
    try:
        return _claim(desk, asking)
    except _Answered as answer:
        return answer.lease


def _claim(desk: Desk, asking: _Asking) -> Lease | None:
    # The study that was claimed from last is likely the next as well: then this look is the only one.
    guess = desk.guess
    took = guess is not None and guess.sampling.acquire(timeout=SHORTLY_S)
    try:
        seen = asking.look(None, guess if took else None)
        if took and guess is not None and seen.get("study") == guess.study:
            try:
                return _of_look(desk, guess, asking, seen)
            except (_Changed, _Nothing):
                pass
    finally:
        if took and guess is not None:
            guess.sampling.release()
    deadline = time.monotonic() + MAX_WAIT_S
    found = cast("list[int]", seen["studies"])
    # First the studies where nobody is sampling at this moment, then the others, one after another.
    for patience in (0.0, None):
        busy: list[int] = []
        for study in found:
            wait_s = max(0.0, deadline - time.monotonic()) if patience is None else patience
            try:
                lease = _from_study(desk, study, asking, wait_s)
            except _Busy:
                busy.append(study)
            except (_Nothing, NotFound):
                continue
            except (DatabaseUnavailable, KeyReused, _Answered):
                raise
            except Exception:
                log.exception("study %d could not be asked for a trial; the others are", study)
            else:
                desk.guess = desk.recall(study)
                return lease
        found = busy
    asking.heard_of(seen)
    return None


def ask(desk: Desk, study: int, request: AskRequest, principal: Principal, once: Once | None = None) -> Lease:
    """Give a client a trial of this study.

    Raises:
        NotFound: there is no such study.
        Conflict: the study has nothing to give; the message says why.
        KeyReused: the idempotency key came with another body.
    """
    try:
        return _from_study(desk, study, _Asking(desk, principal, request, once), MAX_WAIT_S)
    except _Answered as answer:
        if answer.lease is None:
            raise Conflict("this worker is drained: introduce it anew to give it work again") from None
        return answer.lease
    except _Busy:
        raise Conflict("the study is busy with other requests: ask again") from None
    except _Nothing as nothing:
        raise Conflict(str(nothing)) from None


def _from_study(desk: Desk, study: int, asking: _Asking, wait_s: float) -> Lease:
    known = desk.recall(study)
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
                    raise _Busy
            return _of_look(desk, known, asking, asking.look(study, known))
        except _Changed:
            continue
        finally:
            if took:
                known.sampling.release()
    log.warning("study %d changed %d times while a trial of it was being leased", study, MAX_ROUNDS)
    raise _Busy


def _of_look(desk: Desk, known: Known, asking: _Asking, seen: Mapping[str, Any]) -> Lease:
    """Lease what the look has found, a new point if there is no queue. The caller holds the study's sampling lock."""
    head = _allowed(known, seen)
    memory = asking.who["memory"]
    if memory is None and seen["worker"] is not None:
        memory = seen["worker"]["memory_bytes"]
    if head is not None and head.whole:
        if known.suggester.fits(dict(head.given), memory):
            return asking.lease(known, head, None, head.number)
        asking.pass_over(head)
        raise _Changed
    number = seen["next"] if head is None else head.number
    given: dict[str, Value] = dict(seen["fixed"])
    if head is not None:
        impossible = _impossible(desk, known, head)
        if impossible is not None:
            _refuse(desk, known, head, impossible)
            raise _Changed
        given |= head.given
    try:
        suggestion = known.suggester.next(number, given, memory)
    except (NotFound, DatabaseUnavailable):
        raise
    except TooSmall as error:
        if head is None:
            raise _Nothing(str(error)) from error
        asking.pass_over(head)
        raise _Changed from error
    except Exception as error:
        if head is not None and isinstance(error, NothingFeasible):
            # A queued point that cannot be completed must not stand in the way of the whole study.
            _refuse(desk, known, head, str(error))
            raise _Changed from error
        raise _Nothing(_failed(desk, known, error)) from error
    known.failures = 0
    lease = asking.lease(known, head, suggestion, number)
    known.suggester.foresee(number + 1)
    return lease


def _allowed(known: Known, seen: Mapping[str, Any]) -> Head | None:
    """Return the trial that is next in the queue, if any.

    Raises:
        _Nothing: state, concurrency or budget allow no lease.
    """
    if seen["closed"] is not None:
        raise _Nothing(seen["closed"])
    if known.unusable:
        raise _Nothing(f"this server cannot sample for the study: {known.unusable}")
    head = seen["head"]
    if head is None:
        if seen["spent"] is not None:
            raise _Nothing(f"the study's budget is spent: {seen['spent']}")
        return None
    names = head["names"] or []
    given = trials.flat_of(known, head["fixed"], names, head["internals"] or [])
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
