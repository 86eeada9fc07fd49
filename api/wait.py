"""Waiting without holding anything: claims that wait for work, and event streams.

One LISTEN connection per process hears what the coordinators notify and wakes waiters on the event loop; a waiter is a
coroutine, so a thousand of them hold neither a thread nor a connection. Claims stand in line and look in turn, so news
of work wakes a few of them, and more as long as work is found (`api.line`). What may take long (a claim samples) runs
in a slow lane of a few threads of its own, so that tells and reports always find one. The invariants: every wait is
bounded, a lost notification only delays (each line looks again by itself), and `close` ends all waits at once.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from contextlib import suppress
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from api.line import Line, Place
from hpo.events import Event, Listener

T = TypeVar("T")

SLOW_THREADS = 8
LOOK_AGAIN_S = 5.0
"""How long a line trusts that it would have been told of work; less while nothing is heard at all."""
DEAF_S = 1.0
GATHER_S = 0.2
"""How long a stream gathers news before it sends them: a burst of reports becomes one event of each kind."""
GATHER_EACH_S = 0.005
"""With many streams each gathers for longer: together they send at most one event in this time."""
STREAM_S = 600.0
"""A stream ends after this long (the browser opens the next one), so that a revoked token does not listen for ever."""
MAX_STREAMS = 500
STREAM_KINDS = frozenset({"trial", "study", "work"})


class _Stream:
    """One event stream, of one study."""

    def __init__(self) -> None:
        self.news: set[str] = set()
        self.bell = asyncio.Event()

    def hear(self, kinds: Iterable[str]) -> None:
        self.news.update(kinds)
        self.bell.set()

    async def wait(self, seconds: float) -> set[str]:
        """News since the last call; empty when none came within `seconds`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.bell.wait(), max(0.0, seconds))
        self.bell.clear()
        news, self.news = self.news, set()
        return news


class Waiting:
    """The process's one LISTEN connection, those who wait for it, and the slow lane. Lives on one event loop."""

    def __init__(self, database_url: str, *, on_token: Callable[[], None] = lambda: None) -> None:
        self._url = database_url
        self._on_token = on_token
        self._lines: dict[Hashable, Line] = {}
        self._streams: dict[int, set[_Stream]] = {}
        self._open = 0
        self._heard: set[Event] = set()
        self._heard_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        self._slow = CapacityLimiter(SLOW_THREADS)
        self.closed = False

    def start(self) -> None:
        """Begin to listen. Called on the loop, once; a database that is away is retried by the listener."""
        self._loop = asyncio.get_running_loop()
        self._listener = Listener(self._url, self._from_thread)
        self._listener.start()

    async def stop(self) -> None:
        """End all waits and the connection."""
        self.close()
        if self._listener is not None:
            await to_thread.run_sync(self._listener.stop)

    def close(self) -> None:
        """End all waits, now. May be called from any thread, also from a signal handler."""
        self.closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_all)

    def _from_thread(self, event: Event) -> None:
        """Hand an event to the loop, which is woken once for all that come before it gets to them."""
        if event.kind in ("token", "resync"):
            self._on_token()  # at once: whoever was revoked is refused from now on
        if self._loop is None or self._loop.is_closed():
            return
        with self._heard_lock:
            first = not self._heard
            self._heard.add(event)
        if first:
            self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        with self._heard_lock:
            heard, self._heard = self._heard, set()
        missed = any(event.kind == "resync" for event in heard)
        if missed or any(event.kind == "work" for event in heard):
            for line in self._lines.values():
                line.news()
        if missed or any(event.study is None for event in heard):
            kinds = STREAM_KINDS if missed else {event.kind for event in heard if event.study is None} & STREAM_KINDS
            for stream in self._all_streams() if kinds else ():
                stream.hear(kinds)
        for event in heard:
            if event.study is not None and event.kind in STREAM_KINDS:
                for stream in self._streams.get(event.study, ()):
                    stream.hear((event.kind,))

    def _wake_all(self) -> None:
        for line in self._lines.values():
            line.dismiss()
        for stream in self._all_streams():
            stream.bell.set()

    def _all_streams(self) -> list[_Stream]:
        return [stream for streams in self._streams.values() for stream in streams]

    async def slowly(self, call: Callable[[], T]) -> T:
        """Run `call` in the slow lane."""
        return await to_thread.run_sync(call, limiter=self._slow)

    async def until(
        self, call: Callable[[], T | None], seconds: float, request: Request, kind: Hashable = None
    ) -> T | None:
        """What `call` returns, as soon as it is not None; None after `seconds`, at shutdown, or when nobody listens.

        `call` runs in the slow lane at once, and again when it is this waiter's turn: those of one `kind` can do the
        same work, so after a "work" event, and every few seconds, a few of them look for all.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        place = Place()
        line = self._lines.get(kind)
        if line is None:
            line = self._lines[kind] = Line(self._look_again)
        line.enter(place)
        gone = asyncio.ensure_future(_disconnected(request, place.called))
        try:
            while True:
                found = await self.slowly(call)
                line.looked(place, found=found is not None)
                if found is not None or loop.time() >= end or self.closed or gone.done():
                    return found
                line.wait(place)
                with suppress(TimeoutError):
                    await asyncio.wait_for(place.called.wait(), max(0.0, end - loop.time()))
                if not place.has_turn or self.closed or gone.done():
                    return None
        finally:
            gone.cancel()
            line.leave(place)
            if not len(line):
                self._lines.pop(kind, None)

    def _look_again(self) -> float:
        heard = self._listener is not None and self._listener.connected
        return (LOOK_AGAIN_S if heard else DEAF_S) * random.uniform(0.8, 1.2)

    async def news(self, study: int) -> AsyncIterator[set[str]]:
        """Kinds of what happened to one study, gathered, never empty. Ends by itself after `STREAM_S`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + STREAM_S
        stream = _Stream()
        self._open += 1
        self._streams.setdefault(study, set()).add(stream)
        try:
            while not self.closed and loop.time() < end:
                news = await stream.wait(end - loop.time())
                if news and not self.closed:
                    await asyncio.sleep(max(GATHER_S, self._open * GATHER_EACH_S))
                    yield news | await stream.wait(0.0)
        finally:
            self._open -= 1
            self._streams[study].discard(stream)
            if not self._streams[study]:
                del self._streams[study]

    @property
    def streams_full(self) -> bool:
        """Whether this process has as many event streams open as it takes."""
        return self._open >= MAX_STREAMS

    @property
    def waiters(self) -> int:
        """How many coroutines wait at this moment."""
        return self._open + sum(len(line) for line in self._lines.values())


async def _disconnected(request: Request, called: asyncio.Event) -> None:
    """Return, and ring, once the client has gone. The body was read before, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    called.set()
