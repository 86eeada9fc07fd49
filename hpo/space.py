"""A search space: named parameters, scalar or by label, and the points in it.

A point has two forms. People write it nested, ``{"eta": {"conv1": 0.01, ...}, "batch_pairs": 128}``; Optuna stores it
flat, ``{"eta[conv1]": 0.01, ...}``. `SearchSpace.flatten` and `SearchSpace.nest` go from one to the other, and the
invariant is that a flat point holds one checked value for every flat name, integers as int, floats as float, choices
as they were declared. A tied group is one dimension to the sampler, named after its first label (`reduced`), and is
stored expanded, one value per label (`expand`), so that a tied point is a valid point of the untied space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from hpo.errors import Fault, Invalid
from hpo.protocol import Point, Value

Flat = dict[str, Value]
"""A point by flat name: ``{"eta[conv1]": 0.01, "batch_pairs": 128}``."""

MAX_INTEGER = 2**53
"""Optuna stores doubles: integers beyond this lose digits."""


def show(value: object) -> str:
    """Return a short, printable, ASCII rendering of anything that came from outside, never more than 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) <= MAX_INTEGER else "an integer beyond 2^53"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        shown = ascii(value[:61])
        return shown if len(shown) <= 60 else ascii(value[:16])[:40] + "..."
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else "a value"


def same(first: object, second: object) -> bool:
    """Tell whether two values are one in JSON: ``true`` is not ``1``, but ``1`` and ``1.0`` are the same number."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second


@dataclass(frozen=True)
class Group:
    """Labels that share one value. `name` is empty where all labels of a vector are tied."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """One entry of a search space. Made by `hpo.spec`, which has checked it; `labels` is empty for a scalar."""

    name: str
    type: Literal["float", "integer", "categorical"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()
    labels: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()

    @cached_property
    def distribution(self) -> BaseDistribution:
        """Optuna's distribution of each of its components."""
        if self.type == "float":
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)
        if self.type == "integer":
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return CategoricalDistribution(self.choices)

    def flat_name(self, label: str) -> str:
        return f"{self.name}[{label}]"

    @cached_property
    def flat_names(self) -> tuple[str, ...]:
        """Optuna's names of its components, in declared order."""
        return tuple(self.flat_name(label) for label in self.labels) if self.labels else (self.name,)

    @cached_property
    def heads(self) -> dict[str, str]:
        """For every flat name the one whose value it takes: itself, or the first label of its tied group."""
        heads = {name: name for name in self.flat_names}
        for group in self.groups:
            heads |= {self.flat_name(label): self.flat_name(group.labels[0]) for label in group.labels}
        return heads

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """What may stand as a key under this vector in a point: a label, or the name of a tied group."""
        keys: dict[str, tuple[str, ...]] = {label: (self.flat_name(label),) for label in self.labels}
        for group in self.groups:
            if group.name:
                keys[group.name] = tuple(self.flat_name(label) for label in group.labels)
        return keys

    def read(self, value: object) -> Value:
        """Return one component's value as it is stored.

        Raises:
            ValueError: it is of the wrong type or out of range; the message is safe to show.
        """
        if self.type == "categorical":
            for choice in self.choices:
                if same(choice, value):
                    return choice
            raise ValueError(f"{show(value)} is not among the choices {_listing(self.choices)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, not {show(value)}{yaml_hint(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        if not self.low <= value <= self.high:
            raise ValueError(f"{show(value)} is outside of {show(self.low)} to {show(self.high)}")
        if self.type == "integer" and value != int(value):
            raise ValueError(f"must be an integer, not {show(value)}")
        if self.step is not None:
            steps = (value - self.low) / self.step
            if abs(steps - round(steps)) > 1e-8:
                raise ValueError(f"{show(value)} is not {show(self.low)} plus a multiple of the step {show(self.step)}")
        return self.cast(value)

    def cast(self, value: Any) -> Value:
        """Return a value computed in doubles as a plain one of the declared type, on the grid and within the bounds.

        Raises:
            ValueError: a categorical value that is not among the choices.
        """
        if self.type == "categorical":
            for choice in self.choices:
                if same(choice, value):
                    return choice
            raise ValueError("not among the choices")
        clipped: float = min(max(value, self.low), self.high)
        if self.type == "integer":
            step = 1 if self.step is None else int(self.step)
            return int(self.low) + step * round((clipped - self.low) / step)
        if self.step is not None:
            return self.grid(round((clipped - self.low) / self.step))
        return float(clipped)

    def grid(self, place: int) -> float:
        """Return value number `place` of a stepped float, in decimal arithmetic: 0.3 and not 0.30000000000000004."""
        return float(Decimal(repr(self.low)) + place * Decimal(repr(self.step)))

    def document(self) -> dict[str, Any]:
        """Return the parameter as a study's document writes it."""
        out: dict[str, Any] = {"name": self.name, "type": self.type}
        if self.type == "categorical":
            out["choices"] = list(self.choices)
        else:
            out |= {"low": self.low, "high": self.high}
            if self.log:
                out["log"] = True
            if self.step is not None:
                out["step"] = self.step
        if self.labels:
            out["labels"] = list(self.labels)
        if len(self.groups) == 1 and not self.groups[0].name:
            out["tied"] = True
        elif self.groups:
            out["tied"] = {group.name: list(group.labels) for group in self.groups}
        return out


def _listing(values: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(show(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def yaml_hint(value: object) -> str:
    """YAML 1.1 reads 1e-4 as text: the commonest way for a number to arrive as a string."""
    if isinstance(value, str) and len(value) <= 40 and "e" in value.lower():
        try:
            float(value)
        except ValueError:
            return ""
        return " (in YAML, write 1e-4 as 1.0e-4)"
    return ""


@dataclass(frozen=True)
class SearchSpace:
    """Parameters in declared order. All its maps keep that order."""

    parameters: tuple[Parameter, ...]

    @cached_property
    def _by_flat_name(self) -> dict[str, Parameter]:
        return {name: parameter for parameter in self.parameters for name in parameter.flat_names}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All flat names."""
        return tuple(self._by_flat_name)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every flat name."""
        return {name: parameter.distribution for name, parameter in self._by_flat_name.items()}

    @cached_property
    def heads(self) -> dict[str, str]:
        """For every flat name the dimension of the reduced space that gives its value."""
        return {name: head for parameter in self.parameters for name, head in parameter.heads.items()}

    @cached_property
    def reduced(self) -> dict[str, BaseDistribution]:
        """What a sampler sees: one dimension per tied group, under the flat name of its first label."""
        return {name: self.distributions[name] for name in self.names if self.heads[name] == name}

    def expand(self, reduced: Mapping[str, Any]) -> Flat:
        """Return the flat point of a reduced one; components not given are left out."""
        return {name: reduced[head] for name, head in self.heads.items() if head in reduced}

    def flatten(self, point: Mapping[str, Any], *, partial: bool = False) -> Flat:
        """Return the flat form of a point.

        A vector may be given as one scalar for all its labels, and a tied one by the names of its groups.

        Args:
            point: nested values, as people write them.
            partial: components may be missing; they are left out of the result.

        Raises:
            Invalid: names every value that is missing, unknown, of the wrong type or out of range.
        """
        flat, faults = self.read(point, partial=partial)
        if faults:
            raise Invalid(faults, what="the point")
        return flat

    def read(self, point: object, *, at: str = "", partial: bool = False) -> tuple[Flat, list[Fault]]:
        """Return what `flatten` does, with the faults (their paths begin with `at`) instead of an exception."""
        if not isinstance(point, Mapping):
            return {}, [Fault(at, f"must be an object of hyperparameters, not {show(point)}")]
        faults: list[Fault] = []
        found: Flat = {}
        known = {parameter.name for parameter in self.parameters}
        for key in point:
            if key not in known:
                faults.append(Fault(join(at, key), f"is not in the space; known: {_listing(sorted(known))}"))
        for parameter in self.parameters:
            here = join(at, parameter.name)
            if parameter.name not in point:
                if not partial:
                    faults.append(Fault(here, "is missing"))
                continue
            self._read_parameter(parameter, point[parameter.name], here, partial, found, faults)
        return {name: found[name] for name in self.names if name in found}, faults

    def _read_parameter(
        self, parameter: Parameter, given: object, at: str, partial: bool, found: Flat, faults: list[Fault]
    ) -> None:
        entries: list[tuple[str, object, tuple[str, ...]]] = []
        if isinstance(given, Mapping):
            if not parameter.labels:
                faults.append(Fault(at, "has no labels: give one value"))
                return
            for key, value in given.items():
                if key in parameter.keys:
                    entries.append((join(at, key), value, parameter.keys[key]))
                else:
                    known = _listing(list(parameter.keys), most=12)
                    faults.append(Fault(join(at, key), f"is not a label of {parameter.name}; known: {known}"))
        else:
            entries.append((at, given, parameter.flat_names))
        refused: set[str] = set()  # components whose value was faulty are not also missing
        for here, value, names in entries:
            heads = {parameter.heads[name] for name in names}
            mates = [name for name, head in parameter.heads.items() if head in heads]
            try:
                component = parameter.read(value)
            except ValueError as error:
                faults.append(Fault(here, str(error)))
                refused.update(mates)
                continue
            if any(name in found and found[name] != component for name in mates):
                faults.append(Fault(here, "is tied to a component that is given another value"))
                continue
            # Within a tied group any one label speaks for all of them only where a point may be partial:
            # a finished point must name what it was evaluated at.
            found.update(dict.fromkeys(mates if partial else names, component))
        if not partial:
            for label in parameter.labels:
                name = parameter.flat_name(label)
                if name not in found and name not in refused:
                    faults.append(Fault(join(at, label), "is missing"))

    def nest(self, flat: Mapping[str, Any]) -> Point:
        """Return the JSON form of a flat point, in declared order; names that are not in the space are left out."""
        point: Point = {}
        for parameter in self.parameters:
            if not parameter.labels:
                if parameter.name in flat:
                    point[parameter.name] = flat[parameter.name]
                continue
            vector = {label: flat[name] for label in parameter.labels if (name := parameter.flat_name(label)) in flat}
            if vector:
                point[parameter.name] = vector
        return point

    def cast(self, flat: Mapping[str, Any]) -> Flat:
        """Return a sampler's values as `Parameter.cast` does each."""
        return {name: self._by_flat_name[name].cast(value) for name, value in flat.items()}

    def random(self, rng: np.random.Generator) -> Flat:
        """Draw one flat point: uniformly, in the logarithm where a parameter says so."""
        return self.expand({name: self._draw(name, rng) for name in self.reduced})

    def _draw(self, name: str, rng: np.random.Generator) -> Value:
        parameter = self._by_flat_name[name]
        low, high = parameter.low, parameter.high
        if parameter.type == "categorical":
            return parameter.choices[int(rng.integers(len(parameter.choices)))]
        if parameter.log:
            half = 0.5 if parameter.type == "integer" else 0.0
            drawn = math.exp(rng.uniform(math.log(low - half), math.log(high + half)))
            return parameter.cast(drawn)
        if parameter.type == "integer" or parameter.step is not None:
            step = parameter.step or 1
            last = round((high - low) / step)
            return parameter.cast(low + step * int(rng.integers(last + 1)))
        return parameter.cast(rng.uniform(low, high))

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """Number of different values of each dimension of the reduced space; None where it is continuous."""
        return {name: self._size(self._by_flat_name[name]) for name in self.reduced}

    @staticmethod
    def _size(parameter: Parameter) -> int | None:
        if parameter.type == "categorical":
            return len(parameter.choices)
        if parameter.low == parameter.high:
            return 1
        if parameter.type == "float" and parameter.step is None:
            return None
        return round((parameter.high - parameter.low) / (parameter.step or 1)) + 1

    @cached_property
    def size(self) -> int | None:
        """Number of different points, or None where a dimension is continuous."""
        sizes = list(self.sizes.values())
        return None if any(size is None for size in sizes) else math.prod(size for size in sizes if size is not None)

    def point(self, index: int) -> Flat:
        """Return the flat point at `index` of the enumeration of a finite space (0 <= index < size)."""
        reduced: Flat = {}
        for name, size in self.sizes.items():
            assert size is not None, "only a finite space can be enumerated"
            index, place = divmod(index, size)
            parameter = self._by_flat_name[name]
            if parameter.type == "categorical":
                reduced[name] = parameter.choices[place]
            else:
                reduced[name] = parameter.cast(parameter.low + place * (parameter.step or 1))
        return self.expand(reduced)

    def key(self, flat: Mapping[str, Any]) -> tuple[Value, ...] | None:
        """Return what makes two flat points the same one, or None where `flat` is not a point of this space."""
        try:
            return tuple(self._by_flat_name[name].cast(flat[name]) for name in self.names)
        except (KeyError, ValueError, TypeError):
            return None


def join(at: str, key: object) -> str:
    """Return the path of `key` under `at`: ``space[2]``, ``points[0].eta.conv1``; strange keys are shown short."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{at}[{key}]"
    plain = (
        isinstance(key, str) and 0 < len(key) <= 64 and all(c.isalnum() or c in "_.-" for c in key) and key.isascii()
    )
    text = str(key) if plain else f"[{show(key)}]"
    return f"{at}.{text}" if at and plain else f"{at}{text}"
