"""The trials of one study as an Optuna storage hands them out: whole, with every report and attribute.

What has finished is read whole once, many at a time, when it is first asked for; what has not is read each time.
Invariant: a whole trial is kept as long as the history keeps the same entry of it, so a revision makes it be read anew.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine

from hpo import database
from hpo.history import History
from hpo.records import Record, records
from hpo.snapshot import Entry

WHOLE = "SELECT whetstone.trials_as_json(%(ids)s::integer[], true)"
WHOLE_STUDY = """
    SELECT whetstone.trials_as_json(ARRAY(
        SELECT trial_id FROM public.trials WHERE study_id = %(study)s AND state::text = ANY(%(states)s::text[])), true)
"""


def read_whole(engine: Engine, trial_ids: Sequence[int]) -> list[Record]:
    """Read these trials with all they have, by number, in one round trip; those that are gone are left out."""
    return _read(engine, WHOLE, {"ids": list(trial_ids)}) if trial_ids else []


def read_study(engine: Engine, study_id: int, states: Container[TrialState] | None = None) -> list[Record]:
    """Read a study's trials with all they have, or those in some states, by number."""
    names = [state.name for state in TrialState if states is None or state in states]
    return _read(engine, WHOLE_STUDY, {"study": study_id, "states": names})


def _read(engine: Engine, statement: str, values: dict[str, Any]) -> list[Record]:
    if not database.in_transaction(engine):
        return records(database.call(engine, statement, values))
    with database.transaction(engine) as conn:
        return records(conn.exec_driver_sql(statement, values).scalar_one())


@dataclass
class _Kept:
    """A finished trial, as long as `entry` stands for it."""

    entry: Entry
    record: Record

    @cached_property
    def shared(self) -> FrozenTrial:
        return self.record.frozen()


class Archive:
    """One study's trials. Safe to share between threads."""

    def __init__(self, engine: Engine, study_id: int) -> None:
        self._engine = engine
        self._history = History(engine, study_id)
        self._kept: dict[int, _Kept] = {}  # by trial id
        self._lock = threading.Lock()

    def has_finished(self, trial_id: int) -> bool:
        """Whether this is a trial of the study that is known to have finished."""
        return trial_id in self._kept

    def trial(self, trial_id: int) -> FrozenTrial:
        """Return one that has finished, for the caller to keep.

        Raises:
            NotFound: the study is gone.
        """
        with self._lock:
            self._history.refresh()
            entry = self._kept[trial_id].entry
            [found] = self._whole([self._history.entries()[entry.number]])
            return found.frozen()

    def trials(self, states: Container[TrialState] | None, *, own: bool) -> list[FrozenTrial]:
        """Return all, or those in some states, in order of their numbers.

        Args:
            states: None for all.
            own: whether the caller may change them; else finished ones are shared.

        Raises:
            NotFound: the study is gone.
        """
        with self._lock:
            self._history.refresh()
            wanted = [entry for entry in self._history.entries() if states is None or entry.state in states]
            found = self._whole(wanted)
        trials = []
        for record in found:
            if states is not None and record.state not in states:
                continue  # it has moved on between two reads
            kept = None if own else self._kept.get(record.trial_id)
            trials.append(kept.shared if kept is not None and kept.record is record else record.frozen())
        return trials

    def _whole(self, wanted: Sequence[Entry]) -> list[Record]:
        stale = [
            entry.trial_id
            for entry in wanted
            if not ((kept := self._kept.get(entry.trial_id)) is not None and kept.entry is entry)
        ]
        fresh = {record.trial_id: record for record in read_whole(self._engine, stale)}
        found = []
        for entry in wanted:
            record = fresh.get(entry.trial_id)
            if record is None and entry.trial_id in self._kept:
                record = self._kept[entry.trial_id].record
            elif record is not None and entry.finished:
                self._kept[entry.trial_id] = _Kept(entry, record)
            if record is not None:
                found.append(record)
        return found
