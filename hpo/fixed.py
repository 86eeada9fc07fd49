"""Parameters fixed for the rest of a study: read as people write points, kept flat.

A change names what it fixes, nested, and releases what it names with null; what it does not name stays as it is. The
invariant: what is fixed is a partial point of the study's space, in which a tied group has one value for all its labels
or none at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpo.errors import Fault
from hpo.protocol import Value
from hpo.space import Flat, SearchSpace, join

Changes = dict[str, Value | None]
"""By flat name: the value from now on, or None where the sampler chooses again."""


def read(data: object, space: SearchSpace, at: str = "fixed") -> tuple[Changes, list[Fault]]:
    """Read what a change fixes and releases, with every fault; paths begin with `at`.

    ``{"eta": {"conv1": 0.01, "fc": null}, "mu": 0.9}`` fixes two and releases one. One label of a tied group speaks
    for all of them, and so does the group's name. Null itself releases all.
    """
    if data is None:
        return dict.fromkeys(space.names), []
    if not isinstance(data, Mapping):
        return {}, space.read(data, at=at)[1]
    wanted: dict[Any, Any] = dict(data)
    released: set[str] = set()
    for parameter in space.parameters:
        given = data.get(parameter.name, ...)
        if given is None:
            del wanted[parameter.name]
            released.update(parameter.flat_names)
        elif isinstance(given, Mapping) and parameter.labels:
            nulls = [key for key, value in given.items() if value is None and key in parameter.keys]
            wanted[parameter.name] = {key: value for key, value in given.items() if key not in nulls}
            released.update(_tied(space, (name for key in nulls for name in parameter.keys[key])))
    values, faults = space.read(wanted, at=at, partial=True)
    for parameter in space.parameters:
        if any(name in released and name in values for name in parameter.flat_names):
            faults.append(Fault(join(at, parameter.name), "fixes and releases components that are tied to each other"))
    return {**dict.fromkeys(released), **values}, faults


def _tied(space: SearchSpace, names: Iterable[str]) -> set[str]:
    """These components, and all that share a value with one of them."""
    heads = {space.heads[name] for name in names}
    return {name for name, head in space.heads.items() if head in heads}


def merged(space: SearchSpace, current: Mapping[str, Any], changes: Mapping[str, Value | None]) -> Flat:
    """What is fixed after a change, in the order of the space. `current` is as it was stored."""
    after = {**space.cast(current), **changes}
    return {name: value for name in space.names if (value := after.get(name)) is not None}


def replacing(current: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The change that leaves exactly `wanted` fixed where `current` was, both nested."""
    change = dict(wanted)
    for name, value in current.items():
        given = wanted.get(name)
        if given is None:
            change[name] = None
        elif isinstance(value, Mapping) and isinstance(given, Mapping):
            change[name] = {**dict.fromkeys(value), **given}
    return change
