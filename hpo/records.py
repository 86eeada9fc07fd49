"""Trials as they come from PostgreSQL (`whetstone.trials_as_json`) and lie in memory: compact, parsed when looked at.

A `Record` holds what Optuna's tables hold of one trial, numbers as numbers and the rest as the text that is stored.
Names and distributions stand in a `Shape` that all trials of the same form share. Invariant: `Record.frozen` is the
trial that stock Optuna reads from the same rows, as far as the record was read.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from hpo.protocol import Value
from hpo.space import SearchSpace

Key = tuple[Value, ...]
"""What makes two points of a space the same one: `SearchSpace.key`."""

Reader = Callable[[float], Value | None]

_distribution = lru_cache(maxsize=4096)(json_to_distribution)


class Shape:
    """The names and distributions of a trial's parameters, in the order in which they were stored."""

    def __init__(self, spelled: tuple[tuple[str, str], ...]) -> None:
        self._spelled = spelled
        self.names = tuple(name for name, _ in spelled)
        self.distributions: dict[str, BaseDistribution] = {name: _distribution(text) for name, text in spelled}
        self._read: tuple[SearchSpace | None, list[tuple[int, Reader]] | None] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is that process's own: what is remembered of it stays here."""
        return _interned, (self._spelled,)

    def params(self, internals: Sequence[float]) -> dict[str, Any]:
        return {
            name: show(internal) for name, show, internal in zip(self.names, self._externals, internals, strict=True)
        }

    @cached_property
    def _externals(self) -> list[Callable[[float], Any]]:
        return [
            float if isinstance(distribution, FloatDistribution) else distribution.to_external_repr
            for distribution in self.distributions.values()
        ]

    def key(self, internals: Sequence[float], space: SearchSpace) -> Key | None:
        """Return what `space` calls this point, or None where it is no point of it."""
        known, readers = self._read
        if known is not space:  # a study has one space: told by identity, since equality looks at all of it
            readers = self._readers(space)
            self._read = (space, readers)
        if readers is None:
            return None
        key = tuple(read(internals[place]) for place, read in readers)
        return None if None in key else key  # type: ignore[return-value]  # just seen: it has no None

    def _readers(self, space: SearchSpace) -> list[tuple[int, Reader]] | None:
        if any(name not in self.distributions for name in space.names):
            return None
        return [
            (self.names.index(name), _reader(self.distributions[name], name, wanted, space))
            for name, wanted in space.distributions.items()
        ]


_shape = lru_cache(maxsize=4096)(Shape)


def _interned(spelled: tuple[tuple[str, str], ...]) -> Shape:
    return _shape(spelled)


def _reader(stored: BaseDistribution, name: str, wanted: BaseDistribution, space: SearchSpace) -> Reader:
    """Return the value in `space` of an internal value of the distribution `stored`, or None where it has none."""
    if isinstance(wanted, FloatDistribution) and wanted.step is None and isinstance(stored, FloatDistribution):
        low, high = wanted.low, wanted.high
        return lambda internal: internal if low <= internal <= high else None

    @lru_cache(maxsize=4096)
    def read(internal: float) -> Value | None:
        return value_in(space, name, stored.to_external_repr(internal))

    return read


def value_in(space: SearchSpace, name: str, value: Any) -> Value | None:
    """Return one value as the space holds it, or None: stock Optuna may have stored anything under a name."""
    distribution = space.distributions[name]
    try:
        if not distribution._contains(distribution.to_internal_repr(value)):
            return None
        return space.cast({name: value})[name]
    except (ValueError, TypeError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Record:
    """One trial. `reports` are all of them, or only the last; `notes` are user attributes, if they were read."""

    trial_id: int
    number: int
    state: TrialState
    values: tuple[float, ...]
    began: str | None
    ended: str | None
    shape: Shape
    internals: Sequence[float]
    marks: Mapping[str, str]
    notes: Mapping[str, str]
    reports: Mapping[int, float]

    def frozen(self) -> FrozenTrial:
        return FrozenTrial(
            number=self.number,
            state=self.state,
            value=None,
            values=self.values or None,
            datetime_start=_moment(self.began),
            datetime_complete=_moment(self.ended),
            params=self.shape.params(self.internals),
            distributions=dict(self.shape.distributions),
            user_attrs={key: json.loads(text) for key, text in self.notes.items()},
            system_attrs={key: json.loads(text) for key, text in self.marks.items()},
            intermediate_values=dict(self.reports),
            trial_id=self.trial_id,
        )


_NONE: Mapping[Any, Any] = {}
_BARE = Shape(())


def records(columns: Mapping[str, Any]) -> list[Record]:
    """Read what `whetstone.trials_as_json` returned, in order of the trials' numbers."""
    values: dict[int, list[float]] = {}
    for trial, value in _rows(columns["values"], "ids", "vals"):
        values.setdefault(trial, []).append(float(value))
    points = _points(columns)
    marks, notes = _attributes(columns["marks"]), _attributes(columns["notes"])
    reports = {
        trial: {steps: float(found)} if isinstance(steps, int) else dict(zip(steps, map(float, found), strict=True))
        for trial, steps, found in _rows(columns["reports"], "ids", "steps", "vals")
    }
    made = []
    for trial, number, state, began, ended in _rows(columns["trials"], "ids", "numbers", "states", "began", "ended"):
        shape, internals = points.get(trial, (_BARE, ()))
        made.append(
            Record(
                trial,
                number,
                TrialState[state],
                tuple(values.get(trial, ())),
                began,
                ended,
                shape,
                internals,
                marks.get(trial, _NONE),
                notes.get(trial, _NONE),
                reports.get(trial, _NONE),
            )
        )
    return sorted(made, key=lambda record: record.number)


def _points(columns: Mapping[str, Any]) -> dict[int, tuple[Shape, Sequence[float]]]:
    spelled = tuple((name, text) for name, text in columns["spelled"] or ())
    others, places = columns["others"] or {}, (columns["params"] or {}).get("places") or {}
    usual, points = _shape(spelled), {}
    for trial, internals in _rows(columns["params"], "ids", "internals"):
        key = str(trial)
        if key in others:
            shape = _shape(tuple((name, text) for name, text in others[key]))
        elif key in places:
            shape = _shape(tuple(spelled[place] for place in places[key]))
        else:
            shape = usual
        points[trial] = (shape, _doubles(internals))
    return points


def _doubles(found: list[Any]) -> Sequence[float]:
    try:
        return array("d", found)
    except TypeError:  # numbers that JSON lacks come as text
        return array("d", [math.nan if each is None else float(each) for each in found])


def _attributes(column: Mapping[str, Any] | None) -> dict[int, dict[str, str]]:
    grouped: dict[int, dict[str, str]] = {}
    for trial, key, text in _rows(column, "ids", "keys", "texts"):
        grouped.setdefault(trial, {})[key] = text
    return grouped


def _rows(column: Mapping[str, Any] | None, *names: str) -> zip[Any]:
    return zip(*((column or {}).get(name) or () for name in names), strict=True)


@lru_cache(maxsize=256)
def _moment(text: str | None) -> datetime | None:
    """As Optuna hands times out: local without saying so. It stores them as UTC."""
    return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
