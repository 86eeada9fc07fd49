"""Studies as Whetlab's clients know them: experiments with a flat list of settings, one of which is the outcome.

Every study is an experiment and every experiment a study. A vector is one setting of its size, its values in the order
of its labels (above 24 it is not shown); choices are texts; the outcome is always maximised. All ids follow from
stored rows and never change: an experiment's is the study's, a setting's is made of it and of its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from optuna.exceptions import DuplicatedStudyError

from hpo import studies
from hpo.desk import Desk, Known
from hpo.errors import Fault, Invalid, NameTaken
from hpo.parameters import MAX_DIMENSIONS
from hpo.protocol import Value
from hpo.space import Flat, Parameter, SearchSpace, show
from hpo.spec import EXTERNAL, parse

MAX_SIZE = 24
PLACES = MAX_DIMENSIONS + 1
"""The most settings that an experiment has: every dimension one of its own, and the outcome."""
OURS = "whetlab"
"""Where a study's settings keep what only its experiment has: the outcome's name, and units."""

COUNT = sa.text("""
    SELECT count(*) FROM whetstone.studies s WHERE CAST(:study AS bigint) IS NULL OR s.study_id = :study
""")
PAGE = sa.text("""
    SELECT s.study_id, o.study_name, s.spec->>'description' AS description, s.state, s.created_at
    FROM whetstone.studies s JOIN public.studies o ON o.study_id = s.study_id
    WHERE CAST(:study AS bigint) IS NULL OR s.study_id = :study
    ORDER BY s.study_id LIMIT :limit OFFSET :offset
""")


@dataclass(frozen=True)
class Setting:
    """One setting of an experiment; the outcome is the one without a parameter."""

    id: int
    experiment: int
    name: str
    units: str
    parameter: Parameter | None
    low: float
    high: float

    @property
    def size(self) -> int:
        return 1 if self.parameter is None else len(self.parameter.flat_names)

    @property
    def type(self) -> str:
        if self.parameter is None:
            return "float"
        return "enum" if self.parameter.type == "categorical" else self.parameter.type

    @cached_property
    def options(self) -> dict[str, Value]:
        """The texts of a setting's choices, and what each stands for: true and "true" are two."""
        found: dict[str, Value] = {}
        for place, choice in enumerate(() if self.parameter is None else self.parameter.choices):
            text = choice if isinstance(choice, str) else show(choice)
            found[text if text not in found else f"{text} ({place})"] = choice
        return found

    @cached_property
    def _texts(self) -> dict[tuple[bool, Value], str]:
        return {(isinstance(choice, bool), choice): text for text, choice in self.options.items()}

    def document(self) -> dict[str, Any]:
        bounded = self.type != "enum"
        whole = self.type == "integer"
        return {
            "id": self.id,
            "experiment": self.experiment,
            "name": self.name,
            "type": self.type,
            "min": (int(self.low) if whole else float(self.low)) if bounded else None,
            "max": (int(self.high) if whole else float(self.high)) if bounded else None,
            "size": self.size,
            "units": self.units,
            "scale": "log" if self.parameter is not None and self.parameter.log else "linear",
            "options": list(self.options),
            "isOutput": self.parameter is None,
        }

    def show(self, flat: Mapping[str, Value]) -> Any:
        """This setting's value in a flat point, or None where the point does not have all of it."""
        assert self.parameter is not None, "a point holds no outcome"
        if any(name not in flat for name in self.parameter.flat_names):
            return None
        values: list[Any] = [flat[name] for name in self.parameter.flat_names]
        if self.type == "enum":
            values = [self._texts.get((isinstance(value, bool), value), show(value)) for value in values]
        return values if self.size > 1 else values[0]

    def read(self, value: object) -> Flat:
        """The components of a value that a client sent. Raises ValueError, with a message that is safe to show."""
        assert self.parameter is not None, "an outcome is no component of a point"
        parts = value if isinstance(value, list) else [value]
        if len(parts) != self.size or (self.size > 1 and not isinstance(value, list)):
            raise ValueError("must be one value" if self.size == 1 else f"must be a list of {self.size} values")
        return {name: self._component(part) for name, part in zip(self.parameter.flat_names, parts, strict=True)}

    def _component(self, part: object) -> Value:
        assert self.parameter is not None
        if self.type == "enum":
            if not isinstance(part, str) or part not in self.options:
                raise ValueError(f"{show(part)} is not among the options")
            return self.options[part]
        if isinstance(part, float) and math.isfinite(part):
            # Lua writes 14 digits: a value on a bound may come back from just beyond it.
            near = 1e-12 * max(abs(self.low), abs(self.high))
            if self.low - near <= part <= self.high + near:
                part = min(max(part, self.low), self.high)
        return self.parameter.read(part)


@dataclass(frozen=True)
class Experiment:
    """A study as its settings; `hidden` are vectors too long to be shown."""

    id: int
    sign: float
    space: SearchSpace
    settings: tuple[Setting, ...]
    hidden: tuple[str, ...]

    @property
    def outcome(self) -> Setting:
        return self.settings[-1]

    @cached_property
    def by_name(self) -> dict[str, Setting]:
        return {setting.name: setting for setting in self.settings}

    @cached_property
    def by_id(self) -> dict[int, Setting]:
        return {setting.id: setting for setting in self.settings}


def of(known: Known) -> Experiment:
    """The experiment that a study is."""
    spec = known.spec
    ours = spec.settings.get(OURS) if spec.workload == EXTERNAL else None
    ours = ours if isinstance(ours, Mapping) else {}
    shown = [parameter for parameter in spec.space.parameters if len(parameter.flat_names) <= MAX_SIZE]
    first = known.study * PLACES
    units = ours.get("units")
    settings = []
    for place, parameter in enumerate(shown):
        plain = {"float": "Reals", "integer": "Integers"}.get(parameter.type, "")
        unit = units.get(parameter.name, plain) if isinstance(units, Mapping) else plain
        settings.append(
            Setting(first + place, known.study, parameter.name, str(unit), parameter, parameter.low, parameter.high)
        )
    outcome = ours.get("outcome")
    given = outcome if isinstance(outcome, Mapping) else {}
    taken = {parameter.name for parameter in spec.space.parameters}
    names = (str(given.get("name") or "value"), "outcome", *(f"outcome {number}" for number in range(2, PLACES + 2)))
    settings.append(
        Setting(
            first + len(shown),
            known.study,
            next(name for name in names if name not in taken),
            str(given.get("units", "Reals")),
            None,
            _number(given.get("min"), -100.0),
            _number(given.get("max"), 100.0),
        )
    )
    hidden = tuple(parameter.name for parameter in spec.space.parameters if len(parameter.flat_names) > MAX_SIZE)
    return Experiment(known.study, 1.0 if spec.direction == "maximize" else -1.0, spec.space, tuple(settings), hidden)


def _number(value: object, default: float) -> float:
    """A study that did not come by the protocol may have anything among its settings."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def listing(conn: sa.Connection, *, study: int | None, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """How many experiments there are, and some of them, the oldest first; with `study` only that one."""
    asked = {"study": study, "offset": offset, "limit": limit}
    count: int = conn.execute(COUNT, asked).scalar_one()
    return count, [
        {
            "id": row.study_id,
            "name": row.study_name,
            "description": row.description or "",
            "state": row.state,
            "createdDate": row.created_at.isoformat(),
        }
        for row in conn.execute(PAGE, asked)
    ]


def create(desk: Desk, document: Mapping[str, Any]) -> int:
    """Launch the study of an experiment that was read (`hpo.experiment_form`); return its id.

    Raises:
        Invalid: names every fault that the study's own reader finds.
        NameTaken: a study of that name is there already.
    """
    spec = parse(document, {}, any_names=True)
    try:
        with desk.transaction() as conn:
            return studies.store(desk, conn, spec).study
    except DuplicatedStudyError:
        raise NameTaken("Experiment with this User and Name already exists.") from None


def same_setting(known: Known, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of an experiment that is declared as `wanted` is.

    Raises:
        Invalid: it has none such: settings are given when an experiment is created, and stay.
    """
    there = of(known).by_name.get(str(wanted.get("name")))
    if there is not None:
        document = there.document()
        if all(document[key] == value for key, value in wanted.items() if key in document):
            return document
    why = "an experiment's settings are given when it is created, and stay: create another experiment"
    raise Invalid([Fault("", why)], "the setting")
