"""The coordinators of a schedule: several on one database, each behind a proxy of its own, each with its reaper.

A `Place` is one coordinator, as an object of this process or as a process of its own; it can be killed, and another
takes its place. It takes down when its reaper came by, so that who judges can tell a lease that nobody took back from
a machine on which nobody had the time to.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy as sa

from hpo import database
from hpo.coordinator import Coordinator
from hpo.errors import Fault, Invalid, WhetstoneError
from hpo.expiry import GAP_TERMS, Reaper
from tests.faults.proxy import Proxy
from tests.integration import leases_harness

Tick = tuple[float, float, bool]
"""When a reaper came by: begin and end on the monotonic clock, and whether PostgreSQL answered."""


class Gone(Exception):
    """The coordinator ended while the call was under way: nobody knows what became of it."""


class _Watched:
    """A coordinator as its reaper sees it: every visit is taken down, and none is made while the gate is held."""

    def __init__(self, coordinator: Coordinator, taken_down: Callable[[Tick], None], gate: threading.Lock) -> None:
        self._coordinator, self._taken_down, self._gate = coordinator, taken_down, gate

    def expire(self) -> int:
        with self._gate:
            began, fine = time.monotonic(), False
            try:
                taken = self._coordinator.expire()
                fine = True
                return taken
            finally:
                self._taken_down((began, time.monotonic(), fine))


class Desk:
    """A coordinator with its engine and its reaper, in this process."""

    def __init__(self, url: str, term_s: float, taken_down: Callable[[Tick], None]) -> None:
        self.engine: sa.Engine = database.connect(url, pool_size=4, max_overflow=8, pool_timeout_s=10)
        self.coordinator = leases_harness.coordinator(self.engine, term_s=term_s)
        self.gate = threading.Lock()
        self._reaper = Reaper(_Watched(self.coordinator, taken_down, self.gate), term_s / 3)
        self._reaper.start()

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self.coordinator, method)(*args)

    def hold(self) -> None:
        """Keep the reaper away until `go_on`."""
        self.gate.acquire()

    def go_on(self) -> None:
        self.gate.release()

    def close(self) -> None:
        self._reaper.stop()
        close = getattr(self.coordinator, "close", None)
        if close is not None:
            close()
        self.engine.dispose()

    kill = close


def _portable(error: Exception) -> Exception:
    """An exception that arrives in another process as what it was: those with arguments of their own do not."""
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    if isinstance(error, Invalid):
        return Invalid([Fault("", str(fault)) for fault in error.faults])
    return RuntimeError(f"{type(error).__name__}: {error}")


def _serve(wire: Connection, url: str, term_s: float) -> None:
    """A coordinator as a process: calls come in and answers go out, many at a time."""
    logging.disable(logging.CRITICAL)
    saying = threading.Lock()

    def say(*what: Any) -> None:
        with saying, contextlib.suppress(OSError):
            wire.send(what)

    desk = Desk(url, term_s, lambda tick: say("tick", tick))

    def work(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            answer = desk.call(method, args)
        except Exception as error:
            if not isinstance(error, WhetstoneError):
                error.add_note("".join(traceback.format_exception(error)))
            say("raised", number, _portable(error))
        else:
            say("answered", number, answer)

    with contextlib.suppress(EOFError, OSError):
        while True:
            number, method, args = wire.recv()
            if method in ("hold", "go_on"):
                getattr(desk, method)()
                say("answered", number, None)
            else:
                threading.Thread(target=work, args=(number, method, args), daemon=True).start()
    os._exit(0)


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__, "hpo.suggest", "optuna.samplers"])


class RemoteDesk:
    """A coordinator that is a process of its own."""

    def __init__(self, url: str, term_s: float, taken_down: Callable[[Tick], None]) -> None:
        self._taken_down = taken_down
        self._wire, theirs = multiprocessing.Pipe()
        self._process = _forks.Process(target=_serve, args=(theirs, url, term_s), daemon=True)
        self._process.start()
        theirs.close()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._asked = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        answer: Future[Any] = Future()
        with self._lock:
            self._asked += 1
            number = self._asked
            self._waiting[number] = answer
            try:
                self._wire.send((number, method, args))
            except OSError:
                raise Gone from None
        return answer.result(60)

    def hold(self) -> None:
        with contextlib.suppress(Gone):
            self.call("hold", ())

    def go_on(self) -> None:
        with contextlib.suppress(Gone):
            self.call("go_on", ())

    def kill(self) -> None:
        """SIGKILL: whatever it was about, it does no more."""
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._process.join(10)
        self._reader.join(10)
        self._wire.close()

    close = kill

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, *what = self._wire.recv()
                if kind == "tick":
                    self._taken_down(what[0])
                    continue
                with self._lock:
                    answer = self._waiting.pop(what[0])
                if kind == "answered":
                    answer.set_result(what[1])
                else:
                    answer.set_exception(what[1])
        with self._lock:
            lost, self._waiting = self._waiting, {}
        for answer in lost.values():
            answer.set_exception(Gone())


class Place:
    """One coordinator and its way to PostgreSQL. `hurt_at` is when something was last done to either."""

    def __init__(self, house: House, number: int) -> None:
        self._house, self.number = house, number
        self._lives = 0
        self.ticks: deque[Tick] = deque(maxlen=200)
        self.hurt_at = -1e9
        self._begin()

    def _begin(self) -> None:
        self._lives += 1
        self.ticks.clear()
        house = self._house
        self.proxy = Proxy(house.url, house.folder / f"{self.number}.{self._lives}", house.terminate)
        made = RemoteDesk if house.processes else Desk
        self.desk: Desk | RemoteDesk = made(self.proxy.url, house.term_s, self.ticks.append)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return self.desk.call(method, args)

    def hurt(self) -> None:
        self.hurt_at = time.monotonic()

    def replace(self) -> None:
        """Kill this coordinator, whatever it is about, and let another take its place."""
        self.hurt()
        self._end()
        self._begin()

    def _end(self) -> None:
        if isinstance(self.desk, RemoteDesk):
            self.desk.kill()
            self.proxy.close()
        else:
            self.proxy.close()  # first: an object cannot be killed, but it can be kept from doing any more
            self.desk.kill()

    def close(self) -> None:
        self.desk.close()
        self.proxy.close()

    def came_by(self, since: float, until: float) -> bool:
        """Whether its reaper came and went in that time with a whole term without a gap behind it: it could act."""
        gap_s = GAP_TERMS * self._house.term_s * 0.9
        unbroken, before = 0.0, -1e9
        for came, went, fine in list(self.ticks):
            if not fine:
                before = -1e9
                continue
            if went - before > gap_s:
                unbroken = went  # contact begins anew
            elif came >= since and went <= until and came - unbroken > self._house.term_s:
                return True
            before = came
        return False


class House:
    """The coordinators of one schedule; `url` leads to the database itself, past all proxies."""

    def __init__(self, url: str, folder: Path, *, coordinators: int, processes: bool, term_s: float) -> None:
        self.url, self.folder, self.processes, self.term_s = url, folder, processes, term_s
        self._admin = psycopg2.connect(database.normalise(url).set(drivername="postgresql").render_as_string(False))
        self._admin.autocommit = True
        self._admin_lock = threading.Lock()
        self.places = [Place(self, number) for number in range(coordinators)]

    def terminate(self, pid: int) -> None:
        """Let PostgreSQL end one of its backends."""
        with self._admin_lock, self._admin.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No reaper comes by inside the block."""
        for place in self.places:
            place.desk.hold()
        try:
            yield
        finally:
            for place in self.places:
                place.desk.go_on()

    def came_by(self, since: float, until: float) -> bool:
        """Whether some coordinator could have acted in that time on a lease that was over at its beginning."""
        return any(place.came_by(since, until) for place in self.places)

    def close(self) -> None:
        for place in self.places:
            place.close()
        self._admin.close()
