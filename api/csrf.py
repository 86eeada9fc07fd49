"""Refuses state changes that another site made the browser send.

A browser adds our cookie to requests that a stranger's page starts (SameSite=Strict stops most, but not those of a
sibling subdomain or another port). So every unsafe request without a bearer token has to prove that a page
of ours sent it: by `Sec-Fetch-Site: same-origin`, or, where the browser sends no such header (plain HTTP on a host
other than localhost), by an `Origin` equal to the host that was asked. Neither can be set by a page's scripts.

A request with `Authorization: Bearer` is exempt: no browser adds that one by itself (it does add Basic, behind a proxy
that asks for it), and a script of another origin may not (CORS). So are requests under /api without a cookie, which
are nobody's. The invariant: what this lets through on the strength of a cookie was sent by this origin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def refusal(request: Request) -> str | None:
    """Say why this request may not change anything, or None if it may."""
    if request.method in SAFE_METHODS or request.headers.get("authorization", "")[:7].lower() == "bearer ":
        return None
    if request.url.path.startswith("/api/") and "cookie" not in request.headers:
        return None
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return None if site == "same-origin" else "another site sent this request; open Whetstone itself and try again"
    origin = request.headers.get("origin")
    if origin is None:
        return (
            "the request says neither Sec-Fetch-Site nor Origin; send a token in the Authorization header instead of a "
            "cookie, or use a current browser"
        )
    if not _same_host(origin, request.headers.get("host", "")):
        return "another site sent this request; if a proxy stands before Whetstone, let it pass the Host header on"
    return None


def _same_host(origin: str, host: str) -> bool:
    """Whether an Origin names the host that was asked. The scheme may differ: a proxy may end TLS before us."""
    try:
        parts = urlsplit(origin)
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
            return False
        asked = urlsplit(f"{parts.scheme}://{host}")
        default = _DEFAULT_PORTS[parts.scheme]
        return (parts.hostname, parts.port or default) == (asked.hostname, asked.port or default)
    except ValueError:  # a port that is no number, an unclosed bracket
        return False


def json_refusal(request: Request, reason: str) -> Response:
    body = {"error": {"code": "cross_site", "message": reason, "details": []}}
    return Response(json.dumps(body), status_code=403, media_type="application/json")


class CrossSiteGuard:
    """ASGI middleware: answers 403 to unsafe requests that do not come from a page of this origin.

    `answer` shapes the refusal (a page for a browser, JSON for the rest).
    """

    def __init__(self, app: ASGIApp, answer: Callable[[Request, str], Response] = json_refusal) -> None:
        self.app = app
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            reason = refusal(request)
            if reason is not None:
                await self.answer(request, reason)(scope, receive, send)
                return
        await self.app(scope, receive, send)
