"""The launch form: a document in YAML or JSON, and a few fields that lie over it.

A field left empty leaves the document as it is. A refused study comes back with every fault named and nothing typed
lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Form, Query
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.pages.access import Actor
from api.pages.base import Hpo, Number, router
from api.pages.render import page
from api.pages.studies import newlines, numeral
from hpo import yaml_document
from hpo.coordinator import Coordinator
from hpo.document import PRUNERS, SAMPLERS
from hpo.errors import Conflict, Fault, Invalid, NotFound

routes = router()

EXTERNAL: dict[str, Any] = {
    "name": "my-study",
    "description": "An objective of my own, evaluated by a client of the REST API",
    "workload": "external",
    "direction": "maximize",
    "sampler": {"name": "tpe"},
    "pruner": {"name": "none"},
    "space": [
        {"name": "rate", "type": "float", "low": 1e-4, "high": 1.0, "log": True},
        {"name": "width", "type": "integer", "low": 16, "high": 256, "step": 16},
        {"name": "activation", "type": "categorical", "choices": ["relu", "tanh"]},
    ],
    "budget": {"trials": 50},
}
BLANK = {"name": "", "trials": "", "hours": "", "target": "", "sampler": "", "pruner": "", "seed_from": "", "notes": ""}


@routes.get("/studies/new")
def form(request: Request, _: Actor, hpo: Hpo, preset: Annotated[str | None, Query(max_length=100)] = None) -> Response:
    presets = _presets(request)
    chosen = preset if preset is not None else next(iter(_ordered(presets)), "external")
    if chosen not in presets:
        raise NotFound("there is no such preset")
    start = presets[chosen]
    typed = {**BLANK, "name": free_name(hpo, str(start.get("name", chosen))), "document": yaml_document.write(start)}
    return _form(request, presets, chosen, typed)


def _presets(request: Request) -> dict[str, Mapping[str, Any]]:
    """The presets that come with the server, and a start for an objective of one's own."""
    return {**request.app.state.presets, "external": EXTERNAL}


def _ordered(presets: Mapping[str, Any]) -> list[str]:
    """The small ones first: "mini" is what a newcomer can finish."""
    return sorted(presets, key=lambda name: (name != "mini", name == "external", name))


def free_name(hpo: Coordinator, name: str) -> str:
    """`name`, or the first of name-2, name-3, ... that no study has."""
    taken: set[str] = set()
    cursor: str | None = None
    while True:
        found = hpo.list_studies(name=name, cursor=cursor, limit=200)
        taken.update(study.name for study in found.items)
        cursor = found.next
        if cursor is None:
            break
    number = 1
    while (candidate := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return candidate


def _form(
    request: Request,
    presets: Mapping[str, Mapping[str, Any]],
    chosen: str,
    typed: Mapping[str, str],
    faults: Sequence[Fault] = (),
    status: int = 200,
) -> Response:
    return page(
        request,
        "launch.html",
        status=status,
        presets=[(name, presets[name].get("description", "")) for name in _ordered(presets)],
        chosen=chosen,
        typed=typed,
        faults=faults,
        at_fault=_fields(faults),
        samplers=list(SAMPLERS),
        pruners=list(PRUNERS),
    )


def _fields(faults: Sequence[Fault]) -> set[str]:
    """The form's fields that the faults point at."""
    known = {"budget.trials": "trials", "budget.hours": "hours", "budget.target": "target"}
    found = set()
    for fault in faults:
        first = fault.at.partition(".")[0]
        own = known.get(fault.at) or (first if first in ("name", "sampler", "pruner", "notes") else "document")
        own = "seed_from" if first.startswith("seed_from") else own
        found.add(own)
    return found


@routes.post("/studies/new")
def launch(
    request: Request,
    _: Actor,
    hpo: Hpo,
    preset: Annotated[str, Form(max_length=100)] = "",
    text: Annotated[str, Form(alias="document", max_length=1_000_000)] = "",
    name: Annotated[str, Form(max_length=1000)] = "",
    trials: Number = "",
    hours: Number = "",
    target: Number = "",
    sampler: Number = "",
    pruner: Number = "",
    seed_from: Annotated[str, Form(max_length=1000)] = "",
    notes: Annotated[str, Form(max_length=100_000)] = "",
) -> Response:
    typed = {
        "document": text,
        "name": name,
        "trials": trials,
        "hours": hours,
        "target": target,
        "sampler": sampler,
        "pruner": pruner,
        "seed_from": seed_from,
        "notes": notes,
    }
    try:
        made = hpo.create_study(overlay(yaml_document.read(text), typed))
    except Invalid as error:
        return _form(request, _presets(request), preset, typed, error.faults, 422)
    except Conflict as error:
        return _form(request, _presets(request), preset, typed, [Fault("name", str(error))], 409)
    return RedirectResponse(f"/studies/{made.study}", status_code=303)


def overlay(base: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
    """The document with the form's fields over it. A document that is no mapping where it should be stays as it is.

    >>> overlay({"name": "a", "sampler": {"name": "gp"}}, {**BLANK, "name": "b", "sampler": "gp", "trials": "9"})
    {'name': 'b', 'sampler': {'name': 'gp'}, 'budget': {'trials': 9}}
    """
    made = dict(base)
    if typed["name"].strip():
        made["name"] = typed["name"].strip()
    if typed["notes"].strip():
        made["notes"] = newlines(typed["notes"])
    if seed := typed["seed_from"].strip():
        made["seed_from"] = int(seed) if seed.isdecimal() and len(seed) < 10 else seed
    for part in ("sampler", "pruner"):
        given = made.get(part)
        current = given.get("name") if isinstance(given, Mapping) else given
        if typed[part] and typed[part] != current:
            made[part] = {"name": typed[part]}  # the options of another one would not fit
    limits = {key: numeral(typed[key]) for key in ("trials", "hours", "target") if typed[key].strip()}
    budget = made.get("budget")
    if limits and (budget is None or isinstance(budget, Mapping)):
        made["budget"] = {**(budget or {}), **limits}
    return made
