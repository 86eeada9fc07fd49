"""Samplers: TPE, GP, CMA-ES, random and quasi-Monte Carlo, each asked for one point at a time.

A sampler is made anew for every trial, seeded by the study's seed and the trial's number, and whatever it must
remember (the state of CMA-ES, the place in a Sobol sequence) stands in system attributes: so a coordinator that is
restarted suggests what it would have suggested, and two coordinators agree. Samplers work on the reduced space, where
a tied group is one dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseSampler,
    QMCSampler,
    RandomSampler,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.cma_state import CarefulCmaEsSampler
from hpo.gp import LeanGPSampler, softened
from hpo.snapshot import Entry, Snapshot, copy_of
from hpo.space import SearchSpace
from hpo.spec import Choice, StudySpec
from hpo.tpe import QuickTPESampler, Table
from hpo.view import View

REDUNDANT = ("tpe:relative_params", "gp:relative_params")
"""Attributes that tell other processes the parameters of a running trial before they are stored; ours are stored."""

CMAES_TRIALS = 2_000
"""The newest trials, among which CMA-ES finds its last state and the generation that it is to learn from."""


def derive(*entropy: int) -> int:
    """Return a seed of 32 bits that depends on all of `entropy` (not negative)."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


# Once for the process, since a filter set around each call would be set and lost by other threads.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Separable CMA-ES does not operate meaningfully", category=UserWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)


def build(
    sampler: Choice, *, study_seed: int, seed: int, table: Table, number: int, direction: StudyDirection
) -> BaseSampler:
    """Make one of Optuna's samplers.

    Args:
        sampler: its name and all its options.
        study_seed: the same for all trials of a study: one scrambled sequence.
        seed: this trial's.
        table: the study's trials, for those who read them there.
        number: the trial's.
        direction: the study's.
    """
    options = dict(sampler.options)
    if sampler.name == "tpe":
        return QuickTPESampler(table, number, direction, seed=seed, **options)
    if sampler.name == "gp":
        options.pop("max_trials")
        return LeanGPSampler(seed=seed, warn_independent_sampling=False, **options)
    if sampler.name == "cmaes":
        # Choices are beyond CMA-ES: TPE picks each of them by itself, where random would learn nothing.
        alone = QuickTPESampler(table, number, direction, seed=seed, multivariate=False)
        return CarefulCmaEsSampler(seed=seed, independent_sampler=alone, warn_independent_sampling=False, **options)
    if sampler.name == "qmc":
        chance = RandomSampler(seed=seed)
        return QMCSampler(
            seed=derive(study_seed), independent_sampler=chance, warn_independent_sampling=False, **options
        )
    if sampler.name == "random":
        return RandomSampler(seed=seed)
    raise AssertionError(f"spec let the sampler {sampler.name!r} through")


@dataclass(frozen=True)
class Asked:
    """A reduced point and what the sampler wants remembered with it."""

    reduced: dict[str, Any]
    trial_attributes: dict[str, Any]
    study_attributes: dict[str, Any]


class Window(View):
    """A view that picks its trials when they are first looked at: a sampler that looks at none pays for none."""

    def __init__(self, spec: StudySpec, snapshot: Snapshot, pending: FrozenTrial) -> None:
        super().__init__(snapshot, (), pending)
        self._of = spec, snapshot, pending

    @cached_property
    def _shown(self) -> View:
        spec, snapshot, pending = self._of
        return View(snapshot, shown(spec, snapshot.entries), pending)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._shown.get_all_trials(study_id, deepcopy, states)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._shown.get_trial(trial_id)


class Session:
    """One sampler asked for one trial; asked again, it gives another point.

    A `table` that served the study before makes the next ask cheaper, and changes nothing else.
    """

    def __init__(
        self,
        spec: StudySpec,
        snapshot: Snapshot,
        number: int,
        seed: int,
        fixed: Mapping[str, Any],
        table: Table | None = None,
    ) -> None:
        self._spec = spec
        self._fixed = {head: value for head, value in fixed.items() if head in spec.space.reduced}
        table = Table(spec.space) if table is None else table
        if spec.sampler.name in ("tpe", "cmaes"):
            table.update(snapshot.entries)
        self._sampler = build(
            spec.sampler,
            study_seed=spec.seed,
            seed=derive(seed, number),
            table=table,
            number=number,
            direction=snapshot.direction,
        )
        pending = FrozenTrial(
            number=number,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=-1,
        )
        self._pending = pending
        self._view = Window(spec, snapshot, pending)
        self._study = optuna.Study(snapshot.name, self._view, sampler=self._sampler, pruner=optuna.pruners.NopPruner())
        self._sampler.before_trial(self._study, pending)

    def ask(self) -> Asked:
        """Suggest one point of the reduced space; fixed dimensions keep their values."""
        self._view.trial_attributes.clear()
        reduced = self._ask()
        kept = {key: value for key, value in self._view.trial_attributes.items() if not key.startswith(REDUNDANT)}
        return Asked(reduced, kept, dict(self._view.study_attributes))

    def _ask(self) -> dict[str, Any]:
        space = self._spec.space
        free = {name: distribution for name, distribution in space.reduced.items() if name not in self._fixed}
        varying = {name: distribution for name, distribution in free.items() if not distribution.single()}
        relative = self._sampler.sample_relative(self._study, self._pending, self._together(varying))
        point = dict(self._fixed)
        for name, distribution in free.items():
            if name in relative:
                point[name] = relative[name]
            elif distribution.single():
                point[name] = _only_value(distribution)
            else:
                point[name] = self._sampler.sample_independent(self._study, self._pending, name, distribution)
        return {name: point[name] for name in space.reduced}

    def _together(self, varying: dict[str, BaseDistribution]) -> dict[str, BaseDistribution]:
        """Return the dimensions that this sampler draws jointly. They are told, not inferred from earlier trials."""
        name = self._spec.sampler.name
        if name == "random" or (name == "tpe" and not self._spec.sampler.options["multivariate"]):
            return {}
        if name == "cmaes":
            return {k: v for k, v in varying.items() if not isinstance(v, CategoricalDistribution)}
        return varying


def _only_value(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low  # type: ignore[attr-defined]  # float and integer have it


def shown(spec: StudySpec, entries: Sequence[Entry]) -> list[FrozenTrial]:
    """Pick the trials that a sampler sees, in the form it needs.

    Points outside of the space are left out, as are failed and cancelled trials. A trial that waits between two
    attempts counts as running: its point is going to be evaluated. TPE is shown the constraint of an infeasible trial,
    and then every complete trial has exactly one; a Gaussian process is shown the worst value of a feasible one.
    """
    usable = [entry for entry in _near(spec, entries) if entry.key is not None and entry.state != TrialState.FAIL]
    if spec.sampler.name == "gp":
        trials = softened(_capped(spec, usable), minimize=spec.direction == "minimize")
    else:
        constrained = spec.sampler.name == "tpe" and any(entry.infeasible for entry in usable)
        trials = [entry.marked if constrained else entry.plain for entry in usable]
    return [copy_of(t, state=TrialState.RUNNING) if t.state == TrialState.WAITING else t for t in trials]


def _near(spec: StudySpec, entries: Sequence[Entry]) -> Sequence[Entry]:
    """Leave out what CMA-ES does not look at: it goes on from its newest trials, once there are enough to begin."""
    if spec.sampler.name != "cmaes" or len(entries) <= CMAES_TRIALS:
        return entries
    options = spec.sampler.options
    newest = entries[-max(CMAES_TRIALS, 4 * (options["popsize"] or 0)) :]
    complete = sum(entry.state == TrialState.COMPLETE for entry in newest)
    return newest if complete > options["n_startup_trials"] else entries


def _capped(spec: StudySpec, usable: Sequence[Entry]) -> list[Entry]:
    """Keep the best and the newest trials, half each of what a Gaussian process can afford, and 64 running ones."""
    most = int(spec.sampler.options["max_trials"])
    complete = [entry for entry in usable if entry.state == TrialState.COMPLETE]
    running = [entry for entry in usable if not entry.state.is_finished()]
    if len(complete) > most:
        sign = 1.0 if spec.direction == "minimize" else -1.0
        ranked = sorted(complete, key=lambda entry: (entry.infeasible, sign * (entry.value or 0.0)))
        kept = {entry.number for entry in ranked[: most // 2]}
        for entry in reversed(complete):
            if len(kept) == most:
                break
            kept.add(entry.number)
        complete = [entry for entry in complete if entry.number in kept]
    return complete + running[-64:]


def reduce(space: SearchSpace, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions of the reduced space that a (partial) flat point fixes."""
    return {head: flat[name] for name, head in reversed(space.heads.items()) if name in flat}
