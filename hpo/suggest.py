"""The next point of a study: from its sampler, checked against its workload and against what was tried before.

`choose` promises a point that can be trained, on the device that asks, and that no trial has had yet, while the space
still holds one. It is a function of the study, its trials, the number and what is fixed: the same in any process. The
caller stores the point, with the attributes the sampler wants remembered, in the transaction that numbers the trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution

from hpo.auto import Pick, pick
from hpo.board import Board
from hpo.errors import Conflict
from hpo.protocol import Value, Workload
from hpo.room import Marks, Room
from hpo.samplers import Asked, Session, derive, reduce
from hpo.snapshot import Entry, Snapshot
from hpo.space import Flat, SearchSpace
from hpo.spec import StudySpec
from hpo.tpe import Table

RANDOM_TRIES = 1_000
SAMPLER_TRIES = {"tpe": 8, "gp": 2, "cmaes": 8, "qmc": 64, "random": 64}
"""How often a sampler is asked before chance takes over. A GP's ask takes seconds, and the next gives much the same."""
ENUMERABLE = 20_000
"""A space with at most so many points is searched through for the last untried one."""


class Asking(Protocol):
    """A sampler that is asked for one trial; asked again, it gives another point."""

    def ask(self) -> Asked: ...


Opening = Callable[[StudySpec, Snapshot, int, int, Mapping[str, Any]], Asking]
"""Begins to ask a study's sampler: for a number, with a seed, around fixed dimensions."""


class NothingFeasible(Conflict):
    """No point that can be trained was found in the space (or around the given values)."""

    code = "nothing_feasible"


class TooSmall(NothingFeasible):
    """What is left to try needs more memory than the device has that asked; a larger one may get a point."""

    code = "device_too_small"


@dataclass(frozen=True)
class Suggestion:
    """A point to be stored as a trial.

    Attributes:
        params: by flat name, as people see them.
        internal: the same as Optuna stores them (doubles; a choice is its index).
        distributions: Optuna's, by flat name.
        trial_system_attrs: to be stored with the trial.
        study_system_attrs: to be stored with the study.
        pick: what the sampler `auto` stood for; None where the study names another, or nothing was sampled.
    """

    params: Flat
    internal: dict[str, float]
    distributions: dict[str, BaseDistribution]
    trial_system_attrs: dict[str, Any] = field(default_factory=dict)
    study_system_attrs: dict[str, Any] = field(default_factory=dict)
    pick: Pick | None = None


def stored(space: SearchSpace, params: Flat) -> Suggestion:
    """Return a complete flat point in the form in which it is stored, without attributes."""
    distributions = {name: space.distributions[name] for name in params}
    internal = {name: float(distributions[name].to_internal_repr(value)) for name, value in params.items()}
    return Suggestion(params, internal, distributions)


class Chooser:
    """One study's way to its points: what `choose` may remember from one ask to the next, all of it derived.

    Args:
        spec: the study.
        workload: says which points can be trained.
        opening: begins to ask its sampler; in this process unless it says otherwise.
    """

    def __init__(self, spec: StudySpec, workload: Workload | None = None, opening: Opening | None = None) -> None:
        self.spec = spec
        self.board = Board()
        self.marks = Marks(spec, workload)
        self._workload = workload
        self._opening = opening or partial(Session, table=Table(spec.space))

    def learn(self, snapshot: Snapshot) -> None:
        """Take in what was tried and what ran out of memory."""
        self.board.update(snapshot.entries)
        self.marks.update(snapshot.entries)

    def choose(
        self,
        snapshot: Snapshot,
        number: int,
        seed: int | None = None,
        fixed: Mapping[str, Value] | None = None,
        memory_bytes: int | None = None,
    ) -> Suggestion:
        """Do what the function `choose` does."""
        spec, space = self.spec, self.spec.space
        given = _given(space, fixed or {})
        self.learn(snapshot)
        room = self.marks.room(memory_bytes)
        if len(given) == len(space.names):
            if not room.holds(given):
                raise TooSmall(too_small(memory_bytes))
            return _as_given(spec, given, self._workload)
        picked = pick(spec, snapshot) if spec.sampler.name == "auto" else None
        if picked is not None:
            spec = replace(spec, sampler=picked.choice)
        search = _Search(spec, self._workload, self.board, room, snapshot.entry(number), given)
        root = spec.seed if seed is None else seed
        session = self._opening(spec, snapshot, number, root, reduce(space, given))
        asked = Asked({}, {}, {})
        for _ in range(SAMPLER_TRIES[spec.sampler.name]):
            asked = session.ask()
            if search.accepts(point := search.whole(asked.reduced)):
                return replace(_suggestion(space, point, asked), pick=picked)
        # Chance steps in. What the sampler wrote about the refused point goes, what it wrote about the study stays: the
        # place in a sequence must not be used twice.
        rng = np.random.default_rng(derive(root, number, 1))
        found = search.by_chance(rng)
        if found is None:
            raise TooSmall(too_small(memory_bytes))
        return replace(_suggestion(space, found, Asked({}, {}, asked.study_attributes)), pick=picked)


def choose(
    spec: StudySpec,
    snapshot: Snapshot,
    number: int,
    seed: int | None = None,
    fixed: Mapping[str, Value] | None = None,
    workload: Workload | None = None,
    memory_bytes: int | None = None,
) -> Suggestion:
    """Choose the point of trial `number` of a study at one moment.

    Args:
        spec: the study.
        snapshot: its trials.
        number: the number that the trial is going to have.
        seed: the study's, by default that of its spec.
        fixed: flat values that are given (a queued point, perhaps partial). A complete point is taken as it is.
        workload: says which points can be trained.
        memory_bytes: of the device that asks; points that ran out on such a device are not given to it.

    Raises:
        TooSmall: all that is left to try needs a device with more memory.
        NothingFeasible: no point could be found; the commonest reason is given.
    """
    return Chooser(spec, workload).choose(snapshot, number, seed, fixed, memory_bytes)


def _as_given(spec: StudySpec, point: Flat, workload: Workload | None) -> Suggestion:
    """Take a complete point as it is, if it can be trained."""
    why = None if workload is None else workload.feasible(spec.space.nest(point), spec.settings)
    if why is not None:
        raise NothingFeasible(f"this point can never be trained: {why}")
    return stored(spec.space, point)


def too_small(memory_bytes: int | None) -> str:
    size = f"{(memory_bytes or 0) / 2**30:.1f} GiB"
    return (
        f"the memory of this device ({size}) is too small for what is left to try: such points ran out of memory on "
        "a device as large or larger. A device with more memory is needed"
    )


def _given(space: SearchSpace, fixed: Mapping[str, Value]) -> Flat:
    """Return what of `fixed` the space can hold, tied: stock Optuna enqueues anything under any name."""
    held: Flat = {}
    for name, value in fixed.items():
        try:
            held |= space.cast({name: value})
        except (KeyError, ValueError, TypeError):
            continue
    return space.expand(reduce(space, held))


def _suggestion(space: SearchSpace, point: Flat, asked: Asked) -> Suggestion:
    plain = stored(space, point)
    return Suggestion(plain.params, plain.internal, plain.distributions, asked.trial_attributes, asked.study_attributes)


class _Search:
    """What makes a point acceptable: nobody has tried it, it can be trained, and the device has room for it."""

    def __init__(
        self, spec: StudySpec, workload: Workload | None, board: Board, room: Room, own: Entry | None, given: Flat
    ) -> None:
        self._spec = spec
        self._space = spec.space
        self._workload = workload
        self._board = board
        self._room = room
        self._own = own
        self._given = given
        self._too_large = 0
        self._reasons: Counter[str] = Counter()

    def whole(self, reduced: Mapping[str, Any]) -> Flat:
        return self._space.cast(self._space.expand(reduced))

    def feasible(self, point: Flat) -> bool:
        if self._workload is None:
            return True
        reason = self._workload.feasible(self._space.nest(point), self._spec.settings)
        if reason is not None:
            self._reasons[reason] += 1
        return reason is None

    def fits(self, point: Flat) -> bool:
        held = self._room.holds(point)
        self._too_large += not held
        return held

    def tried(self, point: Flat) -> bool:
        return self._board.tried(self._space.key(point), but=self._own)

    def accepts(self, point: Flat) -> bool:
        return not self.tried(point) and self.feasible(point) and self.fits(point)

    def by_chance(self, rng: np.random.Generator) -> Flat | None:
        """Find an acceptable point by drawing, then by looking through a small space; a tried one as a last resort.

        Returns:
            None where points are left, but none that the device has room for.
        """
        self._too_large = 0
        tried: list[Flat] = []
        size = self._space.size
        small = size is not None and size <= ENUMERABLE
        points = self._listed(rng, size or 0) if small else self._drawn(rng)
        for point in points:
            if self.tried(point):
                tried.append(point)
            elif self.feasible(point) and self.fits(point):
                return point
        if self._too_large:
            return None
        # Every point there is has been tried: a second evaluation tells the noise.
        for point in tried:
            if self.feasible(point) and self.fits(point):
                return point
        if self._too_large:
            return None
        raise NothingFeasible(f"no point of the space was found that can be trained; mostly: {self.why()}")

    def _drawn(self, rng: np.random.Generator) -> Iterator[Flat]:
        for _ in range(RANDOM_TRIES):
            yield self._space.random(rng) | self._given

    def _listed(self, rng: np.random.Generator, size: int) -> Iterator[Flat]:
        for index in rng.permutation(size):
            point = self._space.point(int(index))
            if all(point[name] == value for name, value in self._given.items()):
                yield point

    def why(self) -> str:
        """Return the commonest reason for which a point was refused."""
        return self._reasons.most_common(1)[0][0]
