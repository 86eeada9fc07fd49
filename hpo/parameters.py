"""The search space as a document declares it: each entry read by the form of its type, every fault named.

What passes here is safe to build distributions of: bounds in order, a log scale above zero, a step that divides the
range, labels, choices and names that differ, and tied groups that put every label into exactly one group. Names are
plain words, except where a client of Whetlab's brought its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from hpo.document import NAME, PARAMETERS, CategoricalForm, FloatForm, IntegerForm, read, suggest_name
from hpo.errors import Fault
from hpo.protocol import Value
from hpo.space import Group, Parameter, SearchSpace, join, same, show

MAX_DIMENSIONS = 256
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def read_space(data: object, *, any_names: bool = False) -> tuple[SearchSpace | None, list[Fault]]:
    """Return the space, or None with what is wrong with it (paths begin with ``space``).

    Args:
        any_names: parameters may have names of any text.
    """
    if not isinstance(data, list | tuple) or len(data) > MAX_DIMENSIONS:
        return None, []  # its form has said so
    faults: list[Fault] = []
    parameters: list[Parameter] = []
    names: dict[str, int] = {}
    for place, entry in enumerate(data):
        at = f"space[{place}]"
        parameter, more = _parameter(entry, at, any_names)
        faults += more
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if isinstance(name, str):
            if name in names:
                faults.append(Fault(f"{at}.name", f"is the name of space[{names[name]}] already"))
            names.setdefault(name, place)
        if parameter is not None:
            parameters.append(parameter)
    if any_names:
        faults += _ambiguities(parameters)
    dimensions = sum(len(parameter.flat_names) for parameter in parameters)
    if dimensions > MAX_DIMENSIONS:
        faults.append(Fault("space", f"has {dimensions} scalar dimensions; at most {MAX_DIMENSIONS} are allowed"))
    return (None if faults or not parameters else SearchSpace(tuple(parameters))), faults


def _parameter(entry: object, at: str, any_names: bool) -> tuple[Parameter | None, list[Fault]]:
    if not isinstance(entry, Mapping):
        return None, [Fault(at, f"must be an object, not {show(entry)}")]
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in PARAMETERS:
        verdict = f"there is no type {show(kind)}; " if "type" in entry else "is missing; "
        return None, [Fault(f"{at}.type", verdict + suggest_name(kind, PARAMETERS))]
    form, faults = read(PARAMETERS[kind], entry, at)
    name = entry.get("name")
    if not any_names and isinstance(name, str) and name and not NAME.fullmatch(name[:65]):
        rule = "must be a letter or _ and then up to 63 of A-Z a-z 0-9 _ . -"
        faults.append(Fault(f"{at}.name", f"{rule}; this is {show(name)}"))
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


def _ambiguities(parameters: Sequence[Parameter]) -> list[Fault]:
    """Find names that Optuna could not tell apart: ``x[1]`` is also the second component of a vector ``x``."""
    owner: dict[str, str] = {}
    faults = []
    for parameter in parameters:
        for name in parameter.flat_names:
            other = owner.setdefault(name, parameter.name)
            if other != parameter.name:
                faults.append(Fault("space", f"{show(parameter.name)} and {show(other)} are stored alike: rename one"))
                break
    return faults


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
