"""What a study's trials rule out for the next one: points that were tried, and points too large for a device.

A board is kept up to date by what changed since it was last held against the study: trials are replaced, never changed,
so it compares identities, and an ask costs no more for a thousand trials than for ten. Invariant: after `update` it
says what a fresh board would say of the same entries.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from hpo.history import Entry
from hpo.protocol import Value
from hpo.space import Flat, SearchSpace

OUT_OF_MEMORY = "whetstone:out_of_memory"
"""System attribute of a trial that ran out: the memory of its device in bytes, 0 where that is unknown."""

Key = tuple[Value, ...]


@dataclass(frozen=True)
class Mark:
    """A point that ran out of memory on a device with `memory_bytes`."""

    memory_bytes: int
    key: Key
    point: Flat


def changed(old: Sequence[Entry], new: Sequence[Entry]) -> list[int]:
    """Return the places in `new` at which something else stands than in `old`."""
    same = bytes(map(operator.is_, old, new))
    places = []
    place = same.find(0)
    while place >= 0:
        places.append(place)
        place = same.find(0, place + 1)
    return [*places, *range(len(same), len(new))]


class Board:
    """What is known of a study's points, for one space. Safe to share between threads."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._lock = threading.Lock()
        self._entries: Sequence[Entry] = ()
        self._taken: Counter[Key] = Counter()
        self._marks: dict[int, Mark] = {}  # by place among the entries
        self.marks: tuple[Mark, ...] = ()

    def update(self, entries: Sequence[Entry]) -> None:
        """Hold the board against a study's trials, in order of their numbers."""
        with self._lock:
            if entries is not self._entries:
                self._update(entries)

    def _update(self, entries: Sequence[Entry]) -> None:
        marks = dict(self._marks)
        for place in changed(self._entries, entries):
            if place < len(self._entries):
                self._remove(marks, place)
            entry = entries[place]
            for key in self._keys(entry):
                self._taken[key] += 1
            if (mark := _mark(entry)) is not None:
                marks[place] = mark
        for place in range(len(entries), len(self._entries)):
            self._remove(marks, place)
        self._entries = entries
        if marks != self._marks:
            self._marks, self.marks = marks, tuple(marks.values())

    def taken(self, key: Key | None, number: int) -> bool:
        """Whether a trial other than `number` has had this point, or is going to have it."""
        if key is None or not (count := self._taken[key]):
            return False
        own = self._entry(number)
        return own is None or count > self._keys(own).count(key)

    def _remove(self, marks: dict[int, Mark], place: int) -> None:
        self._taken.subtract(self._keys(self._entries[place]))
        marks.pop(place, None)

    def _keys(self, entry: Entry) -> list[Key]:
        """The point that an entry stands for: none where it was cancelled, or is no point of the space."""
        if entry.key is not None:
            return [] if entry.cancelled else [entry.key]
        # A queued point waits with its values in an attribute: it will be tried, so it is not suggested as well.
        fixed = entry.trial.system_attrs.get("fixed_params")
        if entry.trial.state != TrialState.WAITING or not isinstance(fixed, Mapping):
            return []
        key = self._space.key(fixed)
        return [] if key is None else [key]

    def _entry(self, number: int) -> Entry | None:
        if number < len(self._entries) and self._entries[number].trial.number == number:
            return self._entries[number]
        return next((entry for entry in reversed(self._entries) if entry.trial.number == number), None)


def _mark(entry: Entry) -> Mark | None:
    size = entry.trial.system_attrs.get(OUT_OF_MEMORY)
    if entry.key is None or isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        return None
    return Mark(size, entry.key, entry.trial.params)
