"""Who may see a page, who may press its buttons, and how a stranger gets to the sign-in page and back.

Invariant: after signing in a browser is only ever sent to a path on this server, whatever `next` says.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote, unquote, urlsplit

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from api.auth import principal_of, require
from hpo.tokens import Principal

MAX_NEXT = 1000


class SignInFirst(Exception):
    """Nobody is signed in, or the session is over."""


def reader(request: Request) -> Principal:
    """Whoever is signed in. Raises `SignInFirst`."""
    principal = principal_of(request)
    if principal is None:
        raise SignInFirst
    request.state.principal = principal
    return principal


def actor(principal: Annotated[Principal, Depends(reader)]) -> Principal:
    """An administrator. Raises `SignInFirst` or `Forbidden`."""
    return require(principal, "admin")


Reader = Annotated[Principal, Depends(reader)]
Actor = Annotated[Principal, Depends(actor)]


def local_path(target: str | None) -> str:
    """`target` if it is a plain path on this server, else "/".

    >>> local_path("/studies/3?x=1"), local_path("//evil.example"), local_path("https://evil.example")
    ('/studies/3?x=1', '/', '/')
    """
    if not target or len(target) > MAX_NEXT or not target.startswith("/") or not target.isascii():
        return "/"
    # A browser reads "\" as "/", drops tabs and line ends, and "//host" names another host.
    once = unquote(target)
    if target.startswith("//") or "\\" in once or any(ord(letter) <= 32 or ord(letter) == 127 for letter in target):
        return "/"
    try:
        parts = urlsplit(target)
    except ValueError:
        return "/"
    return "/" if parts.scheme or parts.netloc or parts.path in ("/login", "/logout") else target


def sign_in_path(target: str) -> str:
    path = local_path(target)
    return "/login" if path == "/" else f"/login?next={quote(path, safe='/')}"


async def on_sign_in_first(request: Request, error: Exception) -> Response:
    """Send a stranger to the sign-in page, and htmx too (a redirect it would follow and paste in).

    A browser that comes from a link on another site leaves our SameSite=Strict cookie out, signed in or not. It gets a
    page that loads the same address again, this time from here; a real stranger is then sent to sign in.
    """
    if request.headers.get("hx-request") == "true":
        shown = urlsplit(request.headers.get("hx-current-url", ""))
        here = shown.path + (f"?{shown.query}" if shown.query else "")
        return Response(status_code=401, headers={"HX-Redirect": sign_in_path(here)})
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if request.method != "GET":
        return RedirectResponse("/login", status_code=303)
    from_elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if from_elsewhere and request.headers.get("sec-fetch-mode") == "navigate":
        return HTMLResponse(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0">'
            "<title>Whetstone</title></head><body><p>One moment.</p></body></html>"
        )
    if "application/json" in request.headers.get("accept", ""):
        return Response('{"error": {"code": "unauthenticated"}}', status_code=401, media_type="application/json")
    return RedirectResponse(sign_in_path(here), status_code=303)
