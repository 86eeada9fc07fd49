"""The description at /openapi.json: what FastAPI derives, plus roles, the token scheme and the documents' own schemas.

The bodies of launches, changes and points are parsed by `hpo.spec`, which names all faults at once; their schemas are
added here by hand, from the very forms that parser reads with.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from hpo.document import ChangeForm, StudyForm, TrialForm
from hpo.protocol import Wire

DESCRIPTION = """
Send a token as `Authorization: Bearer TOKEN`; `whetstone token create` makes one. Each operation names in `x-role` the
role it needs: `viewer` reads, `worker` also claims, reports and tells, `admin` does everything.

Every failure has one shape: `{"error": {"code", "message", "details": [{"at", "fault"}]}}`. A POST that creates takes
an `Idempotency-Key`, kept 24 h per token and address.
""".strip()
TEMPLATE = "#/components/schemas/{model}"
ERROR_SCHEMA = {"$ref": TEMPLATE.format(model="Error")}


class ErrorDetail(Wire):
    at: str
    fault: str


class ErrorBody(Wire):
    code: str
    message: str
    details: list[ErrorDetail]


class Error(Wire):
    """Every failure, whatever the route."""

    error: ErrorBody


STUDY_EXAMPLE: dict[str, Any] = {
    "name": "branin",
    "workload": "external",
    "direction": "minimize",
    "sampler": {"name": "tpe"},
    "space": [
        {"name": "x", "type": "float", "low": -5.0, "high": 10.0},
        {"name": "y", "type": "float", "low": 0.0, "high": 15.0},
    ],
    "budget": {"trials": 50},
}
PRESET_EXAMPLE: dict[str, Any] = {"preset": "koch2015", "name": "koch2015-night", "budget": {"trials": 40}}
CHANGE_EXAMPLE: dict[str, Any] = {"state": "paused", "budget": {"trials": 80}, "notes": "waiting for the second GPU"}
POINT_EXAMPLE: dict[str, Any] = {"params": {"x": 1.5, "y": 2.0}}
RECORD_EXAMPLE: dict[str, Any] = {"params": {"x": 1.5, "y": 2.0}, "value": 4.1}

STUDY_BODY: dict[str, Any] = {
    "schema": {
        "anyOf": [
            {"$ref": TEMPLATE.format(model="StudyForm")},
            {
                "type": "object",
                "title": "FromPreset",
                "description": "A preset by name, with overrides: objects merge deep, lists replace.",
                "required": ["preset"],
                "properties": {"preset": {"type": "string"}},
                "additionalProperties": True,
            },
        ]
    },
    "examples": {"whole": {"value": STUDY_EXAMPLE}, "preset": {"value": PRESET_EXAMPLE}},
}
CHANGE_BODY: dict[str, Any] = {
    "schema": {"$ref": TEMPLATE.format(model="ChangeForm")},
    "examples": {"pause": {"value": CHANGE_EXAMPLE}},
}
TRIAL_BODY: dict[str, Any] = {
    "schema": {"$ref": TEMPLATE.format(model="TrialForm")},
    "examples": {"queue": {"value": POINT_EXAMPLE}, "record": {"value": RECORD_EXAMPLE}},
}


def install(app: FastAPI) -> None:
    """Serve the completed description. It is made once, at the first request."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _complete(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=DESCRIPTION, routes=app.routes
    )
    components = made.setdefault("components", {})
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    _, forms = models_json_schema(
        [(form, "validation") for form in (StudyForm, ChangeForm, TrialForm, Error)], ref_template=TEMPLATE
    )
    components.setdefault("schemas", {}).update(forms.get("$defs", {}))
    for operations in made["paths"].values():
        for operation in operations.values():
            if role := operation.get("x-role"):
                operation["description"] = f"{operation.get('description', '')}\n\nRole: {role}.".strip()
    return made
