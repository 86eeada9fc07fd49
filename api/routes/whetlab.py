"""Whetlab's protocol of 2014, as its Python, Lua and MATLAB clients speak it: see docs/whetlab.md.

Every study is an experiment here, so a script that was written for Whetlab tunes on this server unchanged. A viewer's
token reads, an admin's does the rest.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api.routes.base import Hpo, Who
from api.whetlab import PAGE, Alpha, asked_id, needs, number_of, page_of

router = APIRouter(route_class=Alpha, redirect_slashes=False)


@router.get("/api/alpha/experiments", **needs("viewer"))
def list_experiments(request: Request, hpo: Hpo) -> Response:
    page = page_of(request, size=PAGE)
    wanted = asked_id(request, "id")
    count, items = hpo.whetlab.experiments(offset=page.offset, limit=page.size or PAGE, experiment=wanted)
    return page.document(request, count, items)


@router.post("/api/alpha/experiments", **needs("admin", body=True))
def create_experiment(request: Request, hpo: Hpo) -> Response:
    return _made(hpo.whetlab.create_experiment(request.state.body))


@router.get("/api/alpha/experiments/{experiment}", **needs("viewer"))
def get_experiment(experiment: str, hpo: Hpo) -> Response:
    return JSONResponse(hpo.whetlab.experiment(number_of(experiment, "experiment")))


@router.delete("/api/alpha/experiments/{experiment}", **needs("admin"))
def delete_experiment(experiment: str, hpo: Hpo) -> Response:
    hpo.whetlab.delete_experiment(number_of(experiment, "experiment"))
    return _gone()


@router.post("/api/alpha/experiments/{experiment}/suggest", **needs("admin"))
def suggest(experiment: str, hpo: Hpo) -> Response:
    return _made(hpo.whetlab.suggest(number_of(experiment, "experiment")))


@router.get("/api/alpha/settings", **needs("viewer"))
def list_settings(request: Request, hpo: Hpo) -> Response:
    page = page_of(request, size=None)
    found = hpo.whetlab.settings(asked_id(request, "experiment", needed=True) or 0)
    size = page.size or len(found)
    return page.document(request, len(found), found[page.offset : page.offset + size])


@router.post("/api/alpha/settings", **needs("admin", body=True))
def add_setting(request: Request, hpo: Hpo) -> Response:
    return _made(hpo.whetlab.add_setting(request.state.body))


@router.get("/api/alpha/results", **needs("viewer"))
def list_results(request: Request, hpo: Hpo) -> Response:
    page = page_of(request, size=None)
    experiment = asked_id(request, "experiment", needed=True) or 0
    count, items = hpo.whetlab.results(experiment, offset=page.offset, limit=page.size)
    return page.document(request, count, items)


@router.post("/api/alpha/results", **needs("admin", body=True))
def add_result(request: Request, hpo: Hpo) -> Response:
    return _made(hpo.whetlab.add_result(request.state.body))


@router.get("/api/alpha/results/{result}", **needs("viewer"))
def get_result(result: str, hpo: Hpo) -> Response:
    return JSONResponse(hpo.whetlab.result(number_of(result, "result")))


@router.patch("/api/alpha/results/{result}", **needs("admin", body=True))
@router.put("/api/alpha/results/{result}", **needs("admin", body=True))
def write_result(request: Request, result: str, hpo: Hpo) -> Response:
    return JSONResponse(hpo.whetlab.write_result(number_of(result, "result"), request.state.body))


@router.delete("/api/alpha/results/{result}", **needs("admin"))
def delete_result(result: str, hpo: Hpo) -> Response:
    hpo.whetlab.delete_result(number_of(result, "result"))
    return _gone()


@router.get("/api/alpha/variables", **needs("viewer"))
def list_variables(request: Request, hpo: Hpo) -> Response:
    page = page_of(request, size=None)
    found = hpo.whetlab.variables(asked_id(request, "experiment"), asked_id(request, "result"))
    size = page.size or len(found)
    return page.document(request, len(found), found[page.offset : page.offset + size])


@router.get("/api/users", **needs("viewer"))
def list_users(request: Request, who: Who) -> Response:
    """Whoever asks: this server knows tokens, not users."""
    page = page_of(request, size=None)
    return page.document(request, 1, [{"id": 1, "username": who.name, "role": who.role}][page.offset :])


def _made(document: dict[str, Any]) -> Response:
    return JSONResponse(document, 201)


def _gone() -> Response:
    """An answer without a body. The Python client searches the Content-Type of this one too."""
    return Response(status_code=204, media_type="application/json")
