"""What Whetlab's clients put on the wire, brought into the form that the routes expect, and answers in theirs.

They write methods in small letters, end addresses with a slash or not, and put NaN into JSON; they need a Content-Type
on every answer and an error of one sentence. Invariant: nothing that comes in here, however malformed, makes a 500.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api import auth, limits
from api.errors import Malformed, is_whetlab
from hpo.errors import Fault, Invalid, NotFound

INT4 = 2**31 - 1
PAGE = 100
"""Experiments on a page where the client names no size."""
LONGEST = 400
"""Digits of an integer that is read as one; a longer one is an infinity."""


class WhetlabAddresses:
    """Outermost middleware: methods in capitals, addresses without their last slash, before anybody routes by them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_whetlab(path := scope["path"].rstrip("/")):
            scope = {**scope, "method": scope["method"].upper(), "path": path}
        await self.app(scope, receive, send)


class Alpha(APIRoute):
    """A route of the protocol. The order is that of REST v1: address, token, role, body. Each names its role."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        run = super().get_route_handler()
        extra = self.openapi_extra or {}
        assert extra.get("x-role") in auth.RANK, f"the route {self.path} names no role"
        role = cast(auth.Role, extra["x-role"])

        async def handle(request: Request) -> Response:
            limits.check_address(request)
            request.state.principal = await auth.admit(request, role)
            sent = await request.body()
            request.state.body = read(sent) if extra["x-body"] else {}
            response = await run(request)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        return handle


def needs(role: auth.Role, *, body: bool = False) -> dict[str, Any]:
    """Keyword arguments of a route: who may call it, and whether its body is read. It stays out of /openapi.json."""
    return {"include_in_schema": False, "openapi_extra": {"x-role": role, "x-body": body}}


def read(sent: bytes) -> dict[str, Any]:
    """The JSON object in a body, NaN and infinities included. Nothing, or Lua's empty list, is an empty object.

    Raises:
        Malformed: it is not JSON.
        Invalid: it is something else than an object.
    """
    try:
        document = json.loads(sent.decode("utf-8"), parse_int=_integer) if sent.strip() else {}
    except UnicodeDecodeError as error:
        raise Malformed(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"the body is not JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise Invalid([Fault("", "the body is nested too deep")]) from None
    if document == []:
        return {}
    if not isinstance(document, dict):
        raise Invalid([Fault("", "the body is to be a JSON object")])
    return document


def _integer(digits: str) -> int | float:
    if len(digits) <= LONGEST:
        return int(digits)
    return -math.inf if digits.startswith("-") else math.inf


def number_of(text: str, what: str) -> int:
    """An id in an address. Raises `NotFound` for what is none."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= INT4):
        raise NotFound(f"there is no such {what}")
    return int(text)


def asked_id(request: Request, name: str, *, needed: bool = False) -> int | None:
    """An id in the query. Raises `Invalid` where it is none, or is missing and needed."""
    text = request.query_params.get(name)
    if text is None and not needed:
        return None
    if text is None:
        raise Invalid([Fault(name, f"is missing: add ?{name}=N to the address")], "the query")
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= INT4):
        raise Invalid([Fault(name, "must be an id")], "the query")
    return int(text)


@dataclass(frozen=True)
class Page:
    """Which part of a list is asked for; `size` is None for all of it."""

    number: int
    size: int | None

    @property
    def offset(self) -> int:
        return 0 if self.size is None else (self.number - 1) * self.size

    def document(self, request: Request, count: int, items: list[dict[str, Any]]) -> JSONResponse:
        """The page as the protocol has it.

        Raises:
            NotFound: it lies past the last one. (The first page is always there.)
        """
        last = 1 if self.size is None else max(1, math.ceil(count / self.size))
        if self.number > last:
            raise NotFound("there is no such page")
        links = {
            "next": self._link(request, self.number + 1) if self.number < last else None,
            "previous": self._link(request, self.number - 1) if self.number > 1 else None,
        }
        return JSONResponse({"count": count, **links, "results": items})

    @staticmethod
    def _link(request: Request, number: int) -> str:
        try:
            return str(request.url.include_query_params(page=number))
        except ValueError:  # the Host header is no host
            return f"{request.url.path}?page={number}"


def page_of(request: Request, *, size: int | None) -> Page:
    """The page that a query asks for; without page_size it has `size` items.

    Raises:
        Invalid: page_size is no positive number.
        NotFound: page is none.
    """
    wanted = request.query_params.get("page_size")
    if wanted is not None:
        if not (wanted.isascii() and wanted.isdecimal() and len(wanted) <= 20 and int(wanted) >= 1):
            raise Invalid([Fault("page_size", "must be a whole number of at least 1")], "the query")
        size = min(int(wanted), INT4)
    page = request.query_params.get("page", "1")
    if not (page.isascii() and page.isdecimal() and len(page) <= 9 and int(page) >= 1):
        raise NotFound("there is no such page")
    return Page(int(page), size)
