"""The sampling process as the coordinator sees it: one for all studies, begun when first needed and again when it dies.

A slow sampler would hold the interpreter's lock for whole seconds; in a process of its own it delays nobody's tell. Its
studies are followed there by what changes. Promise: a sampler that hangs, crashes or takes all memory fails the ask it
was working for, with the reason, and no other.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hpo.samplers import Asked
from hpo.sampling_child import Again, Ask, Begun, Failed, Follow, Forget, Message, receive, send
from hpo.snapshot import Entry, Snapshot, changed
from hpo.spec import StudySpec

log = logging.getLogger("whetstone")

LIMIT_S = 120.0
"""An ask that takes longer is given up. A Gaussian process on 1,000 trials was seen to take 17 s."""
CHUNK = 500
"""Trials sent in one piece: packing more at a time would hold up the other threads."""
CODE = "import sys; from hpo.sampling_child import main; main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Set to one: sums of several threads differ in their last digits from run to run."""

_numbers = itertools.count()


class SamplerFailed(Exception):
    """A sampler came to no point in its process; the message says why."""


class Busy(Exception):
    """The sampling process works for somebody else."""


class Child:
    """One life of the sampling process."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.working = False
        """Whether it is at an ask."""
        self._end, theirs = socket.socketpair()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        arguments = [str(theirs.fileno()), str(os.getpid()), str(limit_s)]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and code
                [sys.executable, "-P", "-c", CODE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, **dict.fromkeys(THREADS, "1")},
            )
        self._end.settimeout(limit_s)
        weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Raises `OSError` where it is dead, or takes nothing any more."""
        send(self._end, message)

    def answer(self) -> Asked:
        """Wait for the answer to an ask that was sent.

        Raises:
            ConnectionError: it died before it heard of the ask.
            SamplerFailed: there is no answer; if that was not the sampler's own word, the process is dead after this.
        """
        self.working = False
        try:
            found = receive(self._end)
            assert isinstance(found, Begun)
            self.working = True
            found = receive(self._end)
        except TimeoutError:
            self.end()
            raise SamplerFailed(f"it gave no answer within {self._limit_s:g} s and was stopped") from None
        except (EOFError, OSError):
            why = self._epitaph()
            if not self.working:
                raise ConnectionError(why) from None
            raise SamplerFailed(f"its process {why} while it was working") from None
        except Exception as error:
            self.end()
            raise SamplerFailed(f"its answer could not be read: {type(error).__name__}: {error}") from error
        finally:
            self.working = False
        if isinstance(found, Failed):
            log.debug("in the sampling process: %s", found.traceback)
            raise SamplerFailed(found.why)
        assert isinstance(found, Asked)
        return found

    def end(self) -> None:
        self._end.close()
        _end(self._process)

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.end()
            return "closed its end"
        if code == -signal.SIGKILL:
            return "was killed (out of memory?)"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class SamplingProcess:
    """The one process of a coordinator; safe to share between threads, which take turns."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._turn = threading.Lock()
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The living process's, or None."""
        child = self._child
        return child.pid if child is not None and child.alive else None

    @contextmanager
    def turn(self, *, wait: bool = True) -> Iterator[Child]:
        """Have the process to oneself; a living one, as far as that can be known.

        A turn that is broken off ends the process: it may have half a question, or an answer that nobody waits for.

        Raises:
            Busy: somebody else has it, and `wait` is false.
        """
        if not self._turn.acquire(blocking=wait):
            raise Busy
        try:
            child = self._child
            if child is None or not child.alive:
                child = self._child = Child(self._limit_s)
            try:
                yield child
            except SamplerFailed:  # said in an answer, or by a process that is dead already
                raise
            except BaseException:
                child.end()
                raise
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the process; the next turn begins another."""
        child, self._child = self._child, None
        if child is not None:
            child.end()


class Elsewhere:
    """One study's sampler, in the sampling process. For one thread at a time."""

    def __init__(self, process: SamplingProcess) -> None:
        self._process = process
        self._study = next(_numbers)
        self._told: Child | None = None
        self._sent: Sequence[Entry] = ()

    def open(
        self, spec: StudySpec, snapshot: Snapshot, number: int, seed: int, fixed: Mapping[str, Any], wait: bool = True
    ) -> RemoteSession:
        """Begin with a trial, as `hpo.samplers.Session` does; without `wait` an ask may raise `Busy`."""
        ask = Ask(
            self._study,
            spec.sampler,
            snapshot.name,
            snapshot.direction,
            dict(snapshot.attributes),
            number,
            seed,
            dict(fixed),
        )
        return RemoteSession(self, spec, snapshot, ask, wait)

    def first(self, spec: StudySpec, snapshot: Snapshot, ask: Ask, wait: bool) -> Asked:
        """Bring the process up to date and ask it. A process that is found dead is begun again."""
        for last in (False, True):
            with self._process.turn(wait=wait) as child:
                try:
                    self._follow(child, spec, snapshot.entries)
                    child.send(ask)
                    return child.answer()
                except OSError as error:
                    child.end()
                    if last:
                        raise SamplerFailed(f"its process does not work: {error}") from error
        raise AssertionError("unreachable")

    def again(self, wait: bool) -> Asked:
        with self._process.turn(wait=wait) as child:
            if child is not self._told:
                raise SamplerFailed("its process was begun again while it was asked")
            try:
                child.send(Again(self._study))
                return child.answer()
            except OSError as error:
                child.end()
                raise SamplerFailed("its process died between two asks") from error

    def close(self) -> None:
        """Let the process forget the study, if it is alive and idle; otherwise that is no loss."""
        if self._told is None or not self._told.alive:
            return  # a turn would begin another
        try:
            with self._process.turn(wait=False) as child:
                if child is self._told:
                    child.send(Forget(self._study))
        except (Busy, OSError):
            pass

    def _follow(self, child: Child, spec: StudySpec, entries: Sequence[Entry]) -> None:
        if child is not self._told:
            self._told, self._sent = child, ()
            child.send(Follow(self._study, spec, 0, []))
        places = changed(self._sent, entries)
        # What is cut off or appended is so at the end of all.
        for start in range(0, max(len(places), 1), CHUNK):
            changes = [(place, entries[place].trial) for place in places[start : start + CHUNK]]
            child.send(Follow(self._study, spec, len(entries), changes))
        self._sent = entries


class RemoteSession:
    """A sampler in the sampling process, asked for one trial."""

    def __init__(self, elsewhere: Elsewhere, spec: StudySpec, snapshot: Snapshot, ask: Ask, wait: bool) -> None:
        self._elsewhere = elsewhere
        self._of = spec, snapshot, ask
        self._wait = wait
        self._begun = False

    def ask(self) -> Asked:
        """Suggest one point; asked again, another.

        Raises:
            SamplerFailed: it came to none.
        """
        if self._begun:
            return self._elsewhere.again(self._wait)
        self._begun = True
        return self._elsewhere.first(*self._of, self._wait)
