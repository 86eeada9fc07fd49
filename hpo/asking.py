"""One request for a lease: what it looks at, and what it writes.

Both are one call of PostgreSQL (`hpo/functions/look.sql` and `lease.sql`). Invariant: the same request, made again
with its idempotency key or after a reply that was lost, gets the same lease; what comes back as `Changed` or `Nothing`
has changed nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hpo import database, trials, writing
from hpo.desk import HISTORY_FORMAT, Desk, Known, check_format, missing, storable
from hpo.errors import KeyReused
from hpo.idempotency import REUSED, Once
from hpo.protocol import AskRequest, ClaimRequest, Lease, Value
from hpo.suggest import Suggestion
from hpo.tokens import Principal

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


class Changed(Exception):
    """Somebody was quicker: all is looked at again."""


class TooLarge(Changed):
    """The first of the queue is beyond the device that asks; there may be others. The message is for people."""


class Nothing(Exception):
    """The study has no lease to give; the reason is for people."""


class Answered(Exception):
    """The request was answered before (`lease`), or its worker gets nothing (None)."""

    def __init__(self, lease: Lease | None) -> None:
        super().__init__()
        self.lease = lease


class Asking:
    """One request for a lease, and who gets it. The same request, made again, gets the same lease."""

    def __init__(self, desk: Desk, principal: Principal, request: ClaimRequest | AskRequest, once: Once | None) -> None:
        self._desk = desk
        self._once = once
        self._passed: list[int] = []
        self._beyond: list[int] = []
        self.who: dict[str, Any] = {
            "worker": request.worker,
            "device": storable(request.device) if isinstance(request, ClaimRequest) else "",
            "memory": request.memory_bytes if isinstance(request, ClaimRequest) else None,
            "version": storable(request.version) if isinstance(request, ClaimRequest) else "",
            "owner": principal.id,
            "route": None if once is None else once.route,
            "key": None if once is None else once.key,
            "digest": None if once is None else once.digest,
            "format": HISTORY_FORMAT,
        }
        self.memory: int | None = self.who["memory"]
        """Of the device, in bytes: as the request says or, after a look, as its worker once said."""

    @property
    def _skip(self) -> list[int]:
        """What waits in the queue for a larger device."""
        return [*self._passed, *self._beyond]

    def look(self, study: int | None, known: Known | None) -> dict[str, Any]:
        """Look at `study`, or at any (None; `known` is then the likeliest). `known`'s history is caught up.

        Raises:
            NotFound: there is no such study.
            Answered: there is nothing more to do for this request.
            KeyReused: the idempotency key came with another body.
        """
        cursor = _NOWHERE
        if known is not None:
            if not known.history.version:
                known.history.refresh()  # a cold one is read in bulk, once
            cursor = known.history.cursor().arguments()
            self._beyond = known.suggester.beyond(self.memory)
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
            raise Answered(Lease.model_validate(earlier["answer"]))
        if seen["worker"] is not None and seen["worker"]["draining"]:
            self.heard_of(seen)
            raise Answered(None)
        if self.memory is None and seen["worker"] is not None:
            self.memory = seen["worker"]["memory_bytes"]
        if known is not None and seen.get("study") == known.study:
            check_format(known.study, seen["format"])
            known.history.apply(seen["changes"])
        return seen

    def pass_over(self, head: Head) -> None:
        """Look beyond a queued trial from now on: it waits for a larger device."""
        self._passed.append(head.trial_id)

    def heard_of(self, seen: Mapping[str, Any]) -> None:
        """Take down that the worker lives, if nobody has of late."""
        worker = seen["worker"]
        same = worker is not None and not worker["stopped"] and worker["bearer"] == self.who["owner"]
        if not same or worker["silent_s"] > HEARD_S:
            database.call(self._desk.engine, SEEN, self.who)

    def lease(self, known: Known, head: Head | None, suggestion: Suggestion | None, number: int) -> Lease:
        """Write the lease of `head`, or of a new trial `number`.

        Raises:
            Changed: what was looked at is no longer so.
            Nothing: state, concurrency or budget allow no lease any more.
            Answered, KeyReused, NotFound: as in `look`.
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
                "request": uuid.uuid4().hex,  # of this very point: the call may be repeated, with no other
                "head": None if head is None else head.trial_id,
                "number": number,
                "skip": self._skip,
                "names": list(params),
                "internals": [internal for internal, _ in params.values()],
                "distributions": [known.spelled[name] for name in params],
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
            raise Changed
        if "nothing" in made:
            raise Nothing(made["nothing"])
        if "earlier" in made:
            raise Answered(Lease.model_validate(made["earlier"]))
        if "reused" in made:
            raise KeyReused(REUSED)
        if "draining" in made:
            raise Answered(None)
        self._desk.forget(study)
        raise missing(study)
