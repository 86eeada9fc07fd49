"""HTTP/1.1 as plainly as it can be spoken: a load of a thousand connections must not cost what it is to measure.

One `Connection` is one persistent TCP connection with one request at a time, on an asyncio loop. The invariant: an
answer is whole or an error; a request is sent again only where the connection was closed while it rested, before a
byte of an answer came.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """A whole answer. `closes` says that the server is done with the connection."""

    status: int
    body: bytes
    closes: bool

    def json(self) -> Any:
        return json.loads(self.body)


class Broken(Exception):
    """No whole answer came."""


class Parser:
    """Puts one answer after another together, however its bytes are cut."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._head: tuple[int, int, int, bool, bool] | None = None
        """Of the answer at hand: status, where its body begins, its length, whether in chunks, whether it closes."""

    @property
    def empty(self) -> bool:
        """Whether nothing has come that is not part of an answer already given out."""
        return not self._data

    def feed(self, data: bytes) -> Answer | None:
        """The answer that these bytes complete, if they do. Raises `Broken` on what is not HTTP/1.1."""
        self._data += data
        if self._head is None:
            end = self._data.find(_END)
            if end < 0:
                return None
            self._head = self._read_head(bytes(self._data[:end]), end + len(_END))
        status, begin, length, chunked, closes = self._head
        if chunked:
            found = self._chunks(begin)
            if found is None:
                return None
            body, after = found
        else:
            after = begin + length
            if len(self._data) < after:
                return None
            body = bytes(self._data[begin:after])
        del self._data[:after]
        self._head = None
        return Answer(status, body, closes)

    @property
    def begun(self) -> int | None:
        """The status of an answer whose head has come and whose body has not ended: a stream's."""
        return None if self._head is None else self._head[0]

    def _read_head(self, head: bytes, begin: int) -> tuple[int, int, int, bool, bool]:
        first, *lines = head.split(b"\r\n")
        words = first.split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise Broken(f"this is no HTTP: {first[:60]!r}")
        length, chunked, closes = 0, False, False
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = value == b"chunked"
            elif name == b"connection":
                closes = value == b"close"
        return int(words[1]), begin, length, chunked, closes

    def _chunks(self, at: int) -> tuple[bytes, int] | None:
        parts: list[bytes] = []
        while True:
            line = self._data.find(b"\r\n", at)
            if line < 0:
                return None
            size = int(bytes(self._data[at:line]).split(b";")[0], 16)
            begin, at = line + 2, line + 4 + size
            if len(self._data) < at:
                return None
            if size == 0:
                return b"".join(parts), at
            parts.append(bytes(self._data[begin : begin + size]))


class Connection(asyncio.Protocol):
    """A client of one server."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._place = (parts.hostname, parts.port or 80)
        self._fixed = f"Host: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n"
        self._transport: asyncio.Transport | None = None
        self._parser = Parser()
        self._waiting: asyncio.Future[Answer] | None = None
        self.opened = 0
        """How often it was connected; more than once where the server closed it while it rested."""
        self.repeated = 0
        self.bytes_heard = 0

    async def get(self, path: str) -> Answer:
        return await self._send("GET", path, b"", "")

    async def post(self, path: str, body: Any, *, key: str = "") -> Answer:
        """The answer to a document; `key` makes it safe to repeat."""
        text = json.dumps(body, separators=(",", ":")).encode()
        more = f"Idempotency-Key: {key}\r\n" if key else ""
        return await self._send("POST", path, text, f"Content-Type: application/json\r\n{more}")

    async def stream(self, path: str) -> int:
        """Ask for a stream that does not end; its status, once its head has come. What follows is only counted."""
        asking = asyncio.ensure_future(self.get(path))
        while self._parser.begun is None and not asking.done():
            await asyncio.sleep(0.05)
        asking.cancel()
        return self._parser.begun or 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _send(self, method: str, path: str, body: bytes, more: str) -> Answer:
        head = f"{method} {path} HTTP/1.1\r\n{self._fixed}{more}Content-Length: {len(body)}\r\n\r\n"
        message = head.encode() + body
        rested = self._transport is not None and not self._transport.is_closing()
        try:
            answer = await self._exchange(message)
        except Broken:
            if not rested or not self._parser.empty:
                raise
            self.repeated += 1
            answer = await self._exchange(message)
        if answer.closes:
            self.close()
        return answer

    async def _exchange(self, message: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._parser = Parser()
            self.opened += 1
            try:
                await loop.create_connection(lambda: self, *self._place)
            except OSError as error:
                raise Broken(f"no connection: {error}") from error
        assert self._transport is not None
        self._waiting = loop.create_future()
        self._transport.write(message)
        try:
            return await self._waiting
        finally:
            self._waiting = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.bytes_heard += len(data)
        try:
            answer = self._parser.feed(data)
        except (Broken, ValueError) as error:
            self._fail(Broken(str(error)))
            return
        if answer is not None and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(Broken(f"the connection was closed: {error or 'by the server'}"))

    def _fail(self, error: Broken) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)
