"""The few domain errors. `api/errors.py` maps each to one HTTP status; the CLI prints the message as it stands.

A message names the fault and, where there is one, the remedy; it never repeats input that was not checked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong with a document: `at` is a path into it (``space[2].high``), `fault` a sentence."""

    at: str
    fault: str

    def __str__(self) -> str:
        return f"{self.at}: {self.fault}" if self.at else self.fault


class WhetstoneError(Exception):
    """Base of everything this project raises on purpose."""

    code = "error"


class Invalid(WhetstoneError):
    """A document was refused whole; `faults` names every fault in it."""

    code = "invalid"

    def __init__(self, faults: Sequence[Fault], what: str = "the request") -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{what} has {count}")


class NotFound(WhetstoneError):
    """There is no such study, trial, lease, worker or token."""

    code = "not_found"


class Conflict(WhetstoneError):
    """The request contradicts what is stored: a name is taken, or a state does not allow it. Nothing was changed."""

    code = "conflict"


class NameTaken(Conflict):
    """An experiment's name belongs to another one. Whetlab's clients know it by its exact words."""

    code = "name_taken"


class LeaseLost(Conflict):
    """The lease is over: it expired, ended, or never belonged to this bearer. Nothing was changed."""

    code = "lost"


class Told(Conflict):
    """The trial has another outcome already, and that one stands. Nothing was changed."""

    code = "told"


class NewerFormat(Conflict):
    """The study's history was written by a newer Whetstone. It is neither read nor written here."""

    code = "newer_format"


class KeyReused(WhetstoneError):
    """An Idempotency-Key came again with another body."""

    code = "idempotency_key_reused"


class Unauthenticated(WhetstoneError):
    """No token, or one that is not known here."""

    code = "unauthenticated"


class Forbidden(WhetstoneError):
    """The token is known, and its role does not reach this far."""

    code = "forbidden"


class Busy(WhetstoneError):
    """Others are being served; the same request may succeed in a moment. Nothing was changed."""

    code = "busy"


class DatabaseUnavailable(WhetstoneError):
    """PostgreSQL does not answer."""

    code = "database_unavailable"
