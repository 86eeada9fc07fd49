"""A study played through in memory: eight points are pending, one finishes and is told, and the next is asked for.

Promise: points come from the coordinator's own `choose`, on snapshots made by hand, with all that a sampler wants
remembered kept as the database would keep it; the same problem, sampler and seed give the same search again. Durations
are drawn so that trials finish in another order than they began.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from benchmarks.problems import Problem, Told
from hpo.history import CONSTRAINT, Entry, Snapshot, entry_of
from hpo.spec import StudySpec, parse
from hpo.suggest import Suggestion, choose

PARALLEL = 8


@dataclass(frozen=True)
class Search:
    """One search: the true value of the points told, in that order, and what `auto` picked how often."""

    truths: list[float]
    picks: dict[str, int]

    def best(self) -> list[float]:
        """The best so far after each trial told."""
        best: list[float] = np.maximum.accumulate(self.truths).tolist()
        return best


def search(problem: Problem, sampler: Any, seed: int, trials: int = 100, parallel: int = PARALLEL) -> Search:
    """Play one study.

    Args:
        problem: what is searched.
        sampler: as a study's document names it.
        seed: of the study, of the noise and of the durations.
        trials: the study's budget.
        parallel: how many points are pending at a time.
    """
    document = {"name": problem.name, "workload": "external", "seed": seed, "sampler": sampler, "space": problem.space}
    study = _Study(parse({**document, "budget": {"trials": trials}}, {}))
    rng = np.random.default_rng([seed, 1])
    ends: list[tuple[float, int, Told]] = []
    truths: list[float] = []
    picks: Counter[str] = Counter()
    now = 0.0
    while len(truths) < trials:
        while len(ends) < parallel and len(study.entries) < trials:
            point = study.ask()
            if point.pick is not None:
                picks[point.pick.choice.name] += 1
            told = problem.evaluate(point.params, rng)
            heapq.heappush(ends, (now + float(rng.uniform(0.5, 1.5)), len(study.entries) - 1, told))
        now, number, told = heapq.heappop(ends)
        study.tell(number, told)
        truths.append(told.truth)
    return Search(truths, dict(picks))


class _Study:
    """What the database would hold."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        self.entries: list[Entry] = []
        self._attributes: dict[str, Any] = {}

    def snapshot(self) -> Snapshot:
        direction = StudyDirection[self.spec.direction.upper()]
        return Snapshot(self.spec.name, direction, tuple(self.entries), dict(self._attributes))

    def ask(self) -> Suggestion:
        made = choose(self.spec, self.snapshot(), len(self.entries))
        self._attributes |= json.loads(json.dumps(made.study_system_attrs))
        marks = json.loads(json.dumps(made.trial_system_attrs))
        self.entries.append(self._entry(made, TrialState.RUNNING, None, marks, len(self.entries)))
        return made

    def tell(self, number: int, told: Told) -> None:
        trial = self.entries[number].trial
        marks = trial.system_attrs | {CONSTRAINT: 0.0 if told.feasible else 1.0}
        self.entries[number] = self._entry(trial, TrialState.COMPLETE, told.value, marks, number)

    def _entry(
        self, made: Suggestion | FrozenTrial, state: TrialState, value: float | None, marks: dict[str, Any], number: int
    ) -> Entry:
        trial = FrozenTrial(
            number=number,
            state=state,
            value=value,
            datetime_start=None,
            datetime_complete=None,
            params=dict(made.params),
            distributions=made.distributions,
            user_attrs={},
            system_attrs=marks,
            intermediate_values={},
            trial_id=number,
        )
        return entry_of(trial).checked_by(self.spec.space)
