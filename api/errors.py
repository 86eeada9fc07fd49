"""How every failure leaves this server: one shape, one table, and nothing of the caller's input.

``{"error": {"code": ..., "message": ..., "details": [{"at": ..., "fault": ...}]}}``, whatever went wrong and wherever.
The invariant: an answer never repeats what was sent (a NaN, a lone surrogate or a secret in it would come back), and a
fault of our own becomes a bland 500 whose id leads to the traceback in the log.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy import exc as database
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpo.errors import (
    Busy,
    Conflict,
    DatabaseUnavailable,
    Fault,
    Forbidden,
    Invalid,
    KeyReused,
    LeaseLost,
    NameTaken,
    NewerFormat,
    NotFound,
    Told,
    Unauthenticated,
    WhetstoneError,
)

log = logging.getLogger("whetstone.api")

RETRY_AFTER_S = 2
NO_SUCH_TABLE = frozenset({"42P01", "3F000"})
NOT_MIGRATED = "the database has not been migrated: run 'whetstone db upgrade'"
SHOWN_FAULTS = 100
"""A document can be wrong in a million places; the answer names this many and counts the rest."""


class Malformed(WhetstoneError):
    """The body is not JSON."""

    code = "malformed_body"


class WrongContentType(WhetstoneError):
    """The body is declared as something else than JSON."""

    code = "unsupported_media_type"


class TooLarge(HTTPException):
    """The body is larger than this server takes. An HTTPException, so that FastAPI's own body reading lets it pass."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is larger than {limit} bytes, which is the most this server takes")


STATUS: dict[type[WhetstoneError], int] = {
    Malformed: 400,
    NameTaken: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    LeaseLost: 409,
    NewerFormat: 409,
    Told: 409,
    WrongContentType: 415,
    Invalid: 422,
    KeyReused: 422,
    Busy: 503,
    DatabaseUnavailable: 503,
    WhetstoneError: 500,
}
"""The one place where a domain error meets HTTP. A subclass that is not named takes its parent's status."""

ErrorPage = Callable[[Request, int, str, str, Sequence[Fault]], Response]
"""What a person sees instead of JSON: ``(request, status, code, message, faults)``. Set as ``app.state.error_page``."""


def status_of(error: WhetstoneError) -> int:
    """HTTP status of a domain error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def shape(code: str, message: str, faults: Iterable[Fault] = ()) -> dict[str, Any]:
    """The error document. Long lists of faults are cut, and say so."""
    named = list(faults)
    details = [{"at": fault.at, "fault": fault.fault} for fault in named[:SHOWN_FAULTS]]
    if len(named) > SHOWN_FAULTS:
        details.append({"at": "", "fault": f"and {len(named) - SHOWN_FAULTS} more"})
    return {"error": {"code": code, "message": message, "details": details}}


def answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    faults: Sequence[Fault] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    """An error as JSON, or as a page where a person is looking at one."""
    page: ErrorPage | None = getattr(request.app.state, "error_page", None)
    if page is not None and not is_api(request.url.path) and "text/html" in request.headers.get("accept", ""):
        response = page(request, status, code, message, faults)
        response.headers.update(headers or {})
        return response
    headers = {"Cache-Control": "no-store", **(headers or {})}
    if is_whetlab(request.url.path):
        return JSONResponse({"error": flat(message, faults)}, 400 if status == 422 else status, headers)
    return JSONResponse(shape(code, message, faults), status, headers)


def is_whetlab(path: str) -> bool:
    """Whether Whetlab's clients call this address: they read one sentence, and nothing nested."""
    return path.startswith("/api/alpha/") or path in ("/api/alpha", "/api/users")


def flat(message: str, faults: Sequence[Fault]) -> str:
    """An error in one line: the faults, where there are some, or the message."""
    named = [str(fault) for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        named.append(f"and {len(faults) - SHOWN_FAULTS} more")
    return "; ".join(named) or message


def is_api(path: str) -> bool:
    """Whether machines call this address: errors there are always JSON."""
    return path.startswith("/api/") or path in ("/healthz", "/readyz", "/metrics", "/openapi.json")


async def on_domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, WhetstoneError)
    status = status_of(error)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="whetstone"'
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 500:
        return crash(request, error)
    faults = error.faults if isinstance(error, Invalid) else ()
    return answer(request, status, error.code, str(error), faults, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    messages = {
        404: "there is nothing at this address; /openapi.json lists what is served",
        405: "this address does not take this method; the Allow header names those it takes",
    }
    status = error.status_code
    code = codes.get(status, HTTPStatus(status).phrase.lower().replace(" ", "_"))
    # Only 413's text is ours for certain: a library's text could hold what was sent.
    message = error.detail if isinstance(error, TooLarge) else messages.get(status, HTTPStatus(status).phrase)
    return answer(request, status, code, message, headers=dict(error.headers or {}))


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer(request, 422, Invalid.code, str(Invalid(found := faults_of(error.errors()))), found)


async def on_database_error(request: Request, error: Exception) -> Response:
    """A connection that went away is a 503; a value Postgres cannot hold is the caller's; the rest is our bug."""
    if isinstance(error, database.DataError):
        log.warning("a value got as far as Postgres, which refused it: %s", type(error.orig).__name__)
        fault = Fault("", "a value lies outside of what the database can hold")
        return answer(request, 422, Invalid.code, str(Invalid([fault])), [fault])
    if getattr(getattr(error, "orig", None), "pgcode", None) in NO_SUCH_TABLE:
        return await on_domain_error(request, DatabaseUnavailable(NOT_MIGRATED))
    if isinstance(error, database.TimeoutError) or _is_connection_trouble(error):
        log.warning("PostgreSQL does not answer: %s", type(error).__name__)
        gone = DatabaseUnavailable("PostgreSQL does not answer at the moment; try again")
        return await on_domain_error(request, gone)
    return crash(request, error)


def _is_connection_trouble(error: Exception) -> bool:
    if not isinstance(error, database.DBAPIError):
        return False
    return error.connection_invalidated or isinstance(error, database.OperationalError | database.InterfaceError)


def faults_of(errors: Iterable[Any]) -> list[Fault]:
    """Pydantic's errors as our faults: where and what, without the input that caused them."""
    found = []
    for each in errors:
        location = [part for part in each["loc"] if part not in ("body", "query", "path", "header", "cookie")]
        found.append(Fault(at=path_of(location), fault=_sentence(each)))
    return found


def _sentence(error: Any) -> str:
    if error["type"] == "value_error":
        return "this value is not allowed"  # such a message is free text, and may quote the input
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    if error["type"] == "missing":
        return "this field is required"
    return str(error["msg"])


def path_of(parts: Iterable[object]) -> str:
    """A path such as ``space[2].high``. A key that could not be shown safely becomes ``?``."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        key = str(part)
        safe = len(key) <= 64 and key.isascii() and key.isprintable()
        path += ("." if path else "") + (key if safe else "?")
    return path


def crash(request: Request, error: Exception) -> Response:
    """A fault of our own: the traceback goes to the log under an id, the id to the caller, and nothing else."""
    number = secrets.token_hex(6)
    log.error("error %s in %s %s", number, request.method, _route_of(request), exc_info=error)
    message = f"the server failed at this request; its log has the cause under the id {number}"
    try:
        return answer(request, 500, "internal", message)
    except Exception:
        log.exception("error %s: the error page failed as well", number)
        return JSONResponse(shape("internal", message), 500)


def _route_of(request: Request) -> str:
    """The route's pattern, or a path made fit for a log line. The query stays out: it may hold a secret."""
    pattern = getattr(request.scope.get("route"), "path", None)
    return pattern if isinstance(pattern, str) else ascii(request.url.path[:200])


class Guard:
    """Outermost middleware: whatever escapes becomes `crash`'s answer, logged once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return  # it left in the middle of its own request: nobody is there to answer
        except Exception as error:
            if started:  # the server cuts the connection, and the client sees a torn answer
                raise
            await crash(Request(scope, receive), error)(scope, receive, send)


def install(app: FastAPI) -> None:
    """Route every kind of failure of `app` through this module."""
    app.add_exception_handler(WhetstoneError, on_domain_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(database.SQLAlchemyError, on_database_error)
    app.add_middleware(Guard)
