"""TPE on arrays: Optuna's sampler, with the trials in columns that are kept from one ask to the next.

The points are those of the stock sampler on the same trials, bit for bit; it spends most of an ask on turning trials
into numbers and on sorting them, for every parameter anew where these are drawn one by one. Beyond `MOST` trials the
poorer ones are the newest of them only: the weight of a trial falls with its age in any case, and the good ones, by
which TPE searches, are picked from all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import (
    _BatchedTruncLogNormDistributions,
    _BatchedTruncNormDistributions,
)
from optuna.samplers._tpe.sampler import default_gamma
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.snapshot import Entry, changed
from hpo.space import SearchSpace

MOST = 2_000
"""Poorer trials that are looked at: an ask in 18 dimensions then takes some 20 ms."""

COMPLETE, INFEASIBLE, PRUNED, RUNNING, UNSEEN = range(5)

Rows = NDArray[np.intp]


class Table:
    """A study's trials as columns, brought up to date by what changed; for one space, and one thread at a time."""

    def __init__(self, space: SearchSpace) -> None:
        self._names = tuple(space.reduced)
        self._dimensions = [(space.names.index(name), each) for name, each in space.reduced.items()]
        self._column = {name: place for place, name in enumerate(self._names)}
        self._entries: Sequence[Entry] = ()
        self._internal = np.empty((len(self._names), 0))
        # number, kind, value, and of a pruned trial: minus the step of its last report, and that report
        self._facts = np.empty((5, 0))

    def __len__(self) -> int:
        return len(self._entries)

    def update(self, entries: Sequence[Entry]) -> None:
        """Hold the table against a study's trials, in order of their numbers."""
        if entries is self._entries:
            return
        room = self._facts.shape[1]
        if len(entries) > room:
            more = max(1_000, len(entries)) + len(entries) - room
            self._internal = np.concatenate([self._internal, np.zeros((len(self._names), more))], axis=1)
            self._facts = np.concatenate([self._facts, np.zeros((5, more))], axis=1)
        for place in changed(self._entries, entries):
            entry = entries[place]
            kind = _kind(entry)
            self._facts[:, place] = entry.number, kind, *_scores(entry, kind)
            if (key := entry.key) is not None:
                self._internal[:, place] = [
                    each.to_internal_repr(key[component]) for component, each in self._dimensions
                ]
        self._entries = entries

    @property
    def numbers(self) -> NDArray[np.float64]:
        return self._facts[0, : len(self)]

    @property
    def kinds(self) -> NDArray[np.float64]:
        return self._facts[1, : len(self)]

    @property
    def values(self) -> NDArray[np.float64]:
        return self._facts[2, : len(self)]

    @property
    def last_steps(self) -> NDArray[np.float64]:
        """Minus the step of a pruned trial's last report; 1 where it has none, so that these come last."""
        return self._facts[3, : len(self)]

    @property
    def last_reports(self) -> NDArray[np.float64]:
        return self._facts[4, : len(self)]

    def finished(self, but: int = -1) -> int:
        """Number of complete, infeasible and pruned trials, the one numbered `but` left out."""
        return int(np.count_nonzero((self.kinds < RUNNING) & (self.numbers != but)))

    def internal(self, rows: Rows, name: str) -> NDArray[np.float64]:
        """One dimension of some trials, as Optuna counts it."""
        observed: NDArray[np.float64] = self._internal[self._column[name], rows]
        return observed


def _kind(entry: Entry) -> int:
    """What a sampler sees of a trial. One between two attempts counts as running: it is going to be evaluated."""
    state = entry.state
    if entry.key is None or state == TrialState.FAIL:
        return UNSEEN
    if state == TrialState.COMPLETE:
        return INFEASIBLE if entry.infeasible else COMPLETE
    return PRUNED if state == TrialState.PRUNED else RUNNING


def _scores(entry: Entry, kind: int) -> tuple[float, float, float]:
    if kind in (COMPLETE, INFEASIBLE):
        value = entry.value
        return (0.0 if value is None else value), 0.0, 0.0
    reports = entry.trial.intermediate_values if kind == PRUNED else {}
    if not reports:
        return 0.0, 1.0, 0.0
    step = max(reports)
    return 0.0, -float(step), reports[step]


class QuickParzenEstimator(_ParzenEstimator):
    """Optuna's estimator, whose density at a point keeps within the processor's cache.

    Each number is computed by the same operations in the same order. (A test fails where Optuna computes another.)
    """

    def log_pdf(self, samples_dict: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The logarithm of the density at n points: {name: (n,)} -> (n,)."""
        weights, mixed = self._mixture_distribution
        parts = [
            part
            for part in mixed
            if isinstance(part, _BatchedTruncNormDistributions | _BatchedTruncLogNormDistributions)
        ]
        if len(parts) < len(mixed):
            return super().log_pdf(samples_dict)
        points = self._transform(samples_dict)  # (n, dimensions)
        for place, part in enumerate(parts):
            if part.is_log:
                points[:, place] = np.log(points[:, place])
        mu, sigma = (np.asarray([getattr(part, name) for part in parts]).T for name in ("mu", "sigma"))  # (kernels, d)
        low, high = (np.asarray([getattr(part, name) for part in parts]) for name in ("adapted_low", "adapted_high"))
        a, b = (low - mu) / sigma, (high - mu) / sigma
        if np.any(a == b):
            return super().log_pdf(samples_dict)
        mass = np.ascontiguousarray(_truncnorm._log_gauss_mass(a, b))
        scale = np.ascontiguousarray(np.log(sigma))
        mu, sigma = np.ascontiguousarray(mu), np.ascontiguousarray(sigma)
        outside = np.any((points < low) | (points > high), axis=1)
        each = np.empty((len(points), len(weights)))
        z = np.empty_like(mu)
        for place, point in enumerate(points):
            np.divide(np.subtract(point, mu, out=z), sigma, out=z)
            beyond = (z < a) | (z > b) if outside[place] else None
            np.multiply(np.square(z, out=z), -0.5, out=z)
            for less in (_truncnorm._norm_pdf_logC, mass, scale):
                z -= less
            if beyond is not None:
                z[beyond] = -np.inf
            z.sum(axis=-1, out=each[place])
        each += np.log(weights[np.newaxis])
        top = each.max(axis=1)
        top[np.isneginf(top)] = 0  # where the density is 0, it stays so
        with np.errstate(divide="ignore"):
            density: NDArray[np.float64] = np.log(np.exp(each - top[:, None]).sum(axis=1)) + top
        return density


class QuickTPESampler(TPESampler):
    """Optuna's TPE for one trial of a study with one objective; its trials come from a table.

    Args:
        table: the study's trials, which stay as they are while this sampler is asked.
        number: the trial's; what the table has under that number is not looked at.
        options: as Optuna takes them.
    """

    def __init__(self, table: Table, number: int, direction: StudyDirection, **options: Any) -> None:
        super().__init__(**options)
        self._parzen_estimator_cls = QuickParzenEstimator
        self._table = table
        self._number = number
        self._sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        self._densities: dict[tuple[str, ...], tuple[_ParzenEstimator, _ParzenEstimator]] = {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if not search_space or self._starting else self._sample(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._starting:
            return self._random_sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._sample(study, trial, {param_name: param_distribution})[param_name]

    def _sample(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        names = tuple(search_space)
        if names not in self._densities:
            below, above = self.halves
            self._densities[names] = self._density(search_space, below), self._density(search_space, above)
        good, poor = self._densities[names]
        drawn = good.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(drawn, self._compute_acquisition_func(drawn, good, poor))
        return {name: distribution.to_external_repr(best[name]) for name, distribution in search_space.items()}

    def _density(self, search_space: dict[str, BaseDistribution], rows: Rows) -> _ParzenEstimator:
        observed = {name: self._table.internal(rows, name) for name in search_space}
        return self._parzen_estimator_cls(observed, search_space, self._parzen_estimator_parameters)

    def _of(self, kind: int) -> Rows:
        table = self._table
        return np.flatnonzero((table.kinds == kind) & (table.numbers != self._number))

    @cached_property
    def _finished(self) -> int:
        return self._table.finished(self._number)

    @property
    def _starting(self) -> bool:
        return self._finished < self._n_startup_trials

    @cached_property
    def halves(self) -> tuple[Rows, Rows]:
        """The good trials and the poorer ones, each in order of their numbers.

        Good are the best complete ones; then, while there are too few, the pruned that came furthest, and the
        infeasible. Running trials count as poor where the sampler is told to keep away from them.
        """
        table = self._table
        complete = self._of(COMPLETE)
        complete = complete[np.argsort(self._sign * table.values[complete], kind="stable")]
        pruned = self._of(PRUNED)
        reports = np.where(np.isnan(table.last_reports), np.inf, self._sign * table.last_reports)
        pruned = pruned[np.lexsort((reports[pruned], table.last_steps[pruned]))]
        ranked = np.concatenate([complete, pruned, self._of(INFEASIBLE)])
        good = default_gamma(self._finished)
        poor = [ranked[good:], self._of(RUNNING)] if self._constant_liar else [ranked[good:]]
        return np.sort(ranked[:good]), np.sort(np.concatenate(poor))[-MOST:]
