"""A study at one moment: its trials, each with what is asked of it again and again.

What costs time (an Optuna trial, a point's key, a parsed attribute) is made when it is first asked for, and once for a
trial. Invariant: entries and snapshots never change, whatever becomes of the study; a history shares them freely.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, overload

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.records import Key, Record, value_in
from hpo.space import SearchSpace

CONSTRAINT = "constraints:infeasible"
CANCELLED = "whetstone:cancelled"
STRETCH = 256
"""So many entries are copied where one of them has changed."""


class Entry:
    """A trial as stored. `checked_by` holds it against a space; before that, it has no `key`.

    Attributes:
        number: the trial's.
        trial_id: Optuna's.
        state: Optuna's.
        trial: as Optuna's tables have it, but for user attributes and all reports except the last of a finished trial.
        plain: the same without constraints.
        marked: `plain` with exactly one constraint, 0 or 1, as other complete trials have.
        infeasible: a violated constraint on a COMPLETE trial, also one that stock Optuna set.
        cancelled: ended by a person.
        key: what makes its point the same as another's; None where it is no point of the study's space (`checked`).
        planned: the same, also of a queued point, which waits with its values in an attribute.
    """

    def __init__(self, source: Record | FrozenTrial, space: SearchSpace | None = None) -> None:
        self._source = source
        self._space = space
        self.number: int = source.number
        self.trial_id: int = source.trial_id if isinstance(source, Record) else source._trial_id
        self.state: TrialState = source.state

    def checked_by(self, space: SearchSpace) -> Entry:
        if self._space is space:
            return self
        made = Entry(self._source, space)
        if "trial" in vars(self):
            vars(made)["trial"] = self.trial
        return made

    @property
    def checked(self) -> bool:
        return self._space is not None

    @property
    def record(self) -> Record | None:
        """What it was made from, where that came from PostgreSQL."""
        return self._source if isinstance(self._source, Record) else None

    @property
    def finished(self) -> bool:
        return self.state.is_finished()

    @property
    def value(self) -> float | None:
        """The value of its (first) objective."""
        values = self._source.values
        return values[0] if values else None

    @cached_property
    def trial(self) -> FrozenTrial:
        return self._source.frozen() if isinstance(self._source, Record) else self._source

    @cached_property
    def infeasible(self) -> bool:
        if self.state != TrialState.COMPLETE:
            return False
        names = [name for name in self._marks if name == "constraints" or name.startswith("constraints:")]
        if names == [CONSTRAINT]:
            return bool(self.mark(CONSTRAINT) > 0)
        return bool(names) and any(value > 0 for value in self.trial.constraints.values())

    @cached_property
    def cancelled(self) -> bool:
        return bool(self.mark(CANCELLED))

    @cached_property
    def plain(self) -> FrozenTrial:
        if not any(name == "constraints" or name.startswith("constraints:") for name in self._marks):
            return self.trial
        bare = {name: value for name, value in self.trial.system_attrs.items() if name.split(":")[0] != "constraints"}
        return copy_of(self.trial, system_attrs=bare)

    @cached_property
    def marked(self) -> FrozenTrial:
        if self.state != TrialState.COMPLETE:
            return self.plain
        return copy_of(self.plain, system_attrs={**self.plain.system_attrs, CONSTRAINT: float(self.infeasible)})

    @cached_property
    def key(self) -> Key | None:
        if self._space is None:
            return None
        if isinstance(self._source, Record):
            return self._source.shape.key(self._source.internals, self._space)
        return _key(self._source.params, self._space)

    @cached_property
    def planned(self) -> Key | None:
        if self.key is not None or self._space is None or self.state != TrialState.WAITING:
            return self.key
        fixed = self.mark("fixed_params")
        return self._space.key(fixed) if isinstance(fixed, Mapping) else None

    @property
    def _marks(self) -> Mapping[str, Any]:
        return self._source.marks if isinstance(self._source, Record) else self._source.system_attrs

    def mark(self, name: str) -> Any:
        """One of its system attributes, or None."""
        if not isinstance(self._source, Record):
            return self._source.system_attrs.get(name)
        text = self._source.marks.get(name)
        return None if text is None else json.loads(text)


class Entries(Sequence[Entry]):
    """The entries of a study, in stretches: those that have not changed are shared with what it was made from."""

    def __init__(self, stretches: Sequence[tuple[Entry, ...]] = ()) -> None:
        self.stretches = stretches
        self._length = (len(stretches) - 1) * STRETCH + len(stretches[-1]) if stretches else 0

    def renewed(self, entries: Sequence[Entry], touched: Set[int]) -> Entries:
        """Return `entries`, which differ from these in the `touched` stretches at most."""
        known = len(self.stretches)
        return Entries(
            [
                self.stretches[number]
                if number < known and number not in touched
                else tuple(entries[start : start + STRETCH])
                for number, start in enumerate(range(0, len(entries), STRETCH))
            ]
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Entry]:
        return chain.from_iterable(self.stretches)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, place: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._length)
            if step != 1:
                return tuple(self)[place]
            first = start // STRETCH
            near = chain.from_iterable(self.stretches[first : stop // STRETCH + 1])
            return tuple(islice(near, start - first * STRETCH, max(start, stop) - first * STRETCH))
        if not -self._length <= place < self._length:
            raise IndexError(place)
        number, at = divmod(place % self._length, STRETCH)
        return self.stretches[number][at]


def changed(old: Sequence[Entry], new: Sequence[Entry]) -> list[int]:
    """Return the places in `new` at which another entry stands than in `old`: of what they share, nothing is read."""
    shared = min(len(old), len(new))
    places = []
    for start in range(0, shared, STRETCH):
        ours, theirs = _stretch(old, start), _stretch(new, start)
        if ours is not theirs and ours != theirs:  # entries have no equality but identity
            places += [
                start + place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] is not pair[1]
            ]
    return [*places, *range(shared, len(new))]


def _stretch(entries: Sequence[Entry], start: int) -> Sequence[Entry]:
    if isinstance(entries, Entries):
        return entries.stretches[start // STRETCH]
    return entries[start : start + STRETCH]


def entry_of(trial: FrozenTrial) -> Entry:
    """Wrap a trial that did not come out of a history (in simulations and tests)."""
    return Entry(trial)


def _key(params: Mapping[str, Any], space: SearchSpace) -> Key | None:
    """A sampler must not meet a point outside of the space it samples: stock Optuna may have stored one."""
    if any(name not in params for name in space.names):
        return None
    key = tuple(value_in(space, name, params[name]) for name in space.names)
    return None if None in key else key  # type: ignore[return-value]  # just seen: it has no None


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment.

    Attributes:
        name: as Optuna has it.
        direction: Optuna's (of the first objective).
        entries: all trials in order of their numbers, checked against the study's space.
        attributes: the study's system attributes.
    """

    name: str
    direction: StudyDirection
    entries: Sequence[Entry]
    attributes: Mapping[str, Any]

    def entry(self, number: int) -> Entry | None:
        """Return the entry of one trial by its number, or None."""
        place = number if 0 <= number < len(self.entries) and self.entries[number].number == number else None
        if place is None:  # a snapshot made by hand may leave trials out
            place = bisect_left(self.entries, number, key=lambda entry: entry.number)
        found = self.entries[place] if place < len(self.entries) else None
        return found if found is not None and found.number == number else None

    def trial(self, number: int) -> FrozenTrial | None:
        """Return one trial by its number, or None."""
        found = self.entry(number)
        return None if found is None else found.trial


def copy_of(
    trial: FrozenTrial,
    *,
    state: TrialState | None = None,
    value: float | None = None,
    system_attrs: Mapping[str, Any] | None = None,
    intermediate_values: Mapping[int, float] | None = None,
) -> FrozenTrial:
    """Copy a trial with a change; what is not changed is shared."""
    return FrozenTrial(
        number=trial.number,
        state=trial.state if state is None else state,
        value=None,
        values=trial.values if value is None else [value],
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={},
        system_attrs=trial.system_attrs if system_attrs is None else dict(system_attrs),
        intermediate_values=trial.intermediate_values if intermediate_values is None else dict(intermediate_values),
        trial_id=trial._trial_id,
    )
