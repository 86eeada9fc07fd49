"""How two search spaces lie to each other: whether all points of one are points of the other, and what they share.

Spaces are compared by flat name, type and range; scales do not matter, and a tied group counts as its labels. Where
`why_not_nested` has no reason to give, every point of the source is a point of the target as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from hpo.protocol import Value
from hpo.space import Flat, Parameter, SearchSpace, same


def why_not_nested(source: SearchSpace, target: SearchSpace) -> str:
    """Say why not every point of `source` is a point of `target`; empty where each is."""
    theirs, ours = by_flat_name(source), by_flat_name(target)
    for name in ours:
        if name not in theirs:
            return f"{name} is not searched there"
    for name, parameter in theirs.items():
        if name not in ours:
            return f"{name} is not searched here"
        if not _within(parameter, ours[name]):
            return f"{name} has values there that it cannot have here"
    for name, head in target.heads.items():
        if source.heads[name] != source.heads[head]:
            return f"{name} and {head} are tied here, and not there"
    return ""


def by_flat_name(space: SearchSpace) -> dict[str, Parameter]:
    return {name: parameter for parameter in space.parameters for name in parameter.flat_names}


def _within(source: Parameter, target: Parameter) -> bool:
    if source.type != target.type:
        return False
    if source.type == "categorical":
        return all(any(same(choice, other) for other in target.choices) for choice in source.choices)
    try:
        target.read(source.low)
        target.read(source.high)
    except ValueError:
        return False
    fine, coarse = _step(target), _step(source)
    if fine is None or source.low == source.high:
        return True
    return coarse is not None and coarse % fine == 0


def _step(parameter: Parameter) -> Decimal | None:
    if parameter.step is not None:
        return Decimal(repr(parameter.step))
    return Decimal(1) if parameter.type == "integer" else None


def shared_names(source: SearchSpace, target: SearchSpace) -> list[str]:
    """Parameters of the target about which a point of the source says something."""
    theirs = {parameter.name: parameter for parameter in source.parameters}
    return [
        parameter.name
        for parameter in target.parameters
        if (other := theirs.get(parameter.name)) is not None
        and (not other.labels or set(other.labels) & set(parameter.labels))
    ]


def shared(point: Mapping[str, Any], target: SearchSpace) -> Flat:
    """What a nested point of another space says about this one, as a partial point.

    One value speaks for all labels of a vector. What this space cannot hold is left out, and so is a tied group whose
    labels differ.
    """
    found: Flat = {}
    for parameter in target.parameters:
        given = point.get(parameter.name)
        values: dict[str, Value] = {}
        for label, name in zip(parameter.labels or ("",), parameter.flat_names, strict=True):
            value = given.get(label) if isinstance(given, Mapping) and parameter.labels else given
            try:
                values[name] = parameter.read(value)
            except ValueError:  # out of range, of another type, or not given at all
                continue
        for head in dict.fromkeys(parameter.heads[name] for name in values):
            mates = [name for name, other in parameter.heads.items() if other == head]
            told = {values[name] for name in mates if name in values}
            if len(told) == 1:
                found.update(dict.fromkeys(mates, told.pop()))
    return found
