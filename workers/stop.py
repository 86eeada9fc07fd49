"""The wish to stop, as signals bring it: SIGTERM and SIGINT ask once, a second one insists.

The handler only takes note, so that no lock can be held under it, except inside `breakable`, where it raises
`Stopped`: a main thread that waits for an answer or sleeps is free at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Somebody asked this process to stop. Not an `Exception`, so that no handler of errors swallows it."""


class Stop:
    """Whether, when and how firmly this process was asked to stop."""

    def __init__(self) -> None:
        self._count = 0
        self._signal = 0
        self._since = 0.0
        self._breakable = 0  # the thread in a breakable stretch

    @property
    def requested(self) -> bool:
        return self._count > 0

    @property
    def insisted(self) -> bool:
        """Asked twice: leave without finishing anything."""
        return self._count > 1

    @property
    def exit_code(self) -> int:
        """What a process ends with that was insisted upon, as shells count it (143 after SIGTERM)."""
        return 128 + self._signal

    @property
    def elapsed(self) -> float:
        """Seconds since the first request."""
        return time.monotonic() - self._since if self._count else 0.0

    def left(self, within_s: float) -> float | None:
        """Seconds left of `within_s` since the request, at least a tenth; None while nobody asked."""
        if not self._count:
            return None
        return 0.1 if self.insisted else max(0.1, within_s - self.elapsed)

    def request(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask; also the signal handler, which frees a main thread that waits. From other threads it only takes note."""
        if not self._count:
            self._since, self._signal = time.monotonic(), number
        self._count += 1
        if self._breakable == threading.get_ident():
            self._breakable = 0
            raise Stopped

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Listen to SIGTERM and SIGINT (only a process's main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """A stretch in which a request to stop (also one made already) raises `Stopped`. In the main thread only."""
        self._breakable = threading.get_ident()
        try:
            if self._count:
                raise Stopped
            yield
        finally:
            self._breakable = 0

    def sleep(self, seconds: float) -> None:
        """Sleep; raises `Stopped` as soon as somebody asks."""
        until = time.monotonic() + seconds
        with self.breakable():
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))  # in steps, for a request from another thread
                if self._count:
                    raise Stopped
