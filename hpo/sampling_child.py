"""The process in which slow samplers work: it follows its coordinator's studies and suggests points for them.

It ends when its coordinator does, however that happens: the socket between them closes, or the parent is another
process all at once; and one that hangs, even where Python cannot run, is ended by a timer of the operating system's.
It holds nothing that the coordinator lacks, so it may be killed at any time. Invariant: one message after another, and
what it answers is what `hpo.samplers.Session` says of the same trials.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.samplers import Asked, Session
from hpo.snapshot import Entry, Snapshot, entry_of
from hpo.spec import Choice, StudySpec
from hpo.tpe import Table

LENGTH = struct.Struct("!Q")
LOOK_S = 2.0
NICE = 5
"""Tells and reports go first where the processor is short."""


@dataclass(frozen=True)
class Follow:
    """What has changed in a study: how many trials it has now, and those that are others than before, by place."""

    study: int
    spec: StudySpec
    length: int
    changes: list[tuple[int, FrozenTrial]]


@dataclass(frozen=True)
class Ask:
    """Begin with a trial of a study that is followed, and answer the first point."""

    study: int
    sampler: Choice
    name: str
    direction: StudyDirection
    attributes: Mapping[str, Any]
    number: int
    seed: int
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Again:
    """Answer another point for the trial of the last `Ask`."""

    study: int


@dataclass(frozen=True)
class Forget:
    """The study is not asked for any more."""

    study: int


@dataclass(frozen=True)
class Begun:
    """An ask was heard, and the work on it begins: what happens now is that ask's own affair."""


@dataclass(frozen=True)
class Failed:
    """The sampler raised an exception: what to say, and its traceback for the log."""

    why: str
    traceback: str


Message = Follow | Ask | Again | Forget


@dataclass
class _Study:
    spec: StudySpec
    table: Table
    entries: list[Entry] = field(default_factory=list)
    session: Session | None = None


class Sampling:
    """What the process knows, and its answers."""

    def __init__(self) -> None:
        self._studies: dict[int, _Study] = {}

    def take(self, message: Message) -> Asked | Failed | None:
        """Do what a message says; only `Ask` and `Again` are answered."""
        if isinstance(message, Forget):
            self._studies.pop(message.study, None)
            return None
        if isinstance(message, Follow):
            self._follow(message)
            return None
        try:
            return self._ask(message)
        except Exception as error:
            return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())

    def _follow(self, message: Follow) -> None:
        study = self._studies.get(message.study)
        if study is None:
            study = self._studies[message.study] = _Study(message.spec, Table(message.spec.space))
        del study.entries[message.length :]
        for place, trial in message.changes:
            entry = entry_of(trial).checked_by(study.spec.space)
            if place < len(study.entries):
                study.entries[place] = entry
            else:
                study.entries.append(entry)

    def _ask(self, message: Ask | Again) -> Asked:
        study = self._studies[message.study]
        if isinstance(message, Ask):
            spec = replace(study.spec, sampler=message.sampler)
            snapshot = Snapshot(message.name, message.direction, tuple(study.entries), message.attributes)
            study.session = Session(spec, snapshot, message.number, message.seed, message.fixed, study.table)
        assert study.session is not None, "asked again before it was asked"
        return study.session.ask()


def send(end: socket.socket, message: object) -> None:
    """Send one message whole."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    end.sendall(LENGTH.pack(len(data)) + data)


def receive(end: socket.socket) -> Any:
    """Receive one message. Raises `EOFError` when the other end is closed."""
    (length,) = LENGTH.unpack(_exactly(end, LENGTH.size))
    return pickle.loads(_exactly(end, length))  # noqa: S301  # from the other end of our own socket pair


def _exactly(end: socket.socket, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = end.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data


def _listen(end: socket.socket, inbox: queue.SimpleQueue[Message], parent: int) -> None:
    """Take messages as they come, also while a sampler works, so as to notice when there will be no more."""
    heard = select.poll()  # `select.select` knows no handles from 1024 on, and this one was the coordinator's
    heard.register(end, select.POLLIN)
    try:
        while os.getppid() == parent:
            if heard.poll(LOOK_S * 1000):
                inbox.put(receive(end))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)  # at once, whatever the sampler is doing


def main(handle: int, parent: int, limit_s: float) -> None:
    """Serve the coordinator at the other end of a socket until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator
    os.nice(NICE)
    end = socket.socket(fileno=handle)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(end, inbox, parent), daemon=True).start()
    sampling = Sampling()
    while True:
        message = inbox.get()
        if isinstance(message, Ask | Again):
            send(end, Begun())
        faulthandler.dump_traceback_later(limit_s + LOOK_S, exit=True, file=sys.__stderr__ or sys.stderr)
        answer = sampling.take(message)
        faulthandler.cancel_dump_traceback_later()
        if answer is not None:
            send(end, answer)
