"""What a device's memory has room for, learnt from the trials that ran out of it.

A point that ran out on a device is not given to one as small again; nor, where the workload says how large points are
(`hpo.protocol.Sized`), is any that is as large as the smallest that ran out there. A device whose memory is unknown is
given anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from optuna.trial import TrialState

from hpo.protocol import Sized, Workload
from hpo.records import Key
from hpo.snapshot import Entry, changed
from hpo.space import Flat
from hpo.spec import StudySpec

OUT_OF_MEMORY = "whetstone:out_of_memory"
"""System attribute of a trial that ran out: the memory of its device in bytes, 0 where that is unknown."""


@dataclass(frozen=True)
class Mark:
    """A point that ran out of memory on a device with `memory_bytes`, and how large the workload says it is."""

    memory_bytes: int
    key: Key
    size: float | None


class Marks:
    """The points of a study that ran out of memory, kept up to date by what changed. Safe to share between threads."""

    def __init__(self, spec: StudySpec, workload: Workload | None) -> None:
        self._spec = spec
        self._workload = workload if isinstance(workload, Sized) else None
        self._lock = threading.Lock()
        self._entries: Sequence[Entry] = ()
        self._found: dict[int, Mark] = {}  # by place among the entries
        self._queued: dict[int, Queued] = {}  # the same

    def __len__(self) -> int:
        return len(self._found)

    def update(self, entries: Sequence[Entry]) -> None:
        """Look at a study's trials, in order of their numbers."""
        with self._lock:
            if entries is self._entries:
                return
            found = {place: mark for place, mark in self._found.items() if place < len(entries)}
            for place in range(len(entries), len(self._entries)):
                self._queued.pop(place, None)
            for place in changed(self._entries, entries):
                found.pop(place, None)
                self._queued.pop(place, None)
                if (mark := self._mark(entries[place])) is not None:
                    found[place] = mark
                elif entries[place].state == TrialState.WAITING:
                    self._queued[place] = Queued(entries[place], self)
            self._entries, self._found = entries, found

    def beyond(self, memory_bytes: int | None) -> list[int]:
        """Return the ids of the queued trials whose points, where they are complete, a device has no room for."""
        room = self.room(memory_bytes)
        if not room.limited:
            return []
        with self._lock:
            return [one.trial_id for one in self._queued.values() if not room.takes(one.entry.planned, one.size)]

    def size(self, point: Flat) -> float | None:
        """How large a point is, in the workload's own unit; None where it cannot tell."""
        if self._workload is None:
            return None
        return self._workload.footprint(self._spec.space.nest(point), self._spec.settings)

    def room(self, memory_bytes: int | None) -> Room:
        """Return what fits a device."""
        return Room(self, [] if memory_bytes is None else self._found.values(), memory_bytes or 0)

    def key(self, point: Flat) -> Key | None:
        return self._spec.space.key(point)

    def point(self, key: Key) -> Flat:
        return dict(zip(self._spec.space.names, key, strict=True))

    def _mark(self, entry: Entry) -> Mark | None:
        size = entry.mark(OUT_OF_MEMORY)
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or entry.key is None:
            return None
        return Mark(size, entry.key, self.size(self.point(entry.key)))


class Queued:
    """A queued trial; how large its point is, where it is complete, is found out when that matters."""

    def __init__(self, entry: Entry, marks: Marks) -> None:
        self.trial_id = entry.trial_id
        self.entry = entry
        self._marks = marks

    @cached_property
    def size(self) -> float | None:
        key = self.entry.planned
        return None if key is None else self._marks.size(self._marks.point(key))


class Room:
    """What fits one device."""

    def __init__(self, marks: Marks, found: Iterable[Mark], memory_bytes: int) -> None:
        relevant = [mark for mark in found if mark.memory_bytes >= memory_bytes]
        self._marks = marks
        self._keys = {mark.key for mark in relevant}
        self._least = min((mark.size for mark in relevant if mark.size is not None), default=None)

    @property
    def limited(self) -> bool:
        """Whether anything is known that does not fit."""
        return bool(self._keys)

    def holds(self, point: Flat) -> bool:
        """Whether nothing says that this complete point would run out of memory here."""
        if not self.limited:
            return True
        return self.takes(self._marks.key(point), None if self._least is None else self._marks.size(point))

    def takes(self, key: Key | None, size: float | None) -> bool:
        """The same of a point's key and size."""
        return key not in self._keys and (size is None or self._least is None or size < self._least)
