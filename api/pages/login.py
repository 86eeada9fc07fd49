"""Signing in and out. A secret is exchanged for a session cookie and then dropped from the address.

A wrong, used or expired link and an unknown token get the same plain refusal.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Query
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.auth import COOKIE, auth_of, clear_session, principal_of, set_session
from api.pages.access import local_path
from api.pages.base import router
from api.pages.render import page

routes = router()

SPENT = "This link has been used, or is too old. Restart the server for a new one, or sign in with a token."
UNKNOWN = "This token is not known here, has expired or was revoked."


@routes.get("/login")
def form(
    request: Request,
    once: Annotated[str | None, Query(max_length=512)] = None,
    next: Annotated[str, Query(max_length=2000)] = "/",
) -> Response:
    if once is not None:
        secret = auth_of(request).sign_in_once(once)
        if secret is not None:
            return _enter(request, secret, next)
    if principal_of(request) is not None:  # a second click on the link, in the browser that used it
        return RedirectResponse(local_path(next), status_code=303)
    return _form(request, next, SPENT if once is not None else "")


@routes.post("/login")
def sign_in(
    request: Request,
    token: Annotated[str, Form(max_length=1000)] = "",
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    secret = auth_of(request).sign_in(token.strip())
    return _form(request, next, UNKNOWN) if secret is None else _enter(request, secret, next)


@routes.post("/logout")
def sign_out(request: Request) -> Response:
    auth_of(request).sign_out(request.cookies.get(COOKIE, ""))
    response = RedirectResponse("/login", status_code=303)
    clear_session(request, response)
    return response


def _form(request: Request, next: str, refused: str) -> Response:
    return page(
        request, "login.html", status=401 if refused else 200, section="", next=local_path(next), refused=refused
    )


def _enter(request: Request, secret: str, next: str) -> Response:
    response = RedirectResponse(local_path(next), status_code=303)
    set_session(request, response, secret)
    return response
