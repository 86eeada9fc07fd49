"""Pruners: whether a running trial is to be stopped, judged by its reports so far and by those of other trials.

Like samplers, pruners are made anew for every question. What Optuna's keep in memory (the resource that "auto" stood
for) or write to a trial (the rungs it has reached) is returned, and holds only if the caller stores it: the same
question asked again before that gets the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from hpo import database, rows
from hpo.history import Entry, History, Snapshot, View, copy_of, entry_of
from hpo.spec import Choice, StudySpec

RESOURCE = "whetstone:pruner_resource"
"""The study attribute that keeps what "auto" was resolved to, so that rungs and brackets stay where they are."""


@dataclass(frozen=True)
class Verdict:
    """The answer, and the attributes to be stored with the trial and with the study."""

    prune: bool
    trial_system_attrs: dict[str, Any] = field(default_factory=dict)
    study_system_attrs: dict[str, Any] = field(default_factory=dict)


def build(pruner: Choice, resource: int | None = None) -> BasePruner:
    """Make one of Optuna's pruners; `resource` stands in for an "auto" that has been resolved."""
    options = dict(pruner.options)
    if pruner.name == "none":
        return NopPruner()
    if pruner.name == "median":
        return MedianPruner(**options)
    if pruner.name == "successive_halving":
        if options["min_resource"] == "auto" and resource is not None:
            options["min_resource"] = resource
        return SuccessiveHalvingPruner(**options)
    if pruner.name == "hyperband":
        if options["max_resource"] == "auto" and resource is not None:
            options["max_resource"] = max(resource, options["min_resource"])
        return HyperbandPruner(**options)
    raise AssertionError(f"spec let the pruner {pruner.name!r} through")


def should_prune(
    spec: StudySpec,
    history: History,
    number: int,
    reports: Mapping[int, float] | None = None,
    *,
    refresh: bool = True,
) -> Verdict:
    """Decide whether trial `number` goes on.

    Args:
        spec: the study.
        history: its trials; refreshed first unless `refresh` is false or the study has no pruner.
        number: the trial's number.
        reports: values by epoch that are not stored yet; they are added to the stored ones.

    Returns:
        the verdict; a trial that has no report, or is not known, goes on.
    """
    if spec.pruner.name == "none":
        return Verdict(prune=False)
    if refresh:
        history.refresh()
    short = history.snapshot(spec.space)
    with database.transaction(history.engine) as connection:
        entries = tuple(map(entry_of, rows.read_trials(connection, history.study_id)))
    return judge(spec, replace(short, entries=entries), number, reports)


def judge(spec: StudySpec, snapshot: Snapshot, number: int, reports: Mapping[int, float] | None = None) -> Verdict:
    """Do what `should_prune` does, on a study at one moment."""
    stored = snapshot.trial(number)
    if stored is None:
        return Verdict(prune=False)
    values = {**stored.intermediate_values, **(reports or {})}
    if not values:
        return Verdict(prune=False)
    trial = copy_of(stored, state=TrialState.RUNNING, intermediate_values=values)
    resource, resolved = _resource(spec.pruner, snapshot)
    view = View(snapshot, _shown(spec.pruner, snapshot.entries), trial)
    pruner = build(spec.pruner, resource)
    study = optuna.Study(snapshot.name, view, sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    prune = pruner.prune(study, trial)
    return Verdict(bool(prune), view.trial_attributes, {RESOURCE: resource} if resolved else {})


def _shown(pruner: Choice, entries: Sequence[Entry]) -> list[FrozenTrial]:
    """Cancelled trials are never shown. A diverged one is no learning curve to take a median of."""
    return [
        entry.plain for entry in entries if not entry.cancelled and not (pruner.name == "median" and entry.infeasible)
    ]


def _resource(pruner: Choice, snapshot: Snapshot) -> tuple[int | None, bool]:
    """Resolve "auto" once, as Optuna does from the longest complete trial, and say whether that is news."""
    option = {"successive_halving": "min_resource", "hyperband": "max_resource"}.get(pruner.name)
    if option is None or pruner.options[option] != "auto":
        return None, False
    known = snapshot.attributes.get(RESOURCE)
    if isinstance(known, int) and known >= 1:
        return known, False
    steps = [
        entry.trial.last_step
        for entry in snapshot.entries
        if entry.trial.state == TrialState.COMPLETE and not entry.infeasible and entry.trial.last_step is not None
    ]
    if not steps:
        return None, False
    longest = max(steps)
    return (max(longest // 100, 1) if pruner.name == "successive_halving" else longest + 1), True
