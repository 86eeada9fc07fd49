"""What a request may look like before anybody believes a word of it.

A body holds at most 1 MB, however it is sent, and is JSON that Postgres and every later reader can hold: finite
numbers, integers of 64 bits, text without NUL and lone surrogates, no key twice, 64 levels deep. Faults are named with
their place, all of them at once. The invariant: what `parse` returned without faults can be stored, and printed again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import Malformed, TooLarge, WrongContentType, answer, path_of
from hpo.errors import Fault, Invalid

MAX_BODY = 1_000_000
MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
MAX_KEY = 1000
NO_NUL = "text with a NUL character cannot be stored"
NO_SURROGATE = "text with half a surrogate pair is not Unicode"


class _Twice(dict[str, Any]):
    """An object that named keys twice; `twice` keeps them until the walk knows its place."""

    twice: tuple[str, ...] = ()


def parse(body: bytes) -> tuple[Any, list[Fault]]:
    """The document in `body`, and everything that is wrong with its values.

    Raises:
        Malformed: it is not UTF-8, or not JSON at all.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise Malformed(f"the body is not JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        return None, [Fault("", f"nested deeper than {MAX_DEPTH} levels")]
    return document, list(faults_in(document))


def _integer(digits: str) -> int | float:
    """The integer, or an infinity that the walk names: to read a long one takes time that grows with its square."""
    return int(digits) if len(digits) <= 20 else math.inf


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Twice(found)
    counts = Counter(key for key, _ in pairs)
    repeated.twice = tuple(key for key, count in counts.items() if count > 1)
    return repeated


def faults_in(document: Any) -> Iterator[Fault]:
    """Everything in a parsed document (JSON, YAML, a form) that could not be stored or printed again."""
    todo: list[tuple[tuple[object, ...], Any]] = [((), document)]
    while todo:
        at, value = todo.pop()
        if isinstance(value, str):
            if fault := fault_in_text(value):
                yield Fault(path_of(at), fault)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
                yield Fault(path_of(at), "this integer does not fit 64 bits")
        elif isinstance(value, float):
            if not math.isfinite(value):
                yield Fault(
                    path_of(at), "NaN is no number" if math.isnan(value) else "this number is too large to store"
                )
        elif isinstance(value, dict | list):
            if len(at) >= MAX_DEPTH:
                yield Fault("", f"nested deeper than {MAX_DEPTH} levels")
                return
            if isinstance(value, list):
                todo.extend(((*at, index), item) for index, item in reversed(list(enumerate(value))))
                continue
            if isinstance(value, _Twice):
                yield from (Fault(path_of((*at, key)), "this field stands here twice") for key in value.twice)
            for key in value:
                if not isinstance(key, str):
                    yield Fault(path_of(at), "every key is to be text")
                elif fault := fault_in_text(key):
                    yield Fault(path_of((*at, key)), f"in a key: {fault}")
                elif len(key) > MAX_KEY:
                    yield Fault(path_of((*at, key)), f"a key has at most {MAX_KEY} characters")
            todo.extend(((*at, key), item) for key, item in reversed(list(value.items())))
        else:
            yield Fault(path_of(at), "this kind of value has no JSON")


def fault_in_text(text: str) -> str | None:
    """Why `text` cannot be stored in Postgres or sent as UTF-8, or None."""
    if "\0" in text:
        return NO_NUL
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return NO_SURROGATE
    return None


def check_address(request: Request) -> None:
    """Refuse a path or query that holds NUL, control characters or broken UTF-8.

    Raises:
        Invalid: naming the part, not the text.
    """
    faults = []
    raw = request.scope.get("raw_path") or request.scope["path"].encode("utf-8", "surrogateescape")
    for where, sent in (("path", raw), ("query", request.scope["query_string"].replace(b"+", b" "))):
        try:
            text = unquote_to_bytes(sent).decode("utf-8")
        except UnicodeDecodeError:
            faults.append(Fault(where, "this is not UTF-8"))
            continue
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
            faults.append(Fault(where, "control characters have no place here"))
    if faults:
        raise Invalid(faults, "the address")


class CheckedRequest(Request):
    """A request whose JSON went through `parse`. `faults` are those that were found; `json` raises for them."""

    _checked: tuple[Any, list[Fault]] | None = None

    async def checked(self) -> tuple[Any, list[Fault]]:
        """Document and faults, for a route that can add faults of its own.

        Raises:
            Malformed, WrongContentType: it is not JSON, or not declared as such.
        """
        if self._checked is None:
            body = await self.body()
            if not is_json(self.headers.get("content-type", "")):
                raise WrongContentType("send the body as 'Content-Type: application/json'")
            self._checked = parse(body)
        return self._checked

    async def json(self) -> Any:
        document, faults = await self.checked()
        if faults:
            raise Invalid(sorted(set(faults)))
        return document


def is_json(content_type: str) -> bool:
    """Whether a Content-Type says JSON, in UTF-8 where it names a charset."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charset = next((each[8:].strip('"') for each in parameters if each.startswith("charset=")), "utf-8")
    is_application = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    return is_application and charset in ("utf-8", "utf8")


class BodyLimit:
    """Middleware: no body of more than `limit` bytes is read, declared or not."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self.limit:
            error = TooLarge(self.limit)
            response = answer(Request(scope, receive), 413, "too_large", error.detail)
            await response(scope, receive, send)
            return
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limit:
                raise TooLarge(self.limit)
            return message

        await self.app(scope, counted, send)
