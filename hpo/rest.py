"""Talking to a Whetstone server over HTTP: one keep-alive client for the worker and for the command line.

Whatever goes wrong is one of two errors, each one line with its remedy: `ServerUnreachable` (no answer came) and
`ApiError` (the server said no). A call is repeated only where a repetition cannot do the thing twice: reads, changes
that say what is to be, and posts that carry an `Idempotency-Key`. The token stands in one header and nowhere else.
"""

from __future__ import annotations

import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from json import dumps as json_text
from json import loads as json_value
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

Params = Mapping[str, str | int | float | bool | None]
Json = Any

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may well succeed: a restart, a database that is away, too many requests."""

RESTS_S = 30.0
"""How long a connection is kept without a request: longer than from one report to the next, and less long than the
server keeps it (60 s), so that a request never meets one that is just being closed."""

_CREATES = re.compile(r"/(studies|trials|ask|claims)$")
_LOOPBACK = re.compile(r"^(localhost|127(\.\d+){3}|::1)$")


class ServerUnreachable(Exception):
    """No answer came: nothing listens there, it timed out, or the connection broke."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        """The connection was never made, so the request was not carried out."""


class ApiError(Exception):
    """The server answered with an error. `status` is HTTP's, `code` and `message` the API's own; as text it also has
    every fault of `details`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: list[Any] | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{message}: {'; '.join(map(_fault, details))}" if details else message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details or []
        self.retry_after = retry_after
        """Seconds the server asked us to wait, where it did."""

    @property
    def transient(self) -> bool:
        return self.status in TRANSIENT


class Backoff:
    """Waiting times that double from `first` to `cap` seconds, each shortened at random by up to a half."""

    def __init__(self, first: float = 0.1, cap: float = 5.0) -> None:
        self._first, self._cap, self._tries = first, cap, 0

    def reset(self) -> None:
        self._tries = 0

    def next(self, error: Exception | None = None) -> float:
        """Seconds to wait before the next try; at least what the server asked for, but never above a minute."""
        delay = min(self._cap, self._first * 2.0 ** min(self._tries, 30))
        self._tries += 1
        asked = error.retry_after if isinstance(error, ApiError) and error.retry_after else 0.0
        return max(delay * random.uniform(0.5, 1.0), min(asked, 60.0))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later without anybody changing it."""
    return isinstance(error, ServerUnreachable) or (isinstance(error, ApiError) and error.transient)


def new_key() -> str:
    """An Idempotency-Key: the same key and body always gets the same answer."""
    return uuid.uuid4().hex


class Client:
    """REST calls to the server at `url`; paths count from its root (``/api/v1/studies``).

    Calls that are safe to repeat are repeated for up to `patience_s` seconds; `once` never repeats. Threads may share
    one client. Raises `ValueError` for an address that is no http(s) URL.
    """

    def __init__(self, url: str, token: str | None, *, patience_s: float = 5.0, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url.strip())
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.query
            or parts.fragment
        ):
            raise ValueError("the server's address must look like http://host:8000 (--url or WHETSTONE_URL)")
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("the token has characters that no token has: check --token or WHETSTONE_TOKEN")
        self.url = url.strip().rstrip("/")
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        headers = {"Accept": "application/json", "User-Agent": "whetstone"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._headers = headers
        self._trust_env = not _LOOPBACK.match(parts.hostname)
        self._process, self._made = os.getpid(), self._connections()

    def _connections(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=self._timeout(self._timeout_s),
            limits=httpx2.Limits(max_connections=8, max_keepalive_connections=4, keepalive_expiry=RESTS_S),
            trust_env=self._trust_env,
        )

    @property
    def _http(self) -> httpx2.Client:
        """The connections. A forked child makes its own: over its parent's, each would read the other's answers."""
        if self._process != os.getpid():
            self._process, self._made = os.getpid(), self._connections()
        return self._made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, *, params: Params | None = None) -> Json:
        return self._patiently(lambda: self.once("GET", path, params=params), safe=True)

    def post(self, path: str, *, json: Json = None, params: Params | None = None, key: str | None = None) -> Json:
        """A post that creates something carries a key (made up unless given), and is therefore safe to repeat."""
        safe = key is not None or _CREATES.search(path) is not None
        sent = key or new_key()
        return self._patiently(lambda: self.once("POST", path, json=json, params=params, key=sent), safe=safe)

    def patch(self, path: str, *, json: Json = None, params: Params | None = None) -> Json:
        return self._patiently(lambda: self.once("PATCH", path, json=json, params=params), safe=True)

    def delete(self, path: str, *, params: Params | None = None) -> Json:
        return self._patiently(lambda: self.once("DELETE", path, params=params), safe=False)

    def text(self, path: str, *, params: Params | None = None) -> str:
        """The answer as it stands, for exports that are not JSON."""
        return str(self._patiently(lambda: self._send("GET", path, params=params).text, safe=True))

    def pages(self, path: str, *, params: Params | None = None) -> Iterator[dict[str, Any]]:
        """Every item of a list, page after page. A ``limit`` in `params` bounds the number of items in all."""
        wanted = dict(params or {})
        limit = wanted.get("limit")
        left = int(limit) if limit is not None else None
        while left is None or left > 0:
            if left is not None:
                wanted["limit"] = min(left, 100)
            page = self.get(path, params=wanted)
            items = page["items"] if left is None else page["items"][:left]
            yield from items
            left = None if left is None else left - len(items)
            if not page.get("next") or not items:
                return
            wanted["cursor"] = page["next"]

    def download(self, path: str, to: Path, *, params: Params | None = None) -> int:
        """Stream an answer into the file `to`, which appears only when it is whole; returns its bytes."""
        part = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with self._guard(), self._http.stream("GET", path, params=_clean(params)) as answer:
                if answer.status_code >= 300:
                    answer.read()
                    raise self._refusal(answer)
                with part.open("wb") as file:
                    for chunk in answer.iter_bytes(1 << 20):
                        file.write(chunk)
            size = part.stat().st_size
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)
        return size

    def once(
        self,
        method: str,
        path: str,
        *,
        json: Json = None,
        params: Params | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """One request, one try. Returns the decoded JSON, or None for an empty answer.

        Raises `ApiError` or `ServerUnreachable`; without a key, the latter leaves open whether it was carried out.
        """
        answer = self._send(method, path, json=json, params=params, key=key, timeout_s=timeout_s)
        if answer.status_code == 204 or not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise ApiError(
                answer.status_code,
                "not_json",
                f"{self.url}{path} did not answer with JSON: is this a Whetstone server?",
            ) from None

    def _send(
        self,
        method: str,
        path: str,
        *,
        json: Json = None,
        params: Params | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> httpx2.Response:
        headers = {"Idempotency-Key": key} if key else {}
        if json is not None:
            headers["Content-Type"] = "application/json"
        with self._guard():
            answer = self._http.request(
                method,
                path,
                content=None if json is None else _encode(json),
                params=_clean(params),
                headers=headers,
                timeout=self._timeout(timeout_s or self._timeout_s),
            )
        if answer.status_code >= 300:
            raise self._refusal(answer)
        return answer

    def _patiently(self, call: Callable[[], Any], *, safe: bool) -> Any:
        """Repeat a call while that is safe, the fault may pass, and patience lasts."""
        backoff, until = Backoff(0.1, 2.0), time.monotonic() + self._patience_s
        while True:
            try:
                return call()
            except (ServerUnreachable, ApiError) as error:
                # refused: nothing was carried out. A 500 is a fault of the server's, which a person should see at once.
                may = safe or (isinstance(error, ServerUnreachable) and error.refused)
                if not may or not is_transient(error) or (isinstance(error, ApiError) and error.status == 500):
                    raise
                delay = backoff.next(error)
                if time.monotonic() + delay > until:
                    raise
            time.sleep(delay)

    def _guard(self) -> _Guard:
        return _Guard(self.url)

    @staticmethod
    def _timeout(seconds: float) -> httpx2.Timeout:
        return httpx2.Timeout(seconds, connect=min(5.0, seconds), pool=seconds)

    def _refusal(self, answer: httpx2.Response) -> ApiError:
        status = answer.status_code
        if status < 400:
            return ApiError(
                status, "redirected", f"{self.url} redirects elsewhere: set --url or WHETSTONE_URL to its real address"
            )
        try:
            error = answer.json()["error"]
            code, message, details = str(error["code"]), str(error["message"]), list(error.get("details") or [])
        except (ValueError, KeyError, TypeError):
            code, message, details = f"http_{status}", f"{self.url} answered {status} {answer.reason_phrase}", []
        after = answer.headers.get("Retry-After", "")
        return ApiError(status, code, message, details, retry_after=float(after) if after.isdigit() else None)


class _Guard:
    """Turns the HTTP library's errors into ours, in one line that names the address and the remedy."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (httpx2.RequestError, httpx2.InvalidURL)):
            return
        if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
            fault = "nobody answers" if isinstance(error, httpx2.ConnectTimeout) else str(error) or "no connection"
            remedy = "is `whetstone serve` running there? --url or WHETSTONE_URL says where it is"
            raise ServerUnreachable(f"no server at {self._url} ({fault}): {remedy}", refused=True) from None
        if isinstance(error, httpx2.TimeoutException):
            raise ServerUnreachable(
                f"{self._url} did not answer in time: is it overloaded, or its database away?"
            ) from None
        raise ServerUnreachable(
            f"the connection to {self._url} broke ({type(error).__name__}): is the server restarting?"
        ) from None


def _encode(document: Json) -> bytes:
    """JSON, as a person wrote it: NaN and dates go too, so that the server names them with every other fault."""
    return json_text(document, default=_plain).encode()


def as_sent(document: Json) -> Json:
    """What of a document arrives: tuples are lists, numbers of other libraries plain ones."""
    return json_value(_encode(document))


def _plain(value: Any) -> Any:
    """What JSON does not know: a number of numpy's or a tensor of one element as the number, all else as its text."""
    item = getattr(value, "item", None)
    if not callable(item):
        return str(value)
    try:
        found = item()
    except (TypeError, ValueError, RuntimeError):
        return str(value)
    return found if isinstance(found, bool | int | float | str) else str(value)


def _fault(detail: Any) -> str:
    if not isinstance(detail, Mapping):
        return str(detail)
    return ": ".join(str(part) for part in (detail.get("at"), detail.get("fault")) if part)


def _clean(params: Params | None) -> dict[str, str | int | float | bool] | None:
    return {name: value for name, value in params.items() if value is not None} if params else None
