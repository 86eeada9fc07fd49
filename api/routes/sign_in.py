"""Signing a browser in without typing a token: an admin's program asks for a link that opens once."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from api.auth import auth_of
from api.routes.base import Who, needs
from api.routes.base import router as api_router
from hpo.protocol import Wire

router: APIRouter = api_router(tags=["sign-in"])

LINK_LIFETIME_S = 600


class LoginLink(Wire):
    """`path` (with its query) stands behind the server's address; whoever opens it first becomes an admin's session."""

    path: str
    lifetime_s: int


@router.post("/login-links", status_code=201, **needs("admin"))
def make_login_link(request: Request, who: Who) -> LoginLink:
    """Make a link that signs one browser in as admin, once, within ten minutes; the session ends with your token."""
    return LoginLink(path=auth_of(request).add_link(who, LINK_LIFETIME_S).path, lifetime_s=LINK_LIFETIME_S)
