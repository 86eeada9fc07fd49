"""A relay between a client and PostgreSQL that counts what passes: round trips, transactions, and those that wrote.

PostgreSQL ends every answer with ReadyForQuery, so one of these is one round trip, BEGIN and COMMIT included; it says
whether a transaction is open, so one that says no is the end of a transaction. (A statement by itself is both.)
Transactions that wrote are counted by the server, which numbers each of them once. The invariant: nothing that passes
is changed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa
from sqlalchemy.engine import make_url

_SOCKET = ".s.PGSQL.5432"
_HEAD = 5  # a message's type and its length

# The next number that a transaction which writes is going to get. Asking for it uses none up.
_NEXT = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"


@dataclass(frozen=True)
class Count:
    """What passed."""

    round_trips: int = 0
    transactions: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(self.round_trips - other.round_trips, self.transactions - other.transactions)


class Scanner:
    """Finds ReadyForQuery in what a server sends on one connection, however it is cut into pieces."""

    def __init__(self) -> None:
        self._skip = 0
        """Bytes of the message at hand that are still to come and do not matter."""
        self._rest = b""

    def feed(self, data: bytes) -> Count:
        """Count what these bytes complete."""
        data = self._rest + data
        at, found, ended = 0, 0, 0
        while True:
            if self._skip:
                jump = min(self._skip, len(data) - at)
                self._skip -= jump
                at += jump
            if len(data) - at < _HEAD:
                break
            (length,) = struct.unpack_from("!I", data, at + 1)
            if data[at] == ord("Z"):
                if len(data) - at < _HEAD + 1:
                    break
                found += 1
                ended += data[at + _HEAD] == ord("I")
            self._skip = 1 + length
        self._rest = data[at:]
        return Count(found, ended)


class Relay:
    """A Unix socket of its own in front of PostgreSQL's; a context manager. `url` is the address that goes through it.

    `url` must be one on a Unix socket, where libpq asks for no encryption: the relay reads along.
    """

    def __init__(self, url: str, folder: Path) -> None:
        parsed = make_url(url)
        host = parsed.query["host"]
        assert isinstance(host, str)
        self._target = str(Path(host) / _SOCKET)
        self.url = parsed.update_query_dict({"host": str(folder)}).render_as_string(hide_password=False)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / _SOCKET))
        self._listener.listen(16)
        self._lock = threading.Lock()
        self._count = Count()
        self._open: set[socket.socket] = {self._listener}

    @property
    def count(self) -> Count:
        """What has passed until now. An answer is counted before it is passed on."""
        with self._lock:
            return self._count

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            sockets, self._open = self._open, set()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            with self._lock:
                self._open |= {client, server}
            for source, sink, scanner in ((client, server, None), (server, client, Scanner())):
                threading.Thread(target=self._pass, args=(source, sink, scanner), name="relay", daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, scanner: Scanner | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if scanner is not None:
                    seen = scanner.feed(data)
                    with self._lock:
                        self._count = Count(
                            self._count.round_trips + seen.round_trips, self._count.transactions + seen.transactions
                        )
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def writes(engine: sa.Engine) -> Iterator[_Writes]:
    """A connection of its own, past any relay, that tells how many transactions have written."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield _Writes(connection)


class _Writes:
    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def count(self) -> int:
        number: int = self._connection.exec_driver_sql(_NEXT).scalar_one()
        return number
