"""What all REST routes share: who may come in, what a body may be, and how an answer is documented.

The order is fixed for every route: address, token, role, body. The invariant: a route without a declared role cannot be
made, so none is open by oversight.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Path, Query
from fastapi.routing import APIRoute, APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import auth, limits
from api.openapi import ERROR_SCHEMA
from api.wait import Waiting
from hpo.coordinator import Coordinator
from hpo.errors import Fault, Invalid
from hpo.idempotency import Once
from hpo.protocol import NAME_PATTERN
from hpo.tokens import Principal

INT4 = 2**31 - 1
INT8 = 2**63 - 1

StudyId = Annotated[int, Path(ge=0, le=INT4, description="A study's id.")]
TrialNumber = Annotated[int, Path(ge=0, le=INT4, description="A trial's number within its study.")]
LeaseId = Annotated[int, Path(ge=0, le=INT8, description="A lease's id.")]
Cursor = Annotated[
    str | None, Query(max_length=200, description="`next` of the page before; leave it out for the first page.")
]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items on a page.")]
WorkerId = Annotated[str, Path(pattern=NAME_PATTERN, description="A worker's name.")]


@dataclass(frozen=True)
class Sent:
    """A body that `hpo.spec` is to read, and what is wrong with it already."""

    document: dict[str, Any]
    faults: tuple[Fault, ...]

    def checked_by(self, parse: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The document, if nothing was wrong with it; `parse` then judges the rest where it is used.

        Raises:
            Invalid: naming these faults and those that `parse` adds.
        """
        if not self.faults:
            return self.document
        faults = {fault.at: fault for fault in self.faults}
        try:
            parse(self.document)
        except Invalid as error:
            for fault in error.faults:
                faults.setdefault(fault.at, fault)
        raise Invalid(sorted(faults.values()))


ERRORS: dict[int, str] = {
    400: "The body is not JSON.",
    401: "No token, or one that is not known here.",
    403: "The token's role does not reach this far; the message names the one that does.",
    404: "There is no such thing.",
    409: "What is stored contradicts the request. Nothing was changed.",
    413: "The body is larger than 1 MB.",
    415: "The body is not declared as JSON.",
    422: "The request was refused whole; `details` names every fault and its place.",
    503: "PostgreSQL does not answer; try again after `Retry-After` seconds.",
}


def needs(
    role: auth.Role,
    *errors: int,
    body: dict[str, Any] | None = None,
    answers: dict[str, Any] | None = None,
    more: dict[int | str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route: the role it needs, and the failures it documents beside 401, 403, 422 and 503.

    `body` documents a body that the route reads by itself: an OpenAPI media type (schema and examples). `answers` are
    the media types of a 200 that is no JSON model, `more` further responses.
    """
    extra: dict[str, Any] = {"x-role": role, "security": [{"bearer": []}]}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": body}}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": ERRORS[status], "content": {"application/json": {"schema": ERROR_SCHEMA}}}
        for status in sorted({401, 403, 422, 503, *errors})
    }
    if answers is not None:
        responses[200] = {"description": "The file.", "content": answers}
    return {"openapi_extra": extra, "responses": responses | (more or {})}


class Api(APIRoute):
    """A REST route. See the module's docstring for what it guarantees."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, _in_thread(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        run = super().get_route_handler()
        extra = self.openapi_extra or {}
        assert extra.get("x-role") in auth.RANK, f"the route {self.path} names no role"
        role = cast(auth.Role, extra["x-role"])
        takes_body = self.body_field is not None or "requestBody" in extra

        async def handle(request: Request) -> Response:
            limits.check_address(request)
            request.state.principal = await auth.admit(request, role)
            checked = limits.CheckedRequest(request.scope, request.receive)
            await _check_body(checked, takes_body, own="requestBody" in extra)
            response = await run(checked)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        return handle


def _in_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A plain endpoint as one that is awaited: a thread is then taken once, and not again to shape the answer."""
    if inspect.iscoroutinefunction(endpoint) or inspect.isasyncgenfunction(endpoint):
        return endpoint

    @functools.wraps(endpoint)
    async def call(*args: Any, **named: Any) -> Any:
        return await run_in_threadpool(endpoint, *args, **named)

    return call


async def _check_body(request: limits.CheckedRequest, takes_body: bool, own: bool) -> None:
    body = await request.body()
    if takes_body:
        if not body:
            raise Invalid([Fault("", "this address takes a JSON body")])
        document, faults = await request.checked()
        if not isinstance(document, dict):
            raise Invalid([*faults, Fault("", "the body is to be a JSON object")])
        if faults and (not own or any(not fault.at for fault in faults)):
            raise Invalid(sorted(set(faults)))
    elif body and await request.json() != {}:
        raise Invalid([Fault("", "this address takes no body")])


def router(**options: Any) -> APIRouter:
    """A router whose routes are `Api` routes."""
    return APIRouter(route_class=Api, redirect_slashes=False, **options)


async def coordinator_of(request: Request) -> Coordinator:
    """The coordinator of the app that serves `request`."""
    return cast(Coordinator, request.app.state.coordinator)


async def waiting_of(request: Request) -> Waiting:
    """The app's one LISTEN connection and its slow lane."""
    return cast(Waiting, request.app.state.waiting)


async def _principal(request: Request) -> Principal:
    return cast(Principal, request.state.principal)


async def _document(request: Request) -> Sent:
    assert isinstance(request, limits.CheckedRequest)
    document, faults = await request.checked()
    return Sent(document, tuple(faults))


async def _once(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            pattern=r"^[\x21-\x7e]+$",
            description="The same key and body within 24 h get the same answer; another body gets 422.",
            examples=["5f1b6a0e-launch-1"],
        ),
    ] = None,
) -> Once | None:
    if idempotency_key is None:
        return None
    assert isinstance(request, limits.CheckedRequest)
    document, faults = await request.checked() if await request.body() else (None, [])
    if faults:
        return None  # refused in any case, and by somebody who can name more faults
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return Once(
        owner=request.state.principal.id,
        route=f"{request.method} {request.url.path}",
        key=idempotency_key,
        digest=hashlib.sha256(canonical.encode()).digest(),
    )


Hpo = Annotated[Coordinator, Depends(coordinator_of)]
Waits = Annotated[Waiting, Depends(waiting_of)]
Who = Annotated[Principal, Depends(_principal)]
Document = Annotated[Sent, Depends(_document)]
OnceOnly = Annotated[Once | None, Depends(_once)]
