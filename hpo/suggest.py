"""The next point of a study: from its sampler, checked against its workload and against what was tried before.

`suggest` promises a point that can be trained and that no trial has had yet, while the space still holds one. It is
computed outside of any transaction; the caller stores it, with the attributes the sampler wants remembered, in the
transaction that numbers the trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from hpo.auto import pick
from hpo.errors import Conflict
from hpo.history import Entry, History, Snapshot
from hpo.protocol import Value, Workload
from hpo.samplers import Asked, Session, derive, reduce
from hpo.space import Flat, SearchSpace
from hpo.spec import StudySpec

RANDOM_TRIES = 1_000
SAMPLER_TRIES = {"tpe": 8, "gp": 2, "cmaes": 8, "qmc": 64, "random": 64}
"""How often a sampler is asked before chance takes over. A GP's ask takes seconds, and the next gives much the same."""
ENUMERABLE = 20_000
"""A space with at most so many points is searched through for the last untried one."""


class NothingFeasible(Conflict):
    """No point that can be trained was found in the space (or around the given values)."""

    code = "nothing_feasible"


@dataclass(frozen=True)
class Suggestion:
    """A point to be stored as a trial.

    Attributes:
        params: by flat name, as people see them.
        internal: the same as Optuna stores them (doubles; a choice is its index).
        distributions: Optuna's, by flat name.
        trial_system_attrs: to be stored with the trial.
        study_system_attrs: to be stored with the study.
    """

    params: Flat
    internal: dict[str, float]
    distributions: dict[str, BaseDistribution]
    trial_system_attrs: dict[str, Any] = field(default_factory=dict)
    study_system_attrs: dict[str, Any] = field(default_factory=dict)


def stored(space: SearchSpace, params: Flat) -> Suggestion:
    """Return a complete flat point in the form in which it is stored, without attributes."""
    distributions = {name: space.distributions[name] for name in params}
    internal = {name: float(distributions[name].to_internal_repr(value)) for name, value in params.items()}
    return Suggestion(params, internal, distributions)


def suggest(
    spec: StudySpec,
    history: History,
    number: int,
    seed: int | None = None,
    fixed: Mapping[str, Value] | None = None,
    *,
    workload: Workload | None = None,
    refresh: bool = True,
) -> Suggestion:
    """Choose the point of trial `number`.

    The same spec, history, number and seed give the same point, in any process. Asks of one study should come one at
    a time and each be stored before the next, or two of them may choose alike.

    Args:
        spec: the study.
        history: its trials; refreshed first unless `refresh` is false.
        number: the number that the trial is going to have.
        seed: the study's, by default that of its spec.
        fixed: flat values that are given (a queued point, perhaps partial). A complete point is taken as it is.
        workload: says which points can be trained.

    Raises:
        NothingFeasible: no point could be found; the commonest reason is given.
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    given = _given(spec.space, fixed or {})
    if len(given) == len(spec.space.names):
        return _as_given(spec, given, workload)  # there is nothing to choose, so nothing to know
    if refresh:
        history.refresh()
    return choose(spec, history.snapshot(spec.space), number, seed, fixed, workload)


def choose(
    spec: StudySpec,
    snapshot: Snapshot,
    number: int,
    seed: int | None = None,
    fixed: Mapping[str, Value] | None = None,
    workload: Workload | None = None,
) -> Suggestion:
    """Do what `suggest` does, on a study at one moment."""
    space = spec.space
    given = _given(space, fixed or {})
    if len(given) == len(space.names):
        return _as_given(spec, given, workload)
    if spec.sampler.name == "auto":
        spec = replace(spec, sampler=pick(spec, snapshot).choice)
    search = _Search(spec, workload, snapshot.entries, number, given)
    root = spec.seed if seed is None else seed
    session = Session(spec, snapshot, number, root, reduce(space, given))
    asked = Asked({}, {}, {})
    for _ in range(SAMPLER_TRIES[spec.sampler.name]):
        asked = session.ask()
        if search.accepts(point := search.whole(asked.reduced)):
            return _suggestion(space, point, asked)
    # Chance steps in. What the sampler wrote about the refused point goes, what it wrote about the study stays: the
    # place in a sequence must not be used twice.
    rng = np.random.default_rng(derive(root, number, 1))
    found = search.by_chance(rng)
    return _suggestion(space, found, Asked({}, {}, asked.study_attributes))


def _as_given(spec: StudySpec, point: Flat, workload: Workload | None) -> Suggestion:
    """Take a complete point as it is, if it can be trained."""
    why = None if workload is None else workload.feasible(spec.space.nest(point), spec.settings)
    if why is not None:
        raise NothingFeasible(f"this point can never be trained: {why}")
    return stored(spec.space, point)


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
    """What makes a point acceptable: nobody has tried it, and it can be trained."""

    def __init__(
        self, spec: StudySpec, workload: Workload | None, entries: Sequence[Entry], number: int, given: Flat
    ) -> None:
        others = [entry for entry in entries if entry.trial.number != number]
        self._spec = spec
        self._space = spec.space
        self._workload = workload
        self._given = given
        self._tried = {entry.key for entry in others if entry.key is not None and not entry.cancelled}
        self._tried |= {key for entry in others if (key := self._queued(entry)) is not None}
        self._reasons: Counter[str] = Counter()

    def _queued(self, entry: Entry) -> tuple[Value, ...] | None:
        """A queued point waits with its values in an attribute: it will be tried, so it is not suggested as well."""
        fixed = entry.trial.system_attrs.get("fixed_params")
        if entry.trial.state != TrialState.WAITING or not isinstance(fixed, Mapping):
            return None
        return self._space.key(fixed)

    def whole(self, reduced: Mapping[str, Any]) -> Flat:
        return self._space.cast(self._space.expand(reduced))

    def feasible(self, point: Flat) -> bool:
        if self._workload is None:
            return True
        reason = self._workload.feasible(self._space.nest(point), self._spec.settings)
        if reason is not None:
            self._reasons[reason] += 1
        return reason is None

    def accepts(self, point: Flat) -> bool:
        return self._space.key(point) not in self._tried and self.feasible(point)

    def by_chance(self, rng: np.random.Generator) -> Flat:
        """Find an acceptable point by drawing, then by looking through a small space; a tried one as a last resort."""
        tried: Flat | None = None
        size = self._space.size
        small = size is not None and size <= ENUMERABLE
        for _ in range(0 if small else RANDOM_TRIES):
            point = self._space.random(rng) | self._given
            if self._space.key(point) not in self._tried:
                if self.feasible(point):
                    return point
            elif tried is None and self.feasible(point):
                tried = point
        if small:
            for index in rng.permutation(size or 0):
                point = self._space.point(int(index))
                if any(point[name] != value for name, value in self._given.items()):
                    continue
                if self.accepts(point):
                    return point
                if tried is None and self._space.key(point) in self._tried and self.feasible(point):
                    tried = point
        if tried is not None:
            return tried  # every point there is has been tried: a second evaluation tells the noise
        raise NothingFeasible(f"no point of the space was found that can be trained; mostly: {self.why()}")

    def why(self) -> str:
        """Return the commonest reason for which a point was refused."""
        return self._reasons.most_common(1)[0][0]
