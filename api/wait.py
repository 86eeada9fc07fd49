"""Waiting without holding anything: claims that wait for work, and event streams.

One LISTEN connection per process hears what the coordinators notify and wakes waiters on the event loop; a waiter is a
coroutine, so a thousand of them hold neither a thread nor a connection. Work that may take long (a claim samples) runs
in a slow lane of a few threads of its own, so that tells and reports always find one. The invariants: every wait is
bounded, a lost notification only delays (waiters look again by themselves), and `close` ends all waits at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from hpo.events import Event, Listener

T = TypeVar("T")

SLOW_THREADS = 8
LOOK_AGAIN_S = 5.0
"""How long a waiter trusts that it would have been woken; less while nothing is heard at all."""
DEAF_S = 1.0
GATHER_S = 0.2
"""How long a stream gathers news before it sends them: a burst of reports becomes one event of each kind."""
STREAM_S = 600.0
"""A stream ends after this long (the browser opens the next one), so that a revoked token does not listen for ever."""
MAX_STREAMS = 500
STREAM_KINDS = frozenset({"trial", "study", "work"})


class _Waiter:
    """One coroutine that wants to hear of some kinds of events, of one study or of all."""

    def __init__(self, kinds: frozenset[str], study: int | None) -> None:
        self.kinds = kinds
        self.study = study
        self.news: set[str] = set()
        self.bell = asyncio.Event()

    def hear(self, event: Event) -> None:
        if event.kind == "resync":
            self.news |= self.kinds
        elif event.kind in self.kinds and (self.study is None or event.study in (None, self.study)):
            self.news.add(event.kind)
        if self.news:
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

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._waiters: set[_Waiter] = set()
        self._streams = 0
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
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring, event)

    def _ring(self, event: Event) -> None:
        for waiter in self._waiters:
            waiter.hear(event)

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            waiter.bell.set()

    @contextmanager
    def _waiter(self, kinds: frozenset[str], study: int | None) -> Iterator[_Waiter]:
        waiter = _Waiter(kinds, study)
        self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            self._waiters.discard(waiter)

    async def slowly(self, call: Callable[[], T]) -> T:
        """Run `call` in the slow lane."""
        return await to_thread.run_sync(call, limiter=self._slow)

    async def until(self, call: Callable[[], T | None], seconds: float, request: Request) -> T | None:
        """What `call` returns, as soon as it is not None; None after `seconds`, at shutdown, or when nobody listens.

        `call` runs in the slow lane at once, after every "work" event, and every few seconds.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        with self._waiter(frozenset({"work"}), None) as waiter:
            gone = asyncio.ensure_future(_disconnected(request, waiter))
            try:
                while True:
                    found = await self.slowly(call)
                    left = end - loop.time()
                    if found is not None or left <= 0 or self.closed or gone.done():
                        return found
                    heard = self._listener is not None and self._listener.connected
                    await waiter.wait(min(left, (LOOK_AGAIN_S if heard else DEAF_S) * random.uniform(0.8, 1.2)))
                    if self.closed or gone.done():
                        return None
            finally:
                gone.cancel()

    async def news(self, study: int) -> AsyncIterator[set[str]]:
        """Kinds of what happened to one study, gathered, never empty. Ends by itself after `STREAM_S`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + STREAM_S
        self._streams += 1
        try:
            with self._waiter(STREAM_KINDS, study) as waiter:
                while not self.closed and loop.time() < end:
                    news = await waiter.wait(end - loop.time())
                    if news and not self.closed:
                        await asyncio.sleep(GATHER_S)
                        yield news | await waiter.wait(0.0)
        finally:
            self._streams -= 1

    @property
    def streams_full(self) -> bool:
        """Whether this process has as many event streams open as it takes."""
        return self._streams >= MAX_STREAMS

    @property
    def waiters(self) -> int:
        """How many coroutines wait at this moment."""
        return len(self._waiters)


async def _disconnected(request: Request, waiter: _Waiter) -> None:
    """Return, and wake `waiter`, once the client has gone. The body was read before, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    waiter.bell.set()
