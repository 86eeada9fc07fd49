"""Who is asking: bearer tokens, the session cookie, and the one-time link that makes the first session.

A secret is compared by its SHA-256 and stands in no log. A cookie speaks for a person who reads; what changes something
through REST needs a bearer token, so a foreign page that makes a browser send its cookie changes nothing. (The pages'
own forms accept the cookie, behind their CSRF check.)

A session ends with the token that opened it, or that made the link it was opened by. The session of the link that
`serve` prints hangs on no token: it lasts seven days or until its browser signs out, so that a restart of the server
does not sign its owner out.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from hpo import tokens
from hpo.errors import Forbidden, Unauthenticated
from hpo.tokens import Principal

Role = Literal["viewer", "worker", "admin"]
RANK: dict[str, int] = {"viewer": 0, "worker": 1, "admin": 2}
"""A role may do what the roles below it may."""

COOKIE = "whetstone_session"
SESSION_DAYS = 7
READING = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_SECRET = 512
KEPT_S = 2.0
MAX_KEPT = 10_000
MAX_LINKS = 16
ONE_TIME_PATH = "/login"
ONE_TIME_QUERY = "once"


@dataclass(frozen=True)
class Grant:
    """What a session hangs on: a stored token, a token of this process (its digest), or (neither) only on time."""

    token_id: int | None = None
    process_token: bytes | None = None


class OneTimeLink:
    """A link that signs one browser in as admin, once, within `lifetime_s` seconds. `serve` prints one at start.

    >>> link = OneTimeLink()
    >>> link.redeem(link.secret), link.redeem(link.secret)
    (True, False)
    """

    def __init__(self, lifetime_s: float = 3600.0, grant: Grant = Grant()) -> None:
        self.secret = secrets.token_urlsafe(24)  # 192 bits, and the link fits a line of 80 characters
        self.grant = grant
        self._until = time.monotonic() + lifetime_s
        self._lock = threading.Lock()
        self._used = False

    @property
    def path(self) -> str:
        """Path and query of the link, to stand behind the server's address."""
        return f"{ONE_TIME_PATH}?{ONE_TIME_QUERY}={self.secret}"

    def redeem(self, secret: str) -> bool:
        """Whether `secret` opens the door. It does once; a wrong guess does not use it up."""
        right = hmac.compare_digest(secret.encode("utf-8", "replace"), self.secret.encode())
        with self._lock:
            if not right or self._used or time.monotonic() > self._until:
                return False
            self._used = True
            return True


class Kept:
    """Tokens that were looked up a moment ago, by their digest. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_digest: dict[bytes, tuple[Principal, float]] = {}
        self._forgotten = 0

    def get(self, digest: bytes) -> Principal | None:
        kept = self._by_digest.get(digest)
        return kept[0] if kept is not None and time.monotonic() < kept[1] else None

    @property
    def times_forgotten(self) -> int:
        """To be read before a token is looked up: what was found is only kept if nothing was forgotten meanwhile."""
        return self._forgotten

    def put(self, digest: bytes, found: tokens.Valid, times_forgotten: int) -> None:
        lasts_s = KEPT_S if found.lasts_s is None else min(KEPT_S, found.lasts_s)
        with self._lock:
            if times_forgotten != self._forgotten:
                return  # it may have been revoked while it was looked up
            if len(self._by_digest) >= MAX_KEPT:
                self._by_digest.clear()
            self._by_digest[digest] = (found.principal, time.monotonic() + lasts_s)

    def forget(self) -> None:
        with self._lock:
            self._forgotten += 1
            self._by_digest.clear()


class Auth:
    """Finds the principal behind a request. All its methods but `at_hand` and `forget` may ask the database: call them
    from a thread, not the loop.

    A stored token is looked up at most every `KEPT_S` seconds. One that is revoked is refused as soon as this process
    hears of it (`forget`), and after `KEPT_S` where it hears nothing.
    """

    def __init__(
        self, engine: Engine, process_tokens: Mapping[str, Principal], one_time: OneTimeLink | None = None
    ) -> None:
        self.engine = engine
        self._kept = Kept()
        self._links = deque([one_time] if one_time else [], MAX_LINKS)
        self._process_tokens = {bytes.fromhex(digest): principal for digest, principal in process_tokens.items()}

    def bearer(self, secret: str) -> Principal | None:
        """Principal of a bearer token: one of this process, or one that is stored."""
        if not secret or len(secret) > MAX_SECRET or not secret.isascii():
            return None
        digest = tokens.digest(secret)
        known = self._process_tokens.get(digest) or self._kept.get(digest)
        if known is not None:
            return known
        before = self._kept.times_forgotten
        found = tokens.look_up(self.engine, secret)
        if found is None:
            return None
        self._kept.put(digest, found, before)
        return found.principal

    def at_hand(self, request: Request) -> Principal | None:
        """Whoever `request` comes from, if that is known without asking the database."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or len(secret) > MAX_SECRET:
            return None
        digest = tokens.digest(secret.strip())
        return self._process_tokens.get(digest) or self._kept.get(digest)

    def forget(self) -> None:
        """Look every token up again: one was revoked, or that may have been missed."""
        self._kept.forget()

    def cookie(self, secret: str) -> Principal | None:
        """Principal of a session cookie."""
        if not secret or len(secret) > MAX_SECRET or not secret.isascii():
            return None
        return tokens.session(self.engine, secret, self._process_tokens)

    def principal(self, request: Request, *, cookie: bool = True) -> Principal | None:
        """Whoever `request` comes from. A bearer token that is there and wrong is not rescued by a cookie."""
        header = request.headers.get("authorization")
        if header is not None:
            scheme, _, secret = header.partition(" ")
            return self.bearer(secret.strip()) if scheme.lower() == "bearer" else None
        return self.cookie(request.cookies.get(COOKIE, "")) if cookie else None

    def sign_in_once(self, secret: str) -> str | None:
        """Redeem a one-time link: the secret of a fresh admin session, or None."""
        link = next((link for link in tuple(self._links) if link.redeem(secret)), None)
        return None if link is None else self._open("admin", link.grant)

    def add_link(self, principal: Principal, lifetime_s: float = 600.0) -> OneTimeLink:
        """One more one-time link, in the name of `principal`, an admin; the oldest of many gives way."""
        link = OneTimeLink(lifetime_s, self._grant(principal))
        self._links.append(link)
        return link

    def sign_in(self, secret: str) -> str | None:
        """Exchange a bearer token for a session with its role: the session's secret, or None for an unknown token."""
        principal = self.bearer(secret)
        return None if principal is None else self._open(principal.role, self._grant(principal))

    def _grant(self, principal: Principal) -> Grant:
        own = next((digest for digest, known in self._process_tokens.items() if known == principal), None)
        return Grant(process_token=own) if own is not None else Grant(token_id=int(principal.id.removeprefix("token:")))

    def _open(self, role: str, grant: Grant) -> str:
        return tokens.open_session(self.engine, role, grant.token_id, SESSION_DAYS, process_token=grant.process_token)

    def sign_out(self, secret: str) -> None:
        """End a session. One that is not known is ended already."""
        if secret and len(secret) <= MAX_SECRET and secret.isascii():
            tokens.close_session(self.engine, secret)


def auth_of(request: Request) -> Auth:
    """The `Auth` of the app that serves `request`."""
    auth = request.app.state.auth
    assert isinstance(auth, Auth)
    return auth


def principal_of(request: Request) -> Principal | None:
    """Whoever is asking, by bearer token or session cookie; None for a stranger. Asks the database."""
    return auth_of(request).principal(request)


def require(principal: Principal | None, role: Role) -> Principal:
    """`principal`, if its role reaches as far as `role`.

    Raises:
        Unauthenticated: nobody, or somebody unknown.
        Forbidden: known, with a lower role; the message names both.
    """
    if principal is None:
        raise Unauthenticated(
            "this needs a token that is known here: send it as 'Authorization: Bearer TOKEN' "
            "('whetstone token create' makes one)"
        )
    if RANK[principal.role] < RANK[role]:
        raise Forbidden(f"this needs the role {role}, and this token's role is {principal.role}")
    return principal


async def admit(request: Request, role: Role) -> Principal:
    """The principal of a REST request that needs `role`. Cookies count for reading only."""
    known = auth_of(request).at_hand(request)
    return await run_in_threadpool(_admit, request, role) if known is None else require(known, role)


def _admit(request: Request, role: Role) -> Principal:
    auth = auth_of(request)
    reading = request.method in READING
    principal = auth.principal(request, cookie=reading)
    if principal is None and not reading and COOKIE in request.cookies:
        raise Unauthenticated("a session cookie only reads here: send a token as 'Authorization: Bearer TOKEN'")
    return require(principal, role)


def set_session(request: Request, response: Response, secret: str) -> None:
    """Put a session's secret into the browser, where no script and no other site reaches it."""
    response.set_cookie(
        COOKIE,
        secret,
        max_age=SESSION_DAYS * 86_400,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def clear_session(request: Request, response: Response) -> None:
    """Take the session's cookie away."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https")


class NoQuery(logging.Filter):
    """Cuts queries out of uvicorn's access lines: the one-time link's secret stands in one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple) and len(record.args) == 5 and isinstance(record.args[2], str):
            path, mark, _ = record.args[2].partition("?")
            record.args = (*record.args[:2], path + ("?..." if mark else ""), *record.args[3:])
        return True


def keep_secrets_out_of_the_access_log() -> None:
    """Install `NoQuery`. Called when the app starts, after the server configured its logging; twice is once."""
    logging.getLogger("uvicorn.access").addFilter(_no_query)


_no_query = NoQuery()
