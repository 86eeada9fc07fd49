"""The trials of one study in memory, and the windows through which samplers and pruners look at them.

`History` reads Optuna's stock tables with a few set-based statements and keeps what it read: a refresh fetches only
trials that are new, running, queued again, or named in `whetstone.revisions` since the last one. The invariant: after
`refresh` it holds one committed state of the database, at least as new as the call, and trial objects are replaced,
never changed, so a `View` taken earlier stays what it was.

A `View` is an Optuna storage with one trial more, the pending one. What a sampler or pruner writes to it is captured
for the caller's transaction, not stored.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Engine

from hpo import database, rows
from hpo.errors import NotFound
from hpo.protocol import Value
from hpo.space import SearchSpace

CONSTRAINT = "constraints:infeasible"
CANCELLED = "whetstone:cancelled"
_LATE = 1_000
"""Revision ids are given before their transactions commit, so a few may turn up below the highest one seen."""

_SNAPSHOT = sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

_STUDY = sa.text("""
    SELECT s.study_name, d.direction::text AS direction FROM studies s
    JOIN study_directions d ON d.study_id = s.study_id AND d.objective = 0
    WHERE s.study_id = :study
""")

_STUDY_ATTRIBUTES = sa.text("SELECT key, value_json FROM study_system_attributes WHERE study_id = :study")

_REVISIONS = sa.text("""
    SELECT revision_id, trial_id FROM whetstone.revisions
    WHERE study_id = :study AND revision_id > :cursor ORDER BY revision_id
""")

# A trial that waits again after an attempt has another start than before it, so one that has not may be left alone.
_UNFINISHED = sa.text("""
    SELECT trial_id, state = 'WAITING' AS waits, datetime_start AS began FROM trials
    WHERE study_id = :study AND state IN ('RUNNING', 'WAITING')
""")


@dataclass(frozen=True)
class Entry:
    """A trial as stored, and what is asked of it again and again.

    Attributes:
        trial: as Optuna's tables have it.
        plain: the same without constraints.
        marked: `plain` with exactly one constraint, 0 or 1 (GP wants as many on every trial).
        key: what makes its point the same as another's; None where it is no point of the study's space (`checked`).
    """

    trial: FrozenTrial
    plain: FrozenTrial
    marked: FrozenTrial
    infeasible: bool
    cancelled: bool
    checked: bool = False
    key: tuple[Value, ...] | None = None

    def checked_by(self, space: SearchSpace) -> Entry:
        key = space.key(self.trial.params) if _fits(self.trial, space) else None
        return replace(self, checked=True, key=key)


class History:
    """Trials of one study, kept fresh from PostgreSQL. Safe to share between threads.

    A refresh opens a transaction of its own and refuses to join one, because what it keeps must be committed.
    """

    def __init__(self, engine: Engine, study_id: int) -> None:
        self.engine = engine
        self.study_id = study_id
        self._lock = threading.RLock()
        self._entries: dict[int, Entry] = {}  # by trial id
        self._newest = -1
        self._cursor = 0
        self._seen: set[int] = set()
        self._name = ""
        self._direction = StudyDirection.MAXIMIZE
        self._attributes: dict[str, Any] = {}

    def refresh(self) -> None:
        """Catch up with the database.

        Raises:
            NotFound: the study is gone.
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        if database.in_transaction(self.engine):
            raise RuntimeError("refresh the history outside of a transaction: it must not keep what may be rolled back")
        with self._lock:
            database.retrying(self.engine, self._read, idempotent=True)

    def _read(self, connection: Connection) -> None:
        connection.execute(_SNAPSHOT)
        study = connection.execute(_STUDY, {"study": self.study_id}).one_or_none()
        if study is None:
            raise NotFound(f"there is no study {self.study_id}")
        attributes = connection.execute(_STUDY_ATTRIBUTES, {"study": self.study_id}).all()
        floor = {"study": self.study_id, "cursor": max(self._cursor - _LATE, 0)}
        revisions = [row for row in connection.execute(_REVISIONS, floor) if row.revision_id not in self._seen]
        stale = {row.trial_id for row in revisions}
        open_ = connection.execute(_UNFINISHED, {"study": self.study_id}).all()
        unchanged = {row.trial_id for row in open_ if row.waits and self._waited(row.trial_id, row.began)}
        stale |= {row.trial_id for row in open_} - unchanged
        stale |= {key for key, entry in self._entries.items() if not entry.trial.state.is_finished()} - unchanged
        # A study's trials are inserted under the lock of its row, so their ids become visible in order.
        trials = rows.read_trials(connection, self.study_id, newer_than=self._newest, also_ids=sorted(stale))
        # Nothing of ours changes before all has been read: a lost connection leaves the old state whole.
        self._name, self._direction = study.study_name, StudyDirection[study.direction]
        self._attributes = {row.key: json.loads(row.value_json) for row in attributes}
        self._entries |= {trial._trial_id: entry_of(trial) for trial in trials}
        self._newest = max(self._newest, *(trial._trial_id for trial in trials), -1)
        self._seen.update(row.revision_id for row in revisions)
        self._cursor = max(self._seen, default=0)
        self._seen = {revision for revision in self._seen if revision > self._cursor - _LATE}

    def _waited(self, trial_id: int, began: datetime | None) -> bool:
        """Whether a trial that waits now has done nothing else since it was read."""
        known = self._entries.get(trial_id)
        return (
            known is not None
            and known.trial.state == TrialState.WAITING
            and known.trial.datetime_start == rows.to_local(began)
        )

    def snapshot(self, space: SearchSpace) -> Snapshot:
        """Return what the last refresh found, each trial held against `space` (the study's, always the same)."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if not entry.checked:
                    self._entries[key] = entry.checked_by(space)
            entries = sorted(self._entries.values(), key=lambda entry: entry.trial.number)
            return Snapshot(self._name, self._direction, tuple(entries), dict(self._attributes))


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment.

    Attributes:
        name: as Optuna has it.
        direction: Optuna's.
        entries: all trials in order of their numbers, checked against the study's space.
        attributes: the study's system attributes.
    """

    name: str
    direction: StudyDirection
    entries: tuple[Entry, ...]
    attributes: Mapping[str, Any]

    def trial(self, number: int) -> FrozenTrial | None:
        """Return one trial by its number, or None."""
        return next((entry.trial for entry in reversed(self.entries) if entry.trial.number == number), None)


def entry_of(trial: FrozenTrial) -> Entry:
    """Wrap a trial. Any violated constraint makes a COMPLETE trial infeasible, also one that stock Optuna set."""
    marks = trial.system_attrs
    infeasible = trial.state == TrialState.COMPLETE and any(value > 0 for value in trial.constraints.values())
    plain = trial
    if any(key == "constraints" or key.startswith("constraints:") for key in marks):
        bare = {key: value for key, value in marks.items() if key.split(":")[0] != "constraints"}
        plain = copy_of(trial, system_attrs=bare)
    marked = plain
    if trial.state == TrialState.COMPLETE:
        marked = copy_of(plain, system_attrs={**plain.system_attrs, CONSTRAINT: float(infeasible)})
    return Entry(trial, plain, marked, infeasible, bool(marks.get(CANCELLED)))


def copy_of(
    trial: FrozenTrial,
    *,
    state: TrialState | None = None,
    system_attrs: Mapping[str, Any] | None = None,
    intermediate_values: Mapping[int, float] | None = None,
) -> FrozenTrial:
    """Copy a trial with a change; what is not changed is shared."""
    return FrozenTrial(
        number=trial.number,
        state=trial.state if state is None else state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={},
        system_attrs=trial.system_attrs if system_attrs is None else dict(system_attrs),
        intermediate_values=trial.intermediate_values if intermediate_values is None else dict(intermediate_values),
        trial_id=trial._trial_id,
    )


def _fits(trial: FrozenTrial, space: SearchSpace) -> bool:
    """A sampler must not meet a point outside of the space it samples: stock Optuna may have stored one."""
    for name, distribution in space.distributions.items():
        if name not in trial.params:
            return False
        try:
            internal = distribution.to_internal_repr(trial.params[name])
        except (ValueError, TypeError):
            return False
        if not distribution._contains(internal):
            return False
    return True


class View(BaseStorage):
    """What a sampler or pruner sees of a study: some trials of its history, and the pending trial.

    Attributes written to the pending trial or to the study are kept in `trial_attributes` and `study_attributes`; any
    other write raises `RuntimeError`.
    """

    def __init__(self, snapshot: Snapshot, trials: Iterable[FrozenTrial], pending: FrozenTrial) -> None:
        self._snapshot = snapshot
        others = (trial for trial in trials if trial.number != pending.number)
        self._trials = sorted([*others, pending], key=lambda trial: trial.number)
        self._by_id = {trial._trial_id: trial for trial in self._trials}
        self._pending = pending
        self.trial_attributes: dict[str, Any] = {}
        self.study_attributes: dict[str, Any] = {}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._by_id[trial_id]

    def get_study_id_from_name(self, study_name: str) -> int:
        return 0

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._snapshot.name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return [self._snapshot.direction]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {**self._snapshot.attributes, **self.study_attributes}

    def get_all_studies(self) -> list[FrozenStudy]:
        return [FrozenStudy(self._snapshot.name, self._snapshot.direction, {}, self.get_study_system_attrs(0), 0)]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if trial_id != self._pending._trial_id:
            raise RuntimeError("a sampler or pruner wrote to a trial that is not its own")
        self.trial_attributes[key] = value

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.study_attributes[key] = value

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this is a view of a study: samplers and pruners only read it")

    create_new_study = _refuse
    delete_study = _refuse
    set_study_user_attr = _refuse
    create_new_trial = _refuse
    set_trial_param = _refuse
    set_trial_state_values = _refuse
    set_trial_intermediate_value = _refuse
    set_trial_user_attr = _refuse
