"""The points that were tried in a study, or are going to be.

A board is kept up to date by what changed since it was last held against the study: trials are replaced, never changed,
so it compares identities, and an ask costs no more among a thousand trials than among ten. Invariant: after `update` it
says what a fresh board would say of the same entries.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from hpo.records import Key
from hpo.snapshot import Entry, changed


class Board:
    """What was tried, by points of one space, which the entries were checked by. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: Sequence[Entry] = ()
        self._tried: Counter[Key] = Counter()

    def update(self, entries: Sequence[Entry]) -> None:
        """Hold the board against a study's trials, in order of their numbers."""
        with self._lock:
            if entries is self._entries:
                return
            old = self._entries
            for place in changed(old, entries):
                if place < len(old):
                    self._tried.subtract(self._keys(old[place]))
                self._tried.update(self._keys(entries[place]))
            for entry in old[len(entries) :]:
                self._tried.subtract(self._keys(entry))
            self._entries = entries

    def tried(self, key: Key | None, but: Entry | None) -> bool:
        """Whether a trial, other than `but`, has had this point or is going to."""
        if key is None or not (count := self._tried[key]):
            return False
        return but is None or count > self._keys(but).count(key)

    def _keys(self, entry: Entry) -> list[Key]:
        """The point that an entry stands for: none where it was cancelled, or is no point of the space."""
        # What is queued will be tried, so it is not suggested as well.
        return [] if entry.planned is None or entry.cancelled else [entry.planned]
