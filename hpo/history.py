"""The trials of one study in memory, brought up to date by what has changed.

One call of `whetstone.changes` tells a history all that it does not know: new trials, those that run or wait no more,
those that `whetstone.revisions` names. Invariants: a finished trial is read once, and again only when a revision names
it; after `refresh` the history holds one committed state of the database, at least as new as the call; what it has
given out (`Snapshot`, `Entry`) never changes. Nothing here costs more than the change: snapshots share what they can.
"""

from __future__ import annotations

import json
import threading
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import Engine

from hpo import database
from hpo.errors import NotFound
from hpo.records import Record, records
from hpo.snapshot import CANCELLED, CONSTRAINT, STRETCH, Entries, Entry, Snapshot, copy_of, entry_of
from hpo.space import SearchSpace
from hpo.view import View

__all__ = [
    "CANCELLED",
    "CONSTRAINT",
    "Cursor",
    "Entry",
    "History",
    "Snapshot",
    "View",
    "copy_of",
    "entry_of",
]

CHANGES = "SELECT whetstone.changes(%(study)s, %(newest)s, %(running)s, %(waiting)s, %(revision)s)"


@dataclass(frozen=True)
class Cursor:
    """What a history knows: the arguments of `whetstone.changes`.

    Attributes:
        newest: the largest trial id.
        running: ids of trials that run, with all their parameters.
        waiting: ids of trials that wait, and of running ones that stock Optuna is still giving parameters: those are
            looked at each time.
        revision: the last correction that was seen.
    """

    newest: int = -1
    running: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    revision: int = 0

    def arguments(self) -> dict[str, Any]:
        """The same for a statement: newest, running, waiting and revision."""
        return {
            "newest": self.newest,
            "running": list(self.running),
            "waiting": list(self.waiting),
            "revision": self.revision,
        }


class History:
    """Trials of one study, kept fresh from PostgreSQL. Safe to share between threads.

    Attributes:
        version: grows with every change that can be seen in a snapshot.
    """

    def __init__(self, engine: Engine, study_id: int) -> None:
        self.engine = engine
        self.study_id = study_id
        self.version = 0
        self._lock = threading.RLock()
        self._name = ""
        self._direction = StudyDirection.MAXIMIZE
        self._spelled: Mapping[str, str] = {}  # the study's attributes, as text
        self._attributes: dict[str, Any] = {}
        self._entries: list[Entry] = []  # in order of their numbers
        self._places: dict[int, int] = {}  # in `_entries`, by trial id
        self._cursor = Cursor()
        self._running: set[int] = set()
        self._waiting: set[int] = set()
        self._space: SearchSpace | None = None
        self._snapshot: Snapshot | None = None
        self._shared = Entries()  # of the last snapshot
        self._touched: set[int] = set()  # its stretches that are no more as they were

    def cursor(self) -> Cursor:
        """What to ask `whetstone.changes` for."""
        with self._lock:
            return self._cursor

    def refresh(self) -> None:
        """Catch up with the database: one round trip.

        A refresh refuses to join a transaction, because what it keeps must be committed.

        Raises:
            NotFound: the study is gone.
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        if database.in_transaction(self.engine):
            raise RuntimeError("refresh the history outside of a transaction: it must not keep what may be rolled back")
        with self._lock:
            asked = {"study": self.study_id, **self._cursor.arguments()}
            self.apply(database.call(self.engine, CHANGES, asked))

    def apply(self, changes: Mapping[str, Any] | None) -> None:
        """Take in what `whetstone.changes` returned for `cursor()`, parsed.

        Answers to an older cursor may come late: they take nothing back that was known to be finished.

        Raises:
            NotFound: the study is gone.
        """
        if changes is None:
            raise NotFound(f"there is no study {self.study_id}")
        # What costs time is done before the lock is taken, and what can fail before anything has changed.
        found = records(changes["columns"]) if changes["columns"] else []
        direction = StudyDirection[changes["direction"]]
        with self._lock:
            if (changes["name"], direction, changes["attributes"]) != (self._name, self._direction, self._spelled):
                attributes = {key: json.loads(text) for key, text in changes["attributes"].items()}
                self._name, self._direction = changes["name"], direction
                self._spelled, self._attributes = changes["attributes"], attributes
                self._changed()
            late = changes["revision"] < self._cursor.revision
            for record in found:
                self._take(record, late)
            newest = max(self._cursor.newest, *(record.trial_id for record in found), -1)
            self._move(newest, max(self._cursor.revision, changes["revision"]))

    def entries(self) -> list[Entry]:
        """What is known of each trial, in order of their numbers; not held against any space."""
        with self._lock:
            return list(self._entries)

    def snapshot(self, space: SearchSpace) -> Snapshot:
        """Return what is known, each trial held against `space` (the study's, always the same)."""
        with self._lock:
            if self._space is not space:
                self._space = space
                self._entries = [entry.checked_by(space) for entry in self._entries]
                for entry in self._entries:
                    self._follow(entry)
                self._move(self._cursor.newest, self._cursor.revision)
                self._snapshot, self._shared = None, Entries()
            if self._snapshot is None:
                self._shared, self._touched = self._shared.renewed(self._entries, self._touched), set()
                self._snapshot = Snapshot(self._name, self._direction, self._shared, dict(self._attributes))
            return self._snapshot

    def _move(self, newest: int, revision: int) -> None:
        self._cursor = Cursor(newest, tuple(sorted(self._running)), tuple(sorted(self._waiting)), revision)

    def _changed(self) -> None:
        self.version += 1
        self._snapshot = None

    def _take(self, record: Record, late: bool) -> None:
        place = self._places.get(record.trial_id)
        known = None if place is None else self._entries[place]
        if known is not None and (
            known.record == record or (known.finished and (late or not record.state.is_finished()))
        ):
            return
        entry = Entry(record, self._space)
        if place is not None:
            self._entries[place] = entry
        elif not self._entries or self._entries[-1].number < entry.number:
            place = self._places[entry.trial_id] = len(self._entries)
            self._entries.append(entry)
        else:  # only where numbers do not follow ids
            insort(self._entries, entry, key=lambda each: each.number)
            self._places = {each.trial_id: place for place, each in enumerate(self._entries)}
            place, self._shared = self._places[entry.trial_id], Entries()
        self._touched.add(place // STRETCH)
        self._follow(entry)
        self._changed()

    def _follow(self, entry: Entry) -> None:
        """Remember what an unfinished trial is to be asked next time."""
        self._running.discard(entry.trial_id)
        self._waiting.discard(entry.trial_id)
        if entry.state == TrialState.WAITING:
            self._waiting.add(entry.trial_id)
        elif not entry.finished:
            whole = self._space is not None and all(name in _names(entry) for name in self._space.names)
            (self._running if whole else self._waiting).add(entry.trial_id)


def _names(entry: Entry) -> Mapping[str, Any]:
    return entry.record.shape.distributions if entry.record else entry.trial.params
