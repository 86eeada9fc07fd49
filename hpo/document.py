"""The edge where documents come in: the pydantic models of a study's document, and their faults in our words.

Nothing here raises on bad input: `tidy` and `read` collect `Fault`s. A fault never repeats more of the input than a
short ASCII rendering (`hpo.space.show`), so that a list of faults is always printable and encodable, whatever came in.
Numbers are strict: a boolean or a string is no number, NaN and infinities are refused, as are integers beyond 2^53.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from hpo.errors import Fault
from hpo.space import MAX_INTEGER, join, show, yaml_hint

MAX_DEPTH = 32
MAX_NODES = 200_000
BIGGEST = 1e32
"""TPE fails on larger numbers."""

Number = Annotated[float, Field(ge=-BIGGEST, le=BIGGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000)]
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""A parameter's name."""
MAX_NAME = 500
AnyName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME)]
"""Of studies and parameters that came by Whetlab's protocol; REST and pages give stricter names."""
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]


class Form(BaseModel):
    """Base of the edge models: strict about types and unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BudgetForm(Form):
    trials: Count | None = None
    hours: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] | None = None
    target: Number | None = None


class StudyForm(Form):
    """A whole study's document. `sampler`, `pruner` and the entries of `space` are read by their own forms."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-](?:[A-Za-z0-9._ -]{0,98}[A-Za-z0-9._-])?$")]
    description: Annotated[str, StringConstraints(max_length=2_000)] = ""
    notes: Annotated[str, StringConstraints(max_length=20_000)] = ""
    workload: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: Any = "tpe"
    pruner: Any = "none"
    space: Annotated[list[Any], Field(min_length=1, max_length=256)]
    settings: dict[str, Any] = Field(default_factory=dict)
    budget: BudgetForm = BudgetForm()
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    points: Annotated[list[Any], Field(max_length=10_000)] = Field(default_factory=list)
    fixed: dict[str, Any] = Field(default_factory=dict)
    seed_from: Any = None
    """A study's id or name, {study, top}, or a list of these; `hpo.spec` reads it."""


class StoredForm(StudyForm):
    """A study's document as our table has it: one that came by Whetlab's protocol has names of any text."""

    name: AnyName
    description: Annotated[str, StringConstraints(max_length=20_000)] = ""


class SeedForm(Form):
    """A study whose trials another one begins with."""

    study: Annotated[int, Field(ge=0, lt=2**31)] | AnyName
    top: Annotated[int, Field(ge=1, le=1000)] = 10


class ChangeForm(Form):
    state: Literal["running", "paused", "stopped"] | None = None
    budget: BudgetForm | None = None
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    notes: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    fixed: dict[str, Any] | None = None
    """What it names is fixed from now on, what it names with null is released; null itself releases all."""


class TrialForm(Form):
    params: dict[str, Any]
    value: Number | None = None
    outcome: Literal["complete", "infeasible", "failed"] | None = None
    reason: Annotated[str, StringConstraints(max_length=20_000)] = ""


class _Vector(Form):
    name: AnyName
    """`hpo.parameters` holds it to `NAME` where names are strict."""
    labels: Annotated[list[Label], Field(min_length=1, max_length=256)] | None = None
    tied: Any = False
    """true, false, or {group: [labels]}; `hpo.spec` reads it."""


class FloatForm(_Vector):
    type: Literal["float"]
    low: Number
    high: Number
    log: bool = False
    step: Annotated[float, Field(gt=0, le=BIGGEST, allow_inf_nan=False)] | None = None


class IntegerForm(_Vector):
    type: Literal["integer"]
    low: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
    high: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
    log: bool = False
    step: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None


class CategoricalForm(_Vector):
    type: Literal["categorical"]
    choices: Annotated[list[Any], Field(min_length=1, max_length=256)]


PARAMETERS: dict[str, type[FloatForm | IntegerForm | CategoricalForm]] = {
    "float": FloatForm,
    "integer": IntegerForm,
    "categorical": CategoricalForm,
}


class TpeOptions(Form):
    n_startup_trials: Natural = 10
    n_ei_candidates: Count = 24
    multivariate: bool = True
    constant_liar: bool = True


class GpOptions(Form):
    n_startup_trials: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    deterministic_objective: bool = False
    max_trials: Annotated[int, Field(ge=10, le=2_000)] = 400
    """Finished trials it looks at, the best and the newest: an ask costs seconds at 1,000."""


class CmaesOptions(Form):
    n_startup_trials: Natural = 1
    popsize: Annotated[int, Field(ge=4, le=10_000)] | None = None
    consider_pruned_trials: bool = False
    use_separable_cma: bool = False
    with_margin: bool = False
    lr_adapt: bool = False


class RandomOptions(Form):
    pass


class QmcOptions(Form):
    qmc_type: Literal["sobol", "halton"] = "sobol"
    scramble: bool = True


class AutoOptions(Form):
    pass


class NoneOptions(Form):
    pass


class MedianOptions(Form):
    n_startup_trials: Natural = 5
    n_warmup_steps: Natural = 0
    interval_steps: Count = 1
    n_min_trials: Count = 1


class HalvingOptions(Form):
    min_resource: Count | Literal["auto"] = "auto"
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 4
    min_early_stopping_rate: Annotated[int, Field(ge=0, le=100)] = 0
    bootstrap_count: Natural = 0


class HyperbandOptions(Form):
    min_resource: Count = 1
    max_resource: Count | Literal["auto"] = "auto"
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3
    bootstrap_count: Natural = 0


SAMPLERS: dict[str, type[Form]] = {
    "tpe": TpeOptions,
    "gp": GpOptions,
    "cmaes": CmaesOptions,
    "random": RandomOptions,
    "qmc": QmcOptions,
    "auto": AutoOptions,
}
PRUNERS: dict[str, type[Form]] = {
    "none": NoneOptions,
    "median": MedianOptions,
    "successive_halving": HalvingOptions,
    "hyperband": HyperbandOptions,
}

M = TypeVar("M", bound=Form)


def in_order(document: Mapping[str, Any]) -> dict[str, Any]:
    """A study's document as people write it, name first: PostgreSQL's JSONB puts keys into an order of its own.

    Takes what is stored, so what this release does not know stands at the end of its part.
    """
    ordered = _in_order(StudyForm, document)
    for part, forms in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if isinstance(chosen := ordered.get(part), Mapping):
            ordered[part] = _in_order(forms.get(str(chosen.get("name")), Form), chosen, first=("name",))
    if isinstance(budget := ordered.get("budget"), Mapping):
        ordered["budget"] = _in_order(BudgetForm, budget)
    if isinstance(space := ordered.get("space"), list):
        ordered["space"] = [
            _in_order(PARAMETERS.get(str(entry.get("type")), Form), entry, ("name", "type"), ("labels", "tied"))
            if isinstance(entry, Mapping)
            else entry
            for entry in space
        ]
    return ordered


def _in_order(
    form: type[Form], part: Mapping[str, Any], first: tuple[str, ...] = (), last: tuple[str, ...] = ()
) -> dict[str, Any]:
    between = [key for key in (*form.model_fields, *part) if key not in last]
    return {key: part[key] for key in dict.fromkeys((*first, *between, *last)) if key in part}


def tidy(document: object, at: str = "") -> tuple[list[Fault], bool]:
    """Find what no field may hold: text that Postgres refuses, numbers that are not finite, things that are not JSON.

    Returns:
        the faults, and whether the rest of the document can be read at all (it is not too deep and not too large).
    """
    faults: list[Fault] = []
    stack: list[tuple[object, str, int]] = [(document, at, 0)]
    nodes = 0
    while stack:
        value, here, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES:
            return [*faults, Fault(at, f"has more than {MAX_NODES} values")], False
        if depth > MAX_DEPTH:
            return [*faults, Fault("", f"is nested deeper than {MAX_DEPTH} levels")], False
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):
                    faults.append(Fault(join(here, key), "every key must be text"))
                elif problem := _text(key):
                    faults.append(Fault(join(here, key), f"this key {problem}"))
                stack.append((inner, join(here, key), depth + 1))
        elif isinstance(value, list | tuple):
            stack.extend((inner, f"{here}[{place}]", depth + 1) for place, inner in enumerate(value))
        elif problem := _leaf(value):
            faults.append(Fault(here, problem))
    return faults, True


def _text(text: str) -> str:
    if "\0" in text:
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character"
    return ""


def _leaf(value: object) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return "" if abs(value) <= MAX_INTEGER else "integers beyond 2^53 lose digits: use a smaller one"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "must be a finite number"
    return f"a {type(value).__name__} is not JSON: write it as text, in quotes"


def suggest_name(given: object, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: what was perhaps meant, and what is known."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) and len(given) <= 100 else []
    listing = ", ".join(known)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}known: {listing}" if known else "none is known"


def read(model: type[M], data: object, at: str = "") -> tuple[M | None, list[Fault]]:
    """Validate `data`; on faults the model is None. Paths begin with `at`."""
    if not isinstance(data, Mapping):
        return None, [Fault(at, f"must be an object, not {show(data)}")]
    try:
        return model.model_validate(_readable(data)), []
    except ValidationError as error:
        said: dict[str, list[str]] = {}
        for item in error.errors(include_url=False, include_context=True):
            fault = _fault(model, item, at)
            said.setdefault(fault.at, []).append(fault.fault)
        # The arms of a union each say their own: "must be an integer, not 'x'; or must be 'auto', not 'x'".
        return None, [Fault(path, "; or ".join(dict.fromkeys(words))) for path, words in said.items()]


def _readable(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Leave out keys that `tidy` has named already: on one of them pydantic gives up the whole object."""
    return {
        key: _readable(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if isinstance(key, str) and not _text(key)
    }


def read_named(
    registry: Mapping[str, type[Form]], data: object, at: str, what: str
) -> tuple[str, Form | None, list[Fault]]:
    """Read ``{name: tpe, ...options}`` or a plain ``tpe`` by the form that the name picks."""
    given: Mapping[Any, Any] = data if isinstance(data, Mapping) else {"name": data}
    if "name" not in given:
        return "", None, [Fault(join(at, "name"), f"is missing; known {what}s: {', '.join(registry)}")]
    name = given["name"]
    if not isinstance(name, str) or name not in registry:
        where = join(at, "name") if isinstance(data, Mapping) else at
        return "", None, [Fault(where, f"there is no {what} {show(name)}; {suggest_name(name, registry)}")]
    options, faults = read(registry[name], {key: value for key, value in given.items() if key != "name"}, at)
    return name, options, faults


_WORDS = {
    "missing": "is missing",
    "finite_number": "must be a finite number",
    "int_type": "must be an integer, not {shown}{hint}",
    "int_from_float": "must be an integer, not {shown}",
    "float_type": "must be a number, not {shown}{hint}",
    "bool_type": "must be true or false, not {shown}",
    "string_type": "must be text, not {shown}",
    "string_unicode": "must be text without broken characters",
    "list_type": "must be a list, not {shown}",
    "dict_type": "must be an object, not {shown}",
    "model_type": "must be an object, not {shown}",
    "model_attributes_type": "must be an object, not {shown}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than": "must be above {gt}, not {shown}",
    "greater_than_equal": "must be at least {ge}, not {shown}",
    "less_than": "must be below {lt}, not {shown}",
    "less_than_equal": "must be at most {le}, not {shown}",
    "literal_error": "must be {expected}, not {shown}",
}
_PATTERNS = {
    "name": "must be 1-100 of A-Z a-z 0-9 . _ - and spaces, not at the ends",
    "label": "must be 1-64 of A-Z a-z 0-9 _ . -, not beginning with . or -",
}


def _fault(model: type[Form], item: ErrorDetails, at: str) -> Fault:
    """Put one of pydantic's errors into our words, without the input and without its names for the arms of a union."""
    path, place, kind, given = at, item["loc"], item["type"], item["input"]
    for depth, step in enumerate(place):
        if depth == 0 or isinstance(step, int) or place[0] == "budget":  # other names are pydantic's for a union's arms
            path = join(path, step)
    if kind == "extra_forbidden":
        form = BudgetForm if len(place) > 1 and place[0] == "budget" else model
        return Fault(path, f"is not known here; {suggest_name(place[-1], form.model_fields)}")
    if kind == "string_pattern_mismatch":
        return Fault(path, f"{_PATTERNS['label' if place[0] == 'labels' else 'name']}; this is {show(given)}")
    sentence = _WORDS.get(kind, "is not valid: {shown}")
    context = {key: show(value) if key != "expected" else value for key, value in item.get("ctx", {}).items()}
    return Fault(path, sentence.format(shown=show(given), hint=yaml_hint(given), **context))
