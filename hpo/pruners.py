"""Pruners: whether a running trial is to be stopped, judged by its reports so far and by those of other trials.

The rules are those of Optuna's MedianPruner, SuccessiveHalvingPruner and HyperbandPruner, told what they ask for
instead of a list of all trials. What Optuna's keep in memory (the resource that "auto" stood for) or write to a trial
(the rungs it has reached) is returned, and holds only if the caller stores it: the same question asked again before
that gets the same answer. Cancelled trials are never rivals; a diverged one is no learning curve to take a median of.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from hpo.pruning import RESOURCE, RUNG, Pruning, Rivals
from hpo.spec import Choice, StudySpec


@dataclass(frozen=True)
class Verdict:
    """The answer, and the attributes to be stored with the trial and with the study."""

    prune: bool
    trial_system_attrs: dict[str, Any] = field(default_factory=dict)
    study_system_attrs: dict[str, Any] = field(default_factory=dict)


GOES_ON = Verdict(prune=False)


def judge_now(spec: StudySpec, pruning: Pruning, trial_id: int, number: int, reports: Mapping[int, float]) -> Verdict:
    """Decide whether a trial goes on: one round trip, none where the study has no pruner.

    Args:
        spec: the study.
        pruning: what this process remembers of it.
        trial_id: the trial.
        number: the trial's number.
        reports: values by epoch that are not stored yet; they are added to the stored ones. Without any, it goes on.

    Raises:
        NotFound: the study is gone.
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    pruner = spec.pruner
    if pruner.name == "none" or not reports:
        return GOES_ON
    auto = pruner.name in _AUTO and pruner.options[_AUTO[pruner.name]] == "auto"
    rivals = pruning.look(trial_id, reports, rungs=pruner.name != "median", longest=auto)
    return judge(spec, number, rivals)


def judge(spec: StudySpec, number: int, rivals: Rivals) -> Verdict:
    """Do what `judge_now` does, told all it asks for."""
    pruner = spec.pruner
    if pruner.name == "none" or not rivals.reports:
        return GOES_ON
    step = max(rivals.reports)
    if pruner.name == "median":
        return Verdict(_below_median(spec, rivals, step))
    resource, settled = _resource(pruner, rivals)
    if resource is None:
        return GOES_ON
    news = {RESOURCE: resource} if settled else {}
    options = pruner.options
    if pruner.name == "successive_halving":
        prune, reached = _halve(spec, rivals, step, resource, options["min_early_stopping_rate"], lambda _: True)
    else:
        low, factor = options["min_resource"], options["reduction_factor"]
        budgets = _budgets(low, max(resource, low), factor)
        bracket = _bracket(rivals.study_name, number, budgets)
        prune, reached = _halve(
            spec, rivals, step, low, bracket, lambda other: _bracket(rivals.study_name, other, budgets) == bracket
        )
    return Verdict(prune, {f"{RUNG}{rung}": value for rung, value in reached.items()}, news)


def _below_median(spec: StudySpec, rivals: Rivals, step: int) -> bool:
    """Whether the best report of a trial is worse than the median of the complete trials at its last step."""
    options = spec.pruner.options
    warmup, every = options["n_warmup_steps"], options["interval_steps"]
    if rivals.complete == 0 or rivals.complete < options["n_startup_trials"] or step < warmup:
        return False
    due = (step - warmup) // every * every + warmup
    if max((other for other in rivals.reports if other != step), default=-1) >= due:
        return False  # it was judged in this interval before
    own = [value for value in rivals.reports.values() if not math.isnan(value)]
    if not own:
        return True
    others = rivals.at_step[~np.isnan(rivals.at_step)]
    if not others.size or rivals.at_step.size < options["n_min_trials"]:
        return False
    median = float(np.percentile(others, 50.0))
    return max(own) < median if spec.direction == "maximize" else min(own) > median


def _halve(
    spec: StudySpec, rivals: Rivals, step: int, resource: int, rate: int, rival: Callable[[int], bool]
) -> tuple[bool, dict[int, float]]:
    """Send a trial up from rung to rung as far as its last report reaches; return the verdict and the rungs reached."""
    factor, bootstrap = spec.pruner.options["reduction_factor"], spec.pruner.options["bootstrap_count"]
    value = rivals.reports[step]
    reached: dict[int, float] = {}
    rung = 0
    while rung in rivals.reached:
        rung += 1
    while step >= resource * factor ** (rate + rung):
        if math.isnan(value):
            return True, reached
        reached[rung] = value
        others = [other for number, other in rivals.rungs.get(rung, ()) if rival(number)]
        count = len(others) + 1
        better = sum(other > value if spec.direction == "maximize" else other < value for other in others)
        # The best of every `factor` go on; of the first few, the best one.
        if count <= bootstrap or better >= max(count // factor, 1):
            return True, reached
        rung += 1
    return False, reached


_AUTO = {"successive_halving": "min_resource", "hyperband": "max_resource"}


def _resource(pruner: Choice, rivals: Rivals) -> tuple[int | None, bool]:
    """Resolve "auto" once, as Optuna does from the longest complete trial, and say whether that is news."""
    given = pruner.options[_AUTO[pruner.name]]
    if given != "auto":
        return int(given), False
    if rivals.resource is not None:
        return rivals.resource, False
    if rivals.longest is None:
        return None, False
    if pruner.name == "successive_halving":
        return max(rivals.longest // 100, 1), True
    return rivals.longest + 1, True


@lru_cache(maxsize=256)
def _budgets(low: int, high: int, factor: int) -> tuple[int, ...]:
    """The shares of the trials that the brackets get (Li et al. 2018, algorithm 1, as Optuna reads it)."""
    brackets = math.floor(math.log(high / low, factor)) + 1
    return tuple(math.ceil(brackets * factor**s / (s + 1)) for s in reversed(range(brackets)))


@lru_cache(maxsize=100_000)
def _bracket(study_name: str, number: int, budgets: tuple[int, ...]) -> int:
    """The bracket of a trial, which follows from the study's name and its number alone."""
    place = binascii.crc32(f"{study_name}_{number}".encode()) % sum(budgets)
    for bracket, budget in enumerate(budgets):
        place -= budget
        if place < 0:
            return bracket
    raise AssertionError("unreachable")
