"""Adds the pages to an app: routes, static files, error pages, headers and the cross-site guard."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.csrf import CrossSiteGuard
from api.pages import comparison, launch, login, studies, trials, workers
from api.pages.access import SignInFirst, on_sign_in_first
from api.pages.render import STATIC, Static, page
from api.security import SecurityHeaders
from hpo.errors import Fault

TITLES = {
    403: "Not allowed",
    404: "Not found",
    405: "Not possible here",
    409: "That contradicts what is stored",
    413: "Too large",
    422: "That cannot be taken as it is",
    500: "Something broke",
    503: "The database is away",
}


def error_page(request: Request, status: int, code: str, message: str, faults: Sequence[Fault]) -> Response:
    """What a person sees instead of the JSON error."""
    if status == 401:
        title = "Sign in first"
    elif code == "cross_site":
        title = "This came from another site"
    else:
        title = TITLES.get(status, "That did not work")
    if status == 404 and code == "not_found" and "/openapi.json" in message:
        message = "There is no page at this address."
    return page(
        request, "error.html", status=status, section="", title=title, code=code, message=message, faults=faults
    )


def _refused(request: Request, reason: str) -> Response:
    return errors.answer(request, 403, "cross_site", reason)


def install(app: FastAPI) -> None:
    """Called once, by `create_app`, after the REST routes stand."""
    for module in (launch, studies, trials, comparison, workers, login):
        app.include_router(module.routes)
    app.mount("/static", Static(directory=STATIC), name="static")
    app.add_exception_handler(SignInFirst, on_sign_in_first)
    app.state.error_page = error_page
    app.add_middleware(CrossSiteGuard, answer=_refused)
    app.add_middleware(SecurityHeaders)
