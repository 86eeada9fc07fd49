"""News between processes, over PostgreSQL's NOTIFY: something changed, look again. The news itself is in the tables.

Invariant: a notification reaches listeners only if its transaction commits, and after it has. A listener that was cut
off is told so ("resync") as soon as it hears again: what was said meanwhile is lost, and it should look at everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast, get_args

import psycopg2  # type: ignore[import-untyped]
import sqlalchemy as sa
from sqlalchemy import URL, Connection

from hpo.database import normalise

_log = logging.getLogger(__name__)

CHANNEL = "whetstone"
Kind = Literal["work", "trial", "study", "worker", "token"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_NOTIFY = sa.text("SELECT pg_notify(:channel, :payload)")
_PROBE_S = 20.0  # of silence, after which the connection is tried
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True)
class Event:
    """`kind` is what changed, in which study (None: not in one); "resync" says that events may have been missed."""

    kind: Kind | Literal["resync"]
    study: int | None


def notify(conn: Connection, kind: Kind, study_id: int | None = None) -> None:
    """Tell all listeners once the transaction of `conn` commits. The same said twice in it is heard once."""
    assert kind in KINDS, kind
    conn.execute(_NOTIFY, {"channel": CHANNEL, "payload": json.dumps({"kind": kind, "study": study_id})})


class Listener:
    """A thread with one connection that hands every event to `callback`, on that thread.

    It starts with `start` (or as a context manager), survives restarts of the server, and ends with `stop`. The first
    event of every connection is "resync". The callback should be quick (set a flag, wake a loop); an exception of its
    is logged and the listener goes on.
    """

    def __init__(self, engine_url: str | URL, callback: Callable[[Event], None]) -> None:
        url = engine_url if isinstance(engine_url, str) else engine_url.render_as_string(hide_password=False)
        self._url = normalise(url)
        self._callback = callback
        self._stopping = threading.Event()
        self._connected = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether events are being heard now."""
        return self._connected.is_set()

    def wait_until_connected(self, timeout_s: float) -> bool:
        return self._connected.wait(timeout_s)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and its connection; safe to repeat. Not to be called by the callback."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._waker.send(b".")
        if self._thread.is_alive():
            self._thread.join()
        self._wake.close()
        self._waker.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                connection = self._connect()
                try:
                    if failures:
                        _log.info("listening to PostgreSQL again")
                    failures = 0
                    self._connected.set()
                    self._tell(Event("resync", None))
                    self._listen(connection)
                finally:
                    self._connected.clear()
                    connection.close()
            except (psycopg2.Error, OSError) as error:
                if failures == 0:
                    _log.warning("not listening to PostgreSQL, trying again: %s", str(error).strip().split("\n")[0])
                pause = min(0.1 * 2**failures, _LONGEST_PAUSE_S)
                failures += 1
                self._stopping.wait(random.uniform(0.5, 1.0) * pause)

    def _connect(self) -> Any:
        dialect = self._url.get_dialect()()
        positional, named = dialect.create_connect_args(self._url)
        # Keep-alives find a peer that vanished without a word; the probe below finds one that has stopped answering.
        named = {**named, "connect_timeout": 5, "application_name": "whetstone listener"}
        named = {**named, "keepalives": 1, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
        connection = psycopg2.connect(*positional, **named)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"LISTEN {CHANNEL}")
        return connection

    def _listen(self, connection: Any) -> None:
        while not self._stopping.is_set():
            waiting = select.poll()  # select() itself takes no descriptor above 1,023
            for source in (connection, self._wake):
                waiting.register(source, select.POLLIN)
            if not waiting.poll(1000 * _PROBE_S):
                with connection.cursor() as cursor:
                    cursor.execute("SELECT 1")
            connection.poll()
            while connection.notifies:
                event = _parsed(connection.notifies.pop(0).payload)
                if event is not None:
                    self._tell(event)

    def _tell(self, event: Event) -> None:
        try:
            self._callback(event)
        except Exception:
            _log.exception("a listener's callback failed on %s", event)


def _parsed(payload: str) -> Event | None:
    """None for what is not ours: anybody who may connect may notify."""
    try:
        document = json.loads(payload)
        kind, study = document["kind"], document["study"]
    except (ValueError, KeyError, TypeError):
        return None
    if kind not in KINDS or not (study is None or (isinstance(study, int) and not isinstance(study, bool))):
        return None
    return Event(cast(Kind, kind), study)
