"""`auto`: which sampler a study is best served by at this moment, and why, in one sentence for people.

`pick` is pure and cheap: it looks at the space and counts trials. Promise: the same study gives the same pick, and a
pick changes only when a count that grows passes a threshold, so that a study never flips back and forth. The rules rest
on benchmarks/search.py: in many dimensions a random start lies in the corners, where a Gaussian process learns little;
CMA-ES begins around the middle and soon finds where it is worth looking; from there the process is by far the quicker.
With a handful of noisy dimensions neither is a match for TPE.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from hpo.document import SAMPLERS
from hpo.history import Entry, Snapshot
from hpo.spec import Choice, StudySpec

FEW_NUMBERS, MANY_NUMBERS = 4, 10
"""Numbers to vary: below the first a Gaussian process sees the whole space, from the second on CMA-ES looks first."""
TPE_START = 6
"""Random points before TPE where numbers are neither few nor many; with trials in parallel its own 10 become 17."""
START_TRIALS = 20
"""Trials that CMA-ES begins with; as many told as make a Gaussian process worth its while."""
START_FEASIBLE = 5
"""Of them feasible: a process that has seen nothing but failures knows only where not to go."""
START_LONGEST = 60
GP_TRIALS = 400
"""Trials after which a Gaussian process, which looks at no more of them, has nothing left that others lack."""
GP_DIMENSIONS = 40


@dataclass(frozen=True)
class Pick:
    """The sampler that `auto` stands for, with all its options, and the reason."""

    choice: Choice
    why: str


def pick(spec: StudySpec, snapshot: Snapshot) -> Pick:
    """Choose a sampler for the next trial of a study whose sampler is `auto`."""
    varying = [distribution for distribution in spec.space.reduced.values() if not distribution.single()]
    numbers = sum(not isinstance(distribution, CategoricalDistribution) for distribution in varying)
    if not numbers:
        return _pick("tpe", "all parameters are choices, which TPE weighs one by one")
    if FEW_NUMBERS <= numbers < MANY_NUMBERS:
        why = f"in {_dimensions(len(varying))} TPE is steadier than others where values are noisy"
        return _pick("tpe", why, n_startup_trials=TPE_START)
    only_numbers = numbers == len(varying) and numbers >= MANY_NUMBERS
    if not _has_torch():
        return _without_gp(only_numbers, "this server lacks torch, which a Gaussian process is fitted with")
    if len(varying) > GP_DIMENSIONS:
        return _without_gp(only_numbers, f"{len(varying)} dimensions are more than a Gaussian process can tell apart")
    told, feasible = _counts(snapshot.entries)
    if told >= GP_TRIALS:
        return _pick("tpe", f"after {GP_TRIALS} trials TPE, which learns from all of them, is quick and as good")
    if numbers < FEW_NUMBERS:
        return _pick("gp", f"a Gaussian process makes the most of few trials, and {_dimensions(len(varying))} few")
    if told < START_TRIALS:
        why = f"CMA-ES looks around the middle of the space; a Gaussian process follows after {START_TRIALS} trials"
        return _pick("cmaes", why)
    if feasible < START_FEASIBLE and told < START_LONGEST:
        why = f"CMA-ES looks for points that are feasible; a Gaussian process follows when there are {START_FEASIBLE}"
        return _pick("cmaes", why)
    return _pick("gp", f"a Gaussian process makes the most of the trials there are, in {_dimensions(len(varying))}")


def _without_gp(only_numbers: bool, why: str) -> Pick:
    if only_numbers:
        return _pick("cmaes", f"{why}, and CMA-ES does best with many numbers")
    return _pick("tpe", f"{why}, and TPE is quick in any space")


def _counts(entries: Sequence[Entry]) -> tuple[int, int]:
    """Trials that taught something, and those of them that were feasible; neither is counted beyond GP_TRIALS."""
    told = feasible = 0
    for entry in entries:
        if entry.state in (TrialState.COMPLETE, TrialState.PRUNED):
            told += 1
            feasible += not entry.infeasible
            if told == GP_TRIALS:
                break
    return told, feasible


def _dimensions(count: int) -> str:
    return f"{count} dimensions" if count > 1 else "one dimension"


def _pick(name: str, why: str, **options: Any) -> Pick:
    return Pick(Choice(name, {**SAMPLERS[name]().model_dump(), **options}), why)


@cache
def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None
