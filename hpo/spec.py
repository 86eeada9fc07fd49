"""A study's document: what a person launches, checked whole and made immutable.

`parse` returns a `StudySpec` or raises `Invalid` with every fault of the document at once, each with its path
(``space[2].high``): wrong types, wrong bounds, unknown names, settings the workload refuses, and a space in which no
point can be trained. `dump` writes a spec back as the document it came from, complete with its defaults and its seed:
``parse(dump(spec))`` is the same spec.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any, Final, Literal

import numpy as np

from hpo.document import (
    PARAMETERS,
    PRUNERS,
    SAMPLERS,
    BudgetForm,
    CategoricalForm,
    ChangeForm,
    FloatForm,
    Form,
    IntegerForm,
    StudyForm,
    TrialForm,
    read,
    read_named,
    suggest_name,
    tidy,
)
from hpo.errors import Fault, Invalid
from hpo.protocol import Point, Value, Workload
from hpo.space import Flat, Group, Parameter, SearchSpace, join, same, show

EXTERNAL = "external"
"""The workload of clients that evaluate an objective of their own; it has no settings to check."""
MAX_DIMENSIONS = 256
FEASIBILITY_PROBES = 64
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


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
class StudySpec:
    """Everything a study was launched with. `points` are flat and may be partial."""

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

    def better(self, first: float, second: float) -> bool:
        """Tell whether the value `first` beats `second`."""
        return first > second if self.direction == "maximize" else first < second


@dataclass(frozen=True)
class StudyChange:
    """What a PATCH names. Fields not named are None (`state`, `notes`), `UNSET`, or absent from `budget`."""

    state: Literal["running", "paused", "stopped"] | None = None
    budget: Mapping[str, int | float | None] = field(default_factory=dict)
    concurrency: int | Literal[Unset.UNSET] | None = UNSET
    notes: str | None = None


@dataclass(frozen=True)
class TrialAdd:
    """A point of one's own: to be queued (`outcome` None; it may be partial) or recorded with its outcome."""

    params: Flat
    outcome: Literal["complete", "infeasible", "failed"] | None
    value: float | None
    reason: str = ""


def parse(document: object, workloads: Mapping[str, Workload]) -> StudySpec:
    """Read a study's document (JSON or YAML, as plain dictionaries and lists).

    A missing seed is drawn, so that the spec is complete.

    Raises:
        Invalid: names every fault.
    """
    faults, readable = tidy(document)
    if not readable:
        raise Invalid(faults, what="the study")
    return _read(document, workloads, faults)


def load(stored: object) -> StudySpec:
    """Read back what `dump` wrote, also after JSONB has kept it (which writes 1e20 out as an integer).

    It was checked when the study was launched, so nothing is asked of workloads or of this machine.

    Raises:
        Invalid: it is not what `dump` writes.
    """
    return _read(stored, None, [])


def _read(document: object, workloads: Mapping[str, Workload] | None, faults: list[Fault]) -> StudySpec:
    """Read a document; without `workloads` it is trusted to have been checked against them."""
    form, more = read(StudyForm, document)
    given = document if isinstance(document, Mapping) else {}
    spotted = {fault.at for fault in faults}
    faults += [fault for fault in more if fault.at not in spotted]

    # Each part is read by itself, so that a fault in one does not hide those of the others.
    space, space_faults = _space(given.get("space"))
    sampler, sampler_faults = _choice(SAMPLERS, given.get("sampler", "tpe"), "sampler")
    pruner, pruner_faults = _choice(PRUNERS, given.get("pruner", "none"), "pruner")
    if sampler is not None and workloads is not None:
        sampler_faults += _serves(sampler, space)
    if pruner is not None:
        pruner_faults += _halving_faults(pruner)
    part_faults = space_faults + sampler_faults + pruner_faults
    points, point_faults = _points(given.get("points", []), space)
    part_faults += point_faults
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
        faults += _feasibility(space, workload, settings)
        faults += _impossible_points(points, space, workload, settings)
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
    )


def parse_change(document: object) -> StudyChange:
    """Read the body of a PATCH.

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
    if faults or form is None:
        raise Invalid(faults, what="the change")
    budget = form.budget or BudgetForm()
    return StudyChange(
        state=form.state,
        budget={name: getattr(budget, name) for name in sorted(budget.model_fields_set)},
        concurrency=form.concurrency if "concurrency" in named else UNSET,
        notes=form.notes,
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


def _serves(sampler: Choice, space: SearchSpace | None) -> list[Fault]:
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


def _space(data: object) -> tuple[SearchSpace | None, list[Fault]]:
    if not isinstance(data, list | tuple) or len(data) > MAX_DIMENSIONS:
        return None, []  # its form has said so
    faults: list[Fault] = []
    parameters: list[Parameter] = []
    names: dict[str, int] = {}
    for place, entry in enumerate(data):
        at = f"space[{place}]"
        parameter, more = _parameter(entry, at)
        faults += more
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if isinstance(name, str):
            if name in names:
                faults.append(Fault(f"{at}.name", f"is the name of space[{names[name]}] already"))
            names.setdefault(name, place)
        if parameter is not None:
            parameters.append(parameter)
    dimensions = sum(len(parameter.flat_names) for parameter in parameters)
    if dimensions > MAX_DIMENSIONS:
        faults.append(Fault("space", f"has {dimensions} scalar dimensions; at most {MAX_DIMENSIONS} are allowed"))
    return (None if faults or not parameters else SearchSpace(tuple(parameters))), faults


def _parameter(entry: object, at: str) -> tuple[Parameter | None, list[Fault]]:
    if not isinstance(entry, Mapping):
        return None, [Fault(at, f"must be an object, not {show(entry)}")]
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in PARAMETERS:
        verdict = f"there is no type {show(kind)}; " if "type" in entry else "is missing; "
        return None, [Fault(f"{at}.type", verdict + suggest_name(kind, PARAMETERS))]
    form, faults = read(PARAMETERS[kind], entry, at)
    if form is None:
        return None, faults
    labels = tuple(form.labels or ())
    faults += _duplicates(labels, f"{at}.labels", "label")
    groups, more = _groups(form.tied, labels, f"{at}.tied")
    faults += more
    if isinstance(form, CategoricalForm):
        faults += _choice_faults(form.choices, f"{at}.choices")
    else:
        faults += _bounds(form, at)
    if faults:
        return None, faults
    if isinstance(form, CategoricalForm):
        choices: tuple[Value, ...] = tuple(form.choices)
        return Parameter(form.name, "categorical", choices=choices, labels=labels, groups=groups), []
    return Parameter(form.name, form.type, form.low, form.high, form.log, form.step, (), labels, groups), []


def _duplicates(values: Sequence[Value], at: str, what: str) -> list[Fault]:
    """Find values that are one to Optuna, which looks a choice up by ==: 1, 1.0 and true cannot stand together."""
    faults = []
    for place, value in enumerate(values):
        first = values.index(value)
        if first < place:
            other = values[first]
            why = f"is the {what} of {at.rpartition('.')[2]}[{first}] already"
            if not same(value, other):
                why = f"{show(value)} cannot be told from {show(other)} in the same list: use text"
            faults.append(Fault(f"{at}[{place}]", why))
    return faults


def _choice_faults(choices: Sequence[object], at: str) -> list[Fault]:
    faults = []
    for place, choice in enumerate(choices):
        if not isinstance(choice, bool | int | float | str):
            faults.append(Fault(f"{at}[{place}]", f"must be text, a number, true or false, not {show(choice)}"))
        elif isinstance(choice, str) and len(choice) > 500:
            faults.append(Fault(f"{at}[{place}]", "must have at most 500 characters"))
    if faults:
        return faults
    return _duplicates([choice for choice in choices if isinstance(choice, bool | int | float | str)], at, "choice")


def _bounds(form: FloatForm | IntegerForm, at: str) -> list[Fault]:
    low, high, step = form.low, form.high, form.step
    if low > high:
        return [Fault(f"{at}.high", f"is {show(high)}, below low ({show(low)})")]
    faults = []
    if form.log and low <= 0:
        faults.append(Fault(f"{at}.low", f"must be above 0 on a log scale, not {show(low)}"))
    if form.log and step is not None and not (isinstance(form, IntegerForm) and step == 1):
        faults.append(Fault(f"{at}.step", "does not go with log: leave one of them out"))
    elif step is not None and low < high:
        first, last, stride = Decimal(repr(low)), Decimal(repr(high)), Decimal(repr(step))
        if stride > last - first:
            faults.append(Fault(f"{at}.step", f"is larger than the range from {show(low)} to {show(high)}"))
        elif (last - first) / stride > 2**53:
            faults.append(Fault(f"{at}.step", "is too small for this range: leave it out"))
        elif (last - first) % stride:
            reached = first + stride * ((last - first) // stride)
            top = show(float(reached) if isinstance(form, FloatForm) else int(reached))
            faults.append(
                Fault(f"{at}.step", f"does not divide the range: its highest value is {top}, not {show(high)}")
            )
    if isinstance(form, FloatForm) and low < high and not low < (low + high) / 2 < high:
        faults.append(Fault(f"{at}.high", "is so near to low that no double lies between them"))
    return faults


def _groups(tied: object, labels: tuple[str, ...], at: str) -> tuple[tuple[Group, ...], list[Fault]]:
    """Read `tied`: true ties all labels; an object must put every label into exactly one group."""
    if tied is False:
        return (), []
    if tied is not True and not isinstance(tied, Mapping):
        return (), [Fault(at, f"must be true, false or an object of groups of labels, not {show(tied)}")]
    if not labels:
        return (), [Fault(at, "only a vector can be tied: give it labels")]
    if tied is True:
        return (Group("", labels),), []
    faults: list[Fault] = []
    groups: list[Group] = []
    owner: dict[str, object] = {}
    for name, members in tied.items():
        here = join(at, name)
        if not isinstance(name, str) or not _LABEL.fullmatch(name):
            faults.append(Fault(here, "a group's name must be 1-64 of A-Z a-z 0-9 _ . -, not beginning with . or -"))
            continue
        if not isinstance(members, list | tuple) or not members:
            faults.append(Fault(here, f"must be a list of labels, not {show(members) if members else 'an empty one'}"))
            continue
        for place, label in enumerate(members):
            if not isinstance(label, str) or label not in labels:
                faults.append(
                    Fault(f"{here}[{place}]", f"there is no label {show(label)}; {suggest_name(label, labels)}")
                )
            elif label in owner:
                faults.append(Fault(f"{here}[{place}]", f"{label} is in the group {show(owner[label])} already"))
            else:
                owner[label] = name
        if name in labels and list(members) != [name]:
            faults.append(Fault(here, "is also a label: name the group otherwise"))
        groups.append(Group(name, tuple(label for label in members if isinstance(label, str))))
    missing = [label for label in labels if label not in owner]
    if missing and not faults:
        listing = ", ".join(missing[:8])
        faults.append(Fault(at, f"misses {listing}: every label belongs to one group"))
    return tuple(groups), faults


def _points(data: object, space: SearchSpace | None) -> tuple[list[Flat], list[Fault]]:
    if not isinstance(data, list | tuple) or space is None or len(data) > 10_000:
        return [], []
    points, faults = [], []
    for place, point in enumerate(data):
        flat, more = space.read(point, at=f"points[{place}]", partial=True)
        points.append(flat)
        faults += more
    return points, faults


def _feasibility(space: SearchSpace, workload: Workload, settings: Mapping[str, Any]) -> list[Fault]:
    """Look for one point that can be trained; the draws are fixed, so that the same document gets the same answer."""
    rng = np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    for _ in range(FEASIBILITY_PROBES):
        reason = workload.feasible(space.nest(space.random(rng)), settings)
        if reason is None:
            return []
        reasons[reason] += 1
    reason, count = reasons.most_common(1)[0]
    return [Fault("space", f"none of {FEASIBILITY_PROBES} random points can be trained; {count} times: {reason}")]


def _impossible_points(
    points: Sequence[Flat], space: SearchSpace, workload: Workload, settings: Mapping[str, Any]
) -> list[Fault]:
    faults = []
    for place, flat in enumerate(points):
        if len(flat) == len(space.names):
            point: Point = space.nest(flat)
            reason = workload.feasible(point, settings)
            if reason is not None:
                faults.append(Fault(f"points[{place}]", f"can never be trained: {reason}"))
    return faults
