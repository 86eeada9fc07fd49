"""A man in the middle: passes PostgreSQL's messages on, and cuts a connection at a chosen one.

It listens on a Unix socket of its own and connects to the real server. `arm` chooses the next fault: the n-th query
that passes, on whichever connection, is cut off before PostgreSQL sees it ("before"), after PostgreSQL has answered
and before the answer arrives ("after": where that query commits, a lost reply), while it is being done ("during"), or
its backend is terminated by PostgreSQL itself ("terminate"). The invariant: a fault is done at most once.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sqlalchemy.engine import URL, make_url

When = Literal["before", "after", "during", "terminate"]
_SOCKET = ".s.PGSQL.5432"
_KEY_DATA = b"K\x00\x00\x00\x0c"  # the message in which a backend says its process id
_READY = b"Z\x00\x00\x00\x05"  # and the one with which every answer ends


class _Link:
    """One connection of a client, its connection to the server, and where the stream of messages stands."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.unread = b""
        self.greeted = False  # the first message has no type
        self.pid: int | None = None
        self.mute = False  # the answer to the query under way is not passed on
        self.heard = b""  # the last bytes of the server: a message may come in pieces

    def queries(self, data: bytes) -> list[tuple[bool, bytes]]:
        """Split what the client sent into whole messages; tell of each whether it is a query."""
        self.unread += data
        found: list[tuple[bool, bytes]] = []
        while True:
            start = 1 if self.greeted else 0
            if len(self.unread) < start + 4:
                return found
            (length,) = struct.unpack("!i", self.unread[start : start + 4])
            if len(self.unread) < start + length:
                return found
            message, self.unread = self.unread[: start + length], self.unread[start + length :]
            found.append((self.greeted and message[:1] == b"Q", message))
            self.greeted = True


class Proxy:
    """A way to the server at `target` that leads through `folder`; `terminate` ends a backend by its process id."""

    def __init__(self, target: str, folder: Path, terminate: Callable[[int], None]) -> None:
        self._target = make_url(target)
        self._terminate = terminate
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / _SOCKET))
        self._listener.listen(64)
        self._folder = folder
        self._links: set[_Link] = set()
        self._armed: tuple[When, int] | None = None
        self._fired = 0
        self.queries = 0
        """How many have passed, or been cut off."""
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = os.pipe()[::-1]
        self._closing = False
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The server's address by way of this proxy."""
        query = {name: value for name, value in self._target.query.items() if name not in ("host", "port")}
        through: URL = self._target.set(host=None, port=None, query={**query, "host": str(self._folder)})
        return through.render_as_string(hide_password=False)

    def arm(self, when: When, nth: int) -> None:
        """Let the n-th query from now on, counted from 0, meet this fault. It replaces one that has not happened."""
        with self._lock:
            self._armed = (when, nth)

    def disarm(self) -> int:
        """Take an unspent fault back; return how many have happened so far."""
        with self._lock:
            self._armed = None
            return self._fired

    def cut_all(self) -> None:
        """Cut every connection now."""
        with self._lock:
            links = list(self._links)
        for link in links:
            for end in (link.client, link.server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut everything and let nobody in any more. Safe to repeat."""
        if not self._thread.is_alive():
            return
        self._closing = True
        with contextlib.suppress(OSError):  # it may have noticed by itself
            os.write(self._wake, b"x")
        self._thread.join(10)

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select():
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Link) and key.data in self._links:
                        self._pass_on(key.data, key.fileobj is key.data.client)
        finally:
            for link in list(self._links):
                self._drop(link)
            self._selector.close()
            self._listener.close()
            os.close(self._wake)
            os.close(self._woken)
            (self._folder / _SOCKET).unlink(missing_ok=True)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = self._connect()
        except OSError:
            client.close()  # the server is away: so are we
            return
        link = _Link(client, server)
        self._links.add(link)
        for end in (client, server):
            self._selector.register(end, selectors.EVENT_READ, link)

    def _connect(self) -> socket.socket:
        host = self._target.host or self._target.query.get("host") or "/tmp"
        port = self._target.port or int(str(self._target.query.get("port", 5432)))
        assert isinstance(host, str)
        if not host.startswith("/"):
            return socket.create_connection((host, port), timeout=10)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _pass_on(self, link: _Link, from_client: bool) -> None:
        try:
            data = (link.client if from_client else link.server).recv(1 << 16)
            if not data:
                self._drop(link)
            elif from_client:
                for query, message in link.queries(data):
                    if not self._forward(link, message, self._due() if query else None):
                        break
            else:
                self._answer(link, data)
        except OSError:
            self._drop(link)

    def _due(self) -> When | None:
        """The fault that this query is to meet, if any."""
        with self._lock:
            self.queries += 1
            if self._armed is None:
                return None
            when, left = self._armed
            self._armed = (when, left - 1) if left else None
            self._fired += not left
            return None if left else when

    def _forward(self, link: _Link, message: bytes, fault: When | None) -> bool:
        if fault == "before":
            self._drop(link)
            return False
        link.server.sendall(message)
        if fault == "during":
            self._drop(link)
            return False
        link.mute = fault == "after"
        if fault == "terminate" and link.pid is not None:
            self._terminate(link.pid)
        return True

    def _answer(self, link: _Link, data: bytes) -> None:
        heard = link.heard + data
        link.heard = heard[-8:]
        if link.pid is None and 0 <= (at := heard.find(_KEY_DATA)) <= len(heard) - 9:
            (link.pid,) = struct.unpack("!i", heard[at + 5 : at + 9])
        if not link.mute:
            link.client.sendall(data)
        elif heard[-6:-1] == _READY:
            self._drop(link)

    def _drop(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)
        for end in (link.client, link.server):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()
