"""Expiry: a trial whose worker has been silent for a term is taken back and leased again.

Only a coordinator that has reached PostgreSQL for one whole term without a gap acts on it: after an outage of the
database, a freeze of this process, a restart or a jump of the clock, every worker has a term to make itself heard.
Trials that stock Optuna started have no lease and never expire.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa

from hpo import database, idempotency
from hpo.desk import HISTORY_FORMAT, Desk
from hpo.errors import DatabaseUnavailable

log = logging.getLogger("whetstone")

GAP_TERMS = 2 / 3
"""A longer time between two contacts is a gap. The reaper comes every third of a term."""
CLEAN_EVERY_S = 600.0

OVERDUE = sa.text("""
    SELECT attempt_id FROM whetstone.attempts
    WHERE state = 'leased' AND expires_at < clock_timestamp() ORDER BY expires_at
""")

EXPIRE = "SELECT whetstone.expire(%(lease)s, %(format)s)"


class Contact:
    """How long PostgreSQL has been reached without a gap, by its clock and by ours: the shorter of the two counts.

    Ours goes on while this machine sleeps; PostgreSQL's shows jumps of the clock that leases are measured by.
    """

    def __init__(self, term_s: float) -> None:
        self._term_s = term_s
        self._lock = threading.Lock()
        self._last: tuple[float, datetime] | None = None
        self._whole_s = 0.0

    def made(self, theirs: datetime) -> bool:
        """Note a contact; tell whether there has been no gap for a whole term."""
        with self._lock:
            ours = _uptime_s()
            if self._last is not None:
                passed = (ours - self._last[0], (theirs - self._last[1]).total_seconds())
                whole = min(passed) >= 0 and max(passed) <= GAP_TERMS * self._term_s
                self._whole_s = self._whole_s + min(passed) if whole else 0.0
            self._last = (ours, theirs)
            return self._whole_s >= self._term_s

    def broken(self) -> None:
        with self._lock:
            self._last = None
            self._whole_s = 0.0


def _uptime_s() -> float:
    """Seconds on a clock that also runs while the machine sleeps, where there is one."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


def expire(desk: Desk, contact: Contact) -> int:
    """Take back every trial whose lease is overdue, each in a transaction of its own; return how many there were.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer; the term of contact begins anew.
    """
    try:
        with desk.transaction() as conn:
            whole = contact.made(database.now(conn))
            overdue = conn.execute(OVERDUE).scalars().all() if whole else []
        return sum(_expire(desk, lease) for lease in overdue)
    except DatabaseUnavailable:
        contact.broken()
        raise


def _expire(desk: Desk, lease: int) -> bool:
    try:
        gone: dict[str, Any] | None = database.call(desk.engine, EXPIRE, {"lease": lease, "format": HISTORY_FORMAT})
    except DatabaseUnavailable:
        raise
    except Exception:
        log.exception("lease %d could not be expired; the others are", lease)
        return False
    if gone is None:
        return False  # renewed, told or released while we were on our way, or deleted with its study
    log.warning("study %d: trial %d is %s: %s", gone["study"], gone["trial"], gone["state"], gone["why"])
    return True


def clean(desk: Desk) -> None:
    """Forget idempotency keys past their time."""
    with desk.transaction() as conn:
        idempotency.clean(conn)


class Expires(Protocol):
    """What the reaper calls: the coordinator."""

    def expire(self) -> int: ...


class Reaper:
    """A thread that calls `expire` every third of a term until it is stopped; an outage only makes it say so once."""

    def __init__(self, coordinator: Expires, interval_s: float) -> None:
        self._coordinator = coordinator
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="whetstone-reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def __enter__(self) -> Reaper:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        away = False
        while not self._stopped.wait(self._interval_s):
            try:
                self._coordinator.expire()
                if away:
                    log.warning("PostgreSQL answers again; leases are given a whole term before any expires")
                away = False
            except DatabaseUnavailable as error:
                if not away:
                    log.warning("no lease expires while PostgreSQL is away: %s", error)
                away = True
            except Exception:
                log.exception("expiry failed; it is tried again")
