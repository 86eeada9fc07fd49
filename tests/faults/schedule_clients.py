"""The clients of a schedule, and their own books: what each of them said, what it was answered, what it holds.

These books are what the database is judged by. A call is `known` once its answer has arrived; one whose answer was
lost may have been done or not, until it is repeated. A client remembers every call as it sent it, key included.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from typing import Any

from hpo.idempotency import Once
from hpo.protocol import (
    AskRequest,
    ClaimRequest,
    EpochReport,
    Lease,
    ReleaseRequest,
    ReportRequest,
    TellRequest,
)
from hpo.tokens import Principal

KEYED = {"claim", "ask", "add_trial", "requeue_trial"}
"""Methods that take an idempotency key as their last argument."""


@dataclass
class Call:
    """One request of one client. `answer` or `error` is what it was answered, once that is `known`.

    `hidden` is an answer that was given and did not arrive: a repetition has to be answered the same.
    """

    client: str
    method: str
    args: tuple[Any, ...]
    lease: Lease | None = None
    known: bool = False
    answer: Any = None
    error: Exception | None = None
    hidden: Any = None
    tries: int = 0
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def once(self) -> Once | None:
        return self.args[-1] if self.method in KEYED else None

    def __str__(self) -> str:
        about = [f"lease {self.lease.lease} of trial {self.lease.study}/{self.lease.trial}"] if self.lease else []
        about += [repr(arg) if isinstance(arg, int | dict) else _short(arg) for arg in self.args[1 if about else 0 :]]
        return f"{self.client}: {self.method}({', '.join(word for word in about if word)})"

    @property
    def outcome(self) -> str:
        if not self.known:
            return "no answer"
        return f"{type(self.error).__name__}: {self.error}" if self.error else _short(self.answer)


def _short(what: Any) -> str:
    if isinstance(what, Once):
        return f"key {what.key}"
    if isinstance(what, Lease):
        return f"lease {what.lease} of trial {what.study}/{what.trial}, attempt {what.attempt}"
    if isinstance(what, Principal):
        return ""
    for name in ("trial", "study"):
        if hasattr(what, name) and hasattr(what, "state"):
            return f"{name} {getattr(what, name)} is {what.state}"
    text = what.model_dump(exclude_defaults=True) if hasattr(what, "model_dump") else what
    return str(text)


@dataclass
class Client:
    """A worker or a person with a program.

    `held` are leases it means to end, `past` those it has ended or lost, `given` the ids of all it was ever given.
    """

    name: str
    principal: Principal
    mark: str
    """Of this schedule: in the keys, so that no two schedules on one database share any."""
    held: list[Lease] = field(default_factory=list)
    past: list[Lease] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    unanswered: list[Call] = field(default_factory=list)
    epochs: dict[int, int] = field(default_factory=dict)
    keys: int = 0

    def key(self, route: str, body: Any) -> Once:
        self.keys += 1
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        return Once(self.principal.id, route, f"{self.mark}-{self.name}-{self.keys}", digest)

    # What it says. Every value follows from the dice of the step, so that a schedule says the same each time.

    def claim(self, dice: random.Random) -> Call:
        request = ClaimRequest(worker=self.name)
        once = self.key("POST /api/v1/claims", request.model_dump()) if dice.random() < 0.6 else None
        return Call(self.name, "claim", (request, self.principal, once))

    def ask(self, study: int, dice: random.Random) -> Call:
        request = AskRequest(worker=self.name)
        route = f"POST /api/v1/studies/{study}/ask"
        once = self.key(route, request.model_dump()) if dice.random() < 0.6 else None
        return Call(self.name, "ask", (study, request, self.principal, once))

    def report(self, lease: Lease, dice: random.Random) -> Call:
        first = self.epochs.get(lease.lease, 0)
        count = dice.choice((0, 1, 1, 2))
        self.epochs[lease.lease] = first + count
        reports = [EpochReport(epoch=n, value=measured(lease.lease, n)) for n in range(first, first + count)]
        request = ReportRequest(token=lease.token, reports=reports, checkpoint_epoch=first or None)
        return Call(self.name, "report", (lease.lease, request, self.principal), lease)

    def tell(self, lease: Lease, dice: random.Random, outcome: str = "") -> Call:
        chosen: Any = outcome or dice.choice(("complete",) * 6 + ("infeasible", "pruned", "failed"))
        value = (
            round(dice.random(), 6) if chosen == "complete" or (chosen != "failed" and dice.random() < 0.5) else None
        )
        request = TellRequest(token=lease.token, outcome=chosen, value=value, reason=f"as {self.name} has it")
        return Call(self.name, "tell", (lease.lease, request, self.principal), lease)

    def release(self, lease: Lease, dice: random.Random) -> Call:
        reason: Any = dice.choice(("shutdown", "stopped", "drained", "stalled", "broken"))
        request = ReleaseRequest(token=lease.token, reason=reason)
        return Call(self.name, "release", (lease.lease, request, self.principal), lease)

    def cancel(self, study: int, number: int) -> Call:
        return Call(self.name, "cancel_trial", (study, number))

    def requeue(self, study: int, number: int) -> Call:
        once = self.key(f"POST /api/v1/studies/{study}/trials/{number}/requeue", None)
        return Call(self.name, "requeue_trial", (study, number, once))

    def queue(self, study: int, dice: random.Random) -> Call:
        params: dict[str, Any] = {"x": round(dice.random(), 9)}
        if dice.random() < 0.5:
            params["eta"] = {"conv": 0.01, "fc": round(10 ** dice.uniform(-4, -1), 9)}
        return self._add(study, {"params": params})

    def record(self, study: int, dice: random.Random) -> Call:
        params = {"x": round(dice.random(), 9), "eta": {"conv": 0.01, "fc": 0.02}}
        return self._add(study, {"params": params, "value": round(dice.random(), 6)})

    def _add(self, study: int, document: dict[str, Any]) -> Call:
        once = self.key(f"POST /api/v1/studies/{study}/trials", document)
        return Call(self.name, "add_trial", (study, document, once))

    def steer(self, study: int, dice: random.Random) -> Call:
        """Change a study: mostly its state, now and then its budget or its concurrency."""
        document: dict[str, Any] = dice.choice(
            (
                {"state": "paused"},
                {"state": "paused"},
                {"state": "running"},
                {"state": "running"},
                {"state": "running"},
                {"state": "stopped"},
                {"budget": {"trials": dice.randint(1, 9)}},
                {"budget": {"trials": dice.randint(3, 9)}, "state": "running"},
                {"concurrency": dice.choice((None, 1, 2, 4))},
            )
        )
        return Call(self.name, "patch_study", (study, document))


def measured(lease: int, epoch: int) -> float:
    """What an attempt measures at an epoch: the same whenever it is said."""
    return ((lease * 37 + epoch * 11) % 101) / 101
