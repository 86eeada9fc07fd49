"""`auto`: which sampler a study is best served by at this moment, and why, in one sentence for people.

`pick` is pure and cheap: it counts trials and looks at the space. Promise: the same study gives the same pick, and a
pick changes only when a count that grows passes a threshold, so that a study does not flip back and forth. What it
rests on is measured by benchmarks/search.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hpo.document import SAMPLERS
from hpo.history import Snapshot
from hpo.spec import Choice, StudySpec

GP_TRIALS = 400
"""Finished trials after which a Gaussian process costs more than it gives."""
GP_DIMENSIONS = 40


@dataclass(frozen=True)
class Pick:
    """The sampler that `auto` stands for, with all its options, and the reason."""

    choice: Choice
    why: str


def pick(spec: StudySpec, snapshot: Snapshot) -> Pick:
    """Choose a sampler for the next trial of a study whose sampler is `auto`."""
    varying = [distribution for distribution in spec.space.reduced.values() if not distribution.single()]
    finished = sum(entry.trial.state.is_finished() for entry in snapshot.entries)
    if not varying or all(isinstance(one, CategoricalDistribution) for one in varying):
        return _pick("tpe", "all parameters are choices, which TPE weighs one by one")
    size = _dimensions(varying)
    if not _has_torch():
        return _many(varying, "this server has no torch, which a Gaussian process needs", finished)
    if len(varying) > GP_DIMENSIONS:
        return _many(varying, f"{size} are more than a Gaussian process can tell apart", finished)
    if finished >= GP_TRIALS:
        return _many(varying, f"after {GP_TRIALS} trials a Gaussian process costs more than it gives", finished)
    return _pick("gp", f"a Gaussian process makes the most of few trials in {size}")


def _many(varying: Sequence[BaseDistribution], why: str, finished: int) -> Pick:
    """The pick where a Gaussian process is not the one."""
    if finished >= GP_TRIALS and not any(isinstance(one, CategoricalDistribution) for one in varying):
        return _pick("cmaes", f"{why}, and CMA-ES thrives on many trials of numbers")
    return _pick("tpe", f"{why}, and TPE is quick in any space")


def _dimensions(varying: Sequence[BaseDistribution]) -> str:
    return f"{len(varying)} dimensions" if len(varying) > 1 else "one dimension"


def _pick(name: str, why: str, **options: Any) -> Pick:
    return Pick(Choice(name, {**SAMPLERS[name]().model_dump(), **options}), why)


@cache
def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None
