"""Studies: launch, list, change, delete, and what has come of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from api import openapi
from api.routes.base import Cursor, Document, Hpo, Limit, OnceOnly, StudyId, Waits, needs
from api.routes.base import router as api_router
from hpo import export as exporting
from hpo import spec
from hpo.document import MAX_NAME
from hpo.errors import Fault, Invalid
from hpo.protocol import Wire
from hpo.views import Page, ProgressPoint, StudyState, StudyView, TrialView

router: APIRouter = api_router(tags=["studies"])

Format = Literal["json", "csv", "yaml"]


class Preset(Wire):
    """A study ready to launch: `POST /studies` with ``{"preset": name}``."""

    name: str
    document: dict[str, Any]


@router.get("/presets", **needs("viewer"))
async def list_presets(request: Request) -> list[Preset]:
    """The studies that this server has ready to launch, with their documents."""
    return [Preset(name=name, document=document) for name, document in sorted(request.app.state.presets.items())]


@router.post("/studies", status_code=201, **needs("admin", 400, 409, 413, 415, body=openapi.STUDY_BODY))
def launch(request: Request, response: Response, hpo: Hpo, sent: Document, once: OnceOnly) -> StudyView:
    """Launch a study: a whole document, or a preset by name with overrides."""
    presets = request.app.state.presets
    document = sent.checked_by(lambda given: spec.parse(from_preset(given, presets), hpo.workloads))
    study = hpo.create_study(from_preset(document, presets), once)
    response.headers["Location"] = f"/api/v1/studies/{study.study}"
    return study


@router.get("/studies", **needs("viewer"))
def list_studies(
    hpo: Hpo,
    state: StudyState | None = None,
    name: Annotated[
        str | None,
        Query(
            max_length=MAX_NAME, description="Only studies whose name contains this, in any case; an equal one first."
        ),
    ] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[StudyView]:
    """Studies, the newest first."""
    return hpo.list_studies(state=state, name=name, cursor=cursor, limit=limit)


@router.get("/studies/{study}", **needs("viewer", 404))
def get_study(study: StudyId, hpo: Hpo) -> StudyView:
    """One study: its state, counts, budget and best trial."""
    return hpo.get_study(study)


@router.patch("/studies/{study}", **needs("admin", 400, 404, 409, 413, 415, body=openapi.CHANGE_BODY))
def change_study(study: StudyId, hpo: Hpo, sent: Document) -> StudyView:
    """Pause, resume or stop a study, or change its budget, concurrency, notes or fixed parameters, while it runs."""

    def judge(document: object) -> None:
        spec.parse_change(document, spec.load(hpo.get_study(study).spec).space)

    return hpo.patch_study(study, sent.checked_by(judge))


@router.delete("/studies/{study}", status_code=204, **needs("admin", 404, 409))
def delete_study(study: StudyId, hpo: Hpo) -> None:
    """Delete a study with all its trials."""
    hpo.delete_study(study)


@router.get("/studies/{study}/best", **needs("viewer", 404))
def best(
    study: StudyId, hpo: Hpo, top: Annotated[int, Query(ge=1, le=1000, description="How many.")] = 10
) -> list[TrialView]:
    """The best complete trials, the best first."""
    return hpo.best(study, top)


@router.get("/studies/{study}/progress", **needs("viewer", 404))
def progress(study: StudyId, hpo: Hpo) -> list[ProgressPoint]:
    """Finished trials in order of finishing, with the best value so far."""
    return hpo.progress(study)


@router.get(
    "/studies/{study}/export",
    response_class=Response,
    **needs("viewer", 404, answers={"application/json": {}, "text/csv": {}, "application/yaml": {}}),
)
async def export(
    study: StudyId,
    hpo: Hpo,
    waits: Waits,
    format: Annotated[Format, Query(description="What to write.")] = "json",
) -> Response:
    """The whole study as a file: its document, and every trial with its attempts (CSV: a row a trial)."""

    def write() -> str:
        return exporting.WRITERS[format](hpo.export(study))

    kinds = {"json": "application/json", "csv": "text/csv; charset=utf-8", "yaml": "application/yaml"}
    name = f'attachment; filename="study-{study}.{format}"'
    return Response(await waits.slowly(write), media_type=kinds[format], headers={"Content-Disposition": name})


def from_preset(document: dict[str, Any], presets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The document to launch: itself, or the preset that it names with its other fields merged in.

    Raises:
        Invalid: there is no such preset; the fault names those that are there.
    """
    if "preset" not in document:
        return document
    name = document["preset"]
    if not isinstance(name, str) or name not in presets:
        known = ", ".join(sorted(presets)) or "none"
        raise Invalid([Fault("preset", f"there is no such preset; this server has: {known}")], "the study")
    return merge(presets[name], {key: value for key, value in document.items() if key != "preset"})


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: objects merge deep, everything else replaces.

    >>> merge({"budget": {"trials": 8, "hours": 1}, "points": [1]}, {"budget": {"trials": 2}, "points": []})
    {'budget': {'trials': 2, 'hours': 1}, 'points': []}
    """
    merged = deepcopy(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else deepcopy(value)
    return merged
