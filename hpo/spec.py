"""A study's document: what a person launches, checked whole and made immutable.

`parse` returns a `StudySpec` or raises `Invalid` with every fault of the document at once, each with its path
(``space[2].high``): wrong types, wrong bounds, unknown names, settings the workload refuses, and a space in which no
point can be trained. `dump` writes a spec back as the document it came from, complete with its defaults and its seed:
``parse(dump(spec))`` is the same spec.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from hpo import feasibility, fixed
from hpo.document import (
    PRUNERS,
    SAMPLERS,
    BudgetForm,
    ChangeForm,
    Form,
    SeedForm,
    StoredForm,
    StudyForm,
    TrialForm,
    read,
    read_named,
    suggest_name,
    tidy,
)
from hpo.errors import Fault, Invalid
from hpo.parameters import read_space
from hpo.protocol import Value, Workload
from hpo.space import Flat, SearchSpace, show

EXTERNAL = "external"
"""The workload of clients that evaluate an objective of their own; it has no settings to check."""

MAX_SOURCES = 20


class Unset(Enum):
    """Stands for a field that a change does not name, where null has a meaning of its own."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True)
class Budget:
    """When to stop leasing; None is without a limit. `hours` is wall time of all attempts, `target` a trial's value."""

    trials: int | None = None
    hours: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class Choice:
    """A sampler or a pruner by name, with all its options."""

    name: str
    options: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class SeedFrom:
    """A study, by id or name, to begin with; `top` of its points where its values cannot be taken over."""

    study: int | str
    top: int


@dataclass(frozen=True)
class StudySpec:
    """Everything a study was launched with. `points` and `fixed` are flat and may be partial."""

    name: str
    workload: str
    space: SearchSpace
    sampler: Choice
    pruner: Choice
    seed: int
    direction: Literal["maximize", "minimize"] = "maximize"
    description: str = ""
    notes: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget = Budget()
    concurrency: int | None = None
    max_attempts: int = 3
    points: tuple[Flat, ...] = ()
    fixed: Flat = field(default_factory=dict)
    seed_from: tuple[SeedFrom, ...] = ()

    def better(self, first: float, second: float) -> bool:
        """Tell whether the value `first` beats `second`."""
        return first > second if self.direction == "maximize" else first < second


@dataclass(frozen=True)
class StudyChange:
    """What a PATCH names. Fields not named are None (`state`, `notes`), `UNSET`, or absent from `budget`, `fixed`."""

    state: Literal["running", "paused", "stopped"] | None = None
    budget: Mapping[str, int | float | None] = field(default_factory=dict)
    concurrency: int | Literal[Unset.UNSET] | None = UNSET
    notes: str | None = None
    fixed: Mapping[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialAdd:
    """A point of one's own: to be queued (`outcome` None; it may be partial) or recorded with its outcome."""

    params: Flat
    outcome: Literal["complete", "infeasible", "failed"] | None
    value: float | None
    reason: str = ""


def parse(document: object, workloads: Mapping[str, Workload], *, any_names: bool = False) -> StudySpec:
    """Read a study's document (JSON or YAML, as plain dictionaries and lists).

    A missing seed is drawn, so that the spec is complete.

    Args:
        any_names: the study and its parameters may have names of any text (Whetlab's clients bring their own).

    Raises:
        Invalid: names every fault.
    """
    faults, readable = tidy(document)
    if not readable:
        raise Invalid(faults, what="the study")
    return _read(document, workloads, faults, any_names)


def load(stored: object) -> StudySpec:
    """Read back what `dump` wrote, also after JSONB has kept it (which writes 1e20 out as an integer).

    It was checked when the study was launched, so nothing is asked of workloads or of this machine.

    Raises:
        Invalid: it is not what `dump` writes.
    """
    return _read(stored, None, [], any_names=True)


def _read(
    document: object, workloads: Mapping[str, Workload] | None, faults: list[Fault], any_names: bool
) -> StudySpec:
    """Read a document; without `workloads` it is trusted to have been checked against them."""
    form, more = read(StoredForm if any_names else StudyForm, document)
    given = document if isinstance(document, Mapping) else {}
    spotted = {fault.at for fault in faults}
    faults += [fault for fault in more if fault.at not in spotted]

    # Each part is read by itself, so that a fault in one does not hide those of the others.
    space, space_faults = read_space(given.get("space"), any_names=any_names)
    sampler, sampler_faults = _choice(SAMPLERS, given.get("sampler", "tpe"), "sampler")
    pruner, pruner_faults = _choice(PRUNERS, given.get("pruner", "none"), "pruner")
    if sampler is not None and workloads is not None:
        sampler_faults += _misfits(sampler, space)
    if pruner is not None:
        pruner_faults += _halving_faults(pruner)
    part_faults = space_faults + sampler_faults + pruner_faults
    points, point_faults = _points(given.get("points", []), space)
    part_faults += point_faults
    held, fixed_faults = _fixed(given.get("fixed", {}), space)
    part_faults += fixed_faults
    seeds, seed_faults = read_seeds(given.get("seed_from"))
    part_faults += seed_faults
    workload, workload_faults = (None, []) if workloads is None else _workload(given, workloads)
    settings = given.get("settings", {})
    if workload is not None and isinstance(settings, Mapping) and not _within("settings", faults):
        workload_faults += [
            Fault(_under("settings", str(fault.at)), str(fault.fault)) for fault in workload.check(dict(settings))
        ]
    part_faults += workload_faults
    spotted = {fault.at for fault in faults}
    faults += [fault for fault in part_faults if fault.at not in spotted]
    if not faults and workload is not None and space is not None:
        faults += feasibility.faults_of(space, workload, settings, held)
        faults += feasibility.point_faults(points, space, workload, settings)
    if faults:
        raise Invalid(list(dict.fromkeys(faults)), what="the study")
    assert form is not None
    assert space is not None
    assert sampler is not None
    assert pruner is not None
    return StudySpec(
        name=form.name,
        workload=form.workload,
        space=space,
        sampler=sampler,
        pruner=pruner,
        seed=secrets.randbits(31) if form.seed is None else form.seed,
        direction=form.direction,
        description=form.description,
        notes=form.notes,
        settings=dict(form.settings),
        budget=Budget(**form.budget.model_dump()),
        concurrency=form.concurrency,
        max_attempts=form.max_attempts,
        points=tuple(points),
        fixed=held,
        seed_from=tuple(seeds),
    )


def parse_change(document: object, space: SearchSpace) -> StudyChange:
    """Read the body of a PATCH to a study of this space.

    Raises:
        Invalid: names every fault; a change that names nothing is one.
    """
    faults, readable = tidy(document)
    form, more = read(ChangeForm, document) if readable else (None, [])
    spotted = {fault.at for fault in faults}
    faults += [fault for fault in more if fault.at not in spotted]
    if form is not None:
        named = form.model_fields_set
        faults += [Fault(name, "cannot be null") for name in ("state", "budget", "notes") if _named_null(form, name)]
        if not named:
            faults.append(Fault("", f"names nothing to change; {suggest_name(None, ChangeForm.model_fields)}"))
    changes: fixed.Changes = {}
    if isinstance(document, Mapping) and "fixed" in document and readable:
        changes, more = fixed.read(document["fixed"], space)
        spotted = {fault.at for fault in faults}
        faults += [fault for fault in more if fault.at not in spotted]
    if faults or form is None:
        raise Invalid(faults, what="the change")
    budget = form.budget or BudgetForm()
    return StudyChange(
        state=form.state,
        budget={name: getattr(budget, name) for name in sorted(budget.model_fields_set)},
        concurrency=form.concurrency if "concurrency" in named else UNSET,
        notes=form.notes,
        fixed=changes,
    )


def _named_null(form: Form, name: str) -> bool:
    return name in form.model_fields_set and getattr(form, name) is None


def parse_trial(document: object, spec: StudySpec, workloads: Mapping[str, Workload]) -> TrialAdd:
    """Read a point of one's own: ``{"params": ...}`` queues, a value or an outcome records a finished trial.

    Raises:
        Invalid: names every fault; a queued point that can never be trained is one.
    """
    faults, readable = tidy(document)
    form, more = read(TrialForm, document) if readable else (None, [])
    spotted = {fault.at for fault in faults}
    faults += [fault for fault in more if fault.at not in spotted]
    if form is None or faults:
        raise Invalid(faults, what="the trial")
    outcome = form.outcome or ("complete" if form.value is not None else None)
    flat, point_faults = spec.space.read(form.params, at="params", partial=outcome is None)
    faults += point_faults
    if outcome == "complete" and form.value is None:
        faults.append(Fault("value", "is missing: a complete trial has one"))
    if outcome == "failed" and form.value is not None:
        faults.append(Fault("value", "a failed trial has none"))
    workload = workloads.get(spec.workload)
    if outcome is None and workload is not None and not faults and len(flat) == len(spec.space.names):
        reason = workload.feasible(spec.space.nest(flat), spec.settings)
        if reason is not None:
            faults.append(Fault("params", f"can never be trained: {reason}"))
    if faults:
        raise Invalid(faults, what="the trial")
    return TrialAdd(params=flat, outcome=outcome, value=form.value, reason=form.reason)


def dump(spec: StudySpec) -> dict[str, Any]:
    """Return the spec as a complete document of plain JSON values."""
    return {
        "name": spec.name,
        "description": spec.description,
        "notes": spec.notes,
        "workload": spec.workload,
        "direction": spec.direction,
        "sampler": spec.sampler.document(),
        "pruner": spec.pruner.document(),
        "space": [parameter.document() for parameter in spec.space.parameters],
        "settings": dict(spec.settings),
        "budget": {"trials": spec.budget.trials, "hours": spec.budget.hours, "target": spec.budget.target},
        "concurrency": spec.concurrency,
        "max_attempts": spec.max_attempts,
        "seed": spec.seed,
        "points": [spec.space.nest(point) for point in spec.points],
        "fixed": spec.space.nest(spec.fixed),
        "seed_from": [{"study": seed.study, "top": seed.top} for seed in spec.seed_from],
    }


def _under(at: str, path: str) -> str:
    return at if not path else f"{at}{path}" if path.startswith("[") else f"{at}.{path}"


def _within(at: str, faults: Sequence[Fault]) -> bool:
    return any(fault.at == at or fault.at.startswith((f"{at}.", f"{at}[")) for fault in faults)


def _choice(registry: Mapping[str, type[Form]], data: object, what: str) -> tuple[Choice | None, list[Fault]]:
    name, form, faults = read_named(registry, data, what, what)
    return (None if form is None else Choice(name, form.model_dump())), faults


def _workload(given: Mapping[str, Any], workloads: Mapping[str, Workload]) -> tuple[Workload | None, list[Fault]]:
    name = given.get("workload")
    if not isinstance(name, str):
        return None, []  # its form has said so
    if name not in workloads and name != EXTERNAL:
        known = sorted({*workloads, EXTERNAL})
        return None, [Fault("workload", f"there is no workload {show(name)}; {suggest_name(name, known)}")]
    if name != EXTERNAL and given.get("direction") == "minimize":
        return workloads[name], [Fault("direction", f"a {name} study maximizes; only an external one may minimize")]
    return workloads.get(name), []


def cannot_sample(spec: StudySpec) -> list[Fault]:
    """Name why this machine cannot sample for a study that was launched, perhaps on another one."""
    return _misfits(spec.sampler, spec.space)


def _misfits(sampler: Choice, space: SearchSpace | None) -> list[Fault]:
    """Name why a sampler cannot work here, or with these options."""
    options, faults = sampler.options, []
    if sampler.name == "gp" and importlib.util.find_spec("torch") is None:
        faults.append(Fault("sampler", "gp fits its kernel with torch, which the server lacks: install whetstone[all]"))
    if sampler.name == "cmaes":
        if space is not None and not any(
            parameter.type != "categorical" and parameter.low < parameter.high for parameter in space.parameters
        ):
            faults.append(Fault("sampler", "cmaes needs a float or integer parameter to vary; use tpe here"))
        if options["use_separable_cma"] and options["with_margin"]:
            faults.append(Fault("sampler.with_margin", "does not go with use_separable_cma"))
        if options["lr_adapt"] and (options["use_separable_cma"] or options["with_margin"]):
            faults.append(Fault("sampler.lr_adapt", "does not go with use_separable_cma or with_margin"))
    return faults


def _halving_faults(pruner: Choice) -> list[Fault]:
    options = pruner.options
    if pruner.name == "successive_halving" and options["min_resource"] == "auto" and options["bootstrap_count"]:
        return [Fault("pruner.bootstrap_count", "needs a number as min_resource, not auto")]
    if pruner.name == "hyperband" and options["max_resource"] == "auto" and options["bootstrap_count"]:
        return [Fault("pruner.bootstrap_count", "needs a number as max_resource, not auto")]
    if (
        pruner.name == "hyperband"
        and options["max_resource"] != "auto"
        and options["max_resource"] < options["min_resource"]
    ):
        return [Fault("pruner.max_resource", "is below min_resource")]
    return []


def _points(data: object, space: SearchSpace | None) -> tuple[list[Flat], list[Fault]]:
    if not isinstance(data, list | tuple) or space is None or len(data) > 10_000:
        return [], []
    points, faults = [], []
    for place, point in enumerate(data):
        flat, more = space.read(point, at=f"points[{place}]", partial=True)
        points.append(flat)
        faults += more
    return points, faults


def _fixed(data: object, space: SearchSpace | None) -> tuple[Flat, list[Fault]]:
    if space is None or not isinstance(data, Mapping):
        return {}, []  # its form has said so
    changes, faults = fixed.read(data, space)
    return fixed.merged(space, {}, changes), faults


def read_seeds(data: object) -> tuple[list[SeedFrom], list[Fault]]:
    """Read one source or several, each a study's id or name, or an object with how many of its points to take."""
    if data is None:
        return [], []
    entries = data if isinstance(data, list | tuple) else [data]
    if len(entries) > MAX_SOURCES:
        return [], [Fault("seed_from", f"names {len(entries)} studies; at most {MAX_SOURCES} are allowed")]
    seeds: list[SeedFrom] = []
    faults: list[Fault] = []
    for place, entry in enumerate(entries):
        at = f"seed_from[{place}]"
        form, more = read(SeedForm, entry if isinstance(entry, Mapping) else {"study": entry}, at)
        faults += more
        if form is not None and any(seed.study == form.study for seed in seeds):
            faults.append(Fault(f"{at}.study", "stands here twice"))
        elif form is not None:
            seeds.append(SeedFrom(form.study, form.top))
    return seeds, faults
