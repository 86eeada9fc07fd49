"""Who may speak: tokens for programs and sessions for browsers.

Invariant: a secret is shown once, when it is made, and never stored; what is stored is its SHA-256, under which it is
looked up. (The secrets are 256 random bits: there is nothing to guess, and so nothing for a slow hash to slow down.)
A revoked or expired one is refused from the next call on, and with a token end the sessions that were opened by it;
a revocation is also notified, to those who keep what they have looked up.
A server may accept tokens that are not stored here; their sessions end where they are no longer accepted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast, get_args

import sqlalchemy as sa
from sqlalchemy import Engine

from hpo import events
from hpo.database import transaction
from hpo.errors import Fault, Invalid, NotFound

Role = Literal["admin", "worker", "viewer"]
ROLES: tuple[Role, ...] = get_args(Role)

_MAX_SECRET = 200  # characters; anything longer was not made here

_CREATE = sa.text("""
    INSERT INTO whetstone.tokens (name, role, sha256, expires_at) VALUES (:name, :role, :sha256, :expires_at)
    RETURNING token_id
""")
_LISTING = sa.text("""
    SELECT token_id, name, role, created_at, expires_at, last_used_at, revoked_at
    FROM whetstone.tokens ORDER BY token_id
""")
_REVOKE = sa.text("""
    UPDATE whetstone.tokens SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE token_id = :token_id
    RETURNING token_id
""")
_END_SESSIONS_OF = sa.text("DELETE FROM whetstone.sessions WHERE token_id = :token_id")

_ALIVE = "t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp())"
_FIND = sa.text(f"""
    SELECT t.token_id, t.name, t.role, t.sha256,
           extract(epoch FROM t.expires_at - clock_timestamp())::float8 AS lasts_s,
           t.last_used_at IS NULL OR t.last_used_at < clock_timestamp() - interval '1 minute' AS untouched
    FROM whetstone.tokens t WHERE t.sha256 = :sha256 AND {_ALIVE}
""")  # noqa: S608
# Whoever finds the row taken leaves it: somebody else is writing the same minute.
_TOUCH = sa.text("""
    UPDATE whetstone.tokens SET last_used_at = clock_timestamp()
    WHERE token_id = (SELECT token_id FROM whetstone.tokens WHERE token_id = :token_id FOR UPDATE SKIP LOCKED)
""")

_FORGET_OLD_SESSIONS = sa.text("DELETE FROM whetstone.sessions WHERE expires_at < clock_timestamp()")
_OPEN_SESSION = sa.text("""
    INSERT INTO whetstone.sessions (sha256, role, token_id, process_token, expires_at)
    VALUES (:sha256, :role, :token_id, :process_token, clock_timestamp() + make_interval(secs => :seconds))
""")
_FIND_SESSION = sa.text(f"""
    SELECT s.role, s.sha256, s.token_id, s.process_token, t.name FROM whetstone.sessions s
    LEFT JOIN whetstone.tokens t ON t.token_id = s.token_id
    WHERE s.sha256 = :sha256 AND s.expires_at > clock_timestamp() AND (s.token_id IS NULL OR ({_ALIVE}))
""")  # noqa: S608
_CLOSE_SESSION = sa.text("DELETE FROM whetstone.sessions WHERE sha256 = :sha256")


@dataclass(frozen=True)
class Principal:
    """Who is speaking: `id` is stable for one token or session, `name` is for people."""

    id: str
    role: Role
    name: str


@dataclass(frozen=True)
class Valid:
    """What a stored token stands for. It expires in `lasts_s` seconds (None: never), unless it is revoked before."""

    principal: Principal
    lasts_s: float | None


@dataclass(frozen=True)
class Token:
    """A token as it is listed; its secret is not known any more."""

    token_id: int
    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    """To the minute."""
    revoked_at: datetime | None


def digest(secret: str) -> bytes:
    """What is stored of a secret: its SHA-256, 32 bytes."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def create(engine: Engine, name: str, role: str, expires_at: datetime | None = None) -> tuple[int, str]:
    """Make a token; returns (token_id, secret). The secret cannot be had again. `expires_at` is an aware time.

    Raises `Invalid` on an unknown role, a name of none or more than 100 characters, or a time without a zone.
    """
    faults = _role_faults(role)
    if not 1 <= len(name) <= 100 or not name.isprintable():
        faults.append(Fault("name", "must be 1 to 100 printable characters"))
    if expires_at is not None and expires_at.tzinfo is None:
        faults.append(Fault("expires_at", "must say its time zone"))
    if faults:
        raise Invalid(faults, what="the token")
    secret = f"wst_{secrets.token_urlsafe(32)}"
    with transaction(engine) as connection:
        values = {"name": name, "role": role, "sha256": digest(secret), "expires_at": expires_at}
        token_id: int = connection.execute(_CREATE, values).scalar_one()
    return token_id, secret


def listing(engine: Engine) -> list[Token]:
    """All tokens, oldest first, revoked ones too."""
    with transaction(engine) as connection:
        return [Token(**row._mapping) for row in connection.execute(_LISTING)]


def revoke(engine: Engine, token_id: int) -> None:
    """Refuse a token from now on, and end the sessions it opened. Safe to repeat. Raises `NotFound`."""
    with transaction(engine) as connection:
        found = connection.execute(_REVOKE, {"token_id": token_id}).one_or_none() is not None
        connection.execute(_END_SESSIONS_OF, {"token_id": token_id})
        events.notify(connection, "token")
    if not found:
        raise NotFound(f"there is no token {token_id}")


def look_up(engine: Engine, secret: str) -> Valid | None:
    """Whose secret this is, and how long it lasts, or None where it is unknown, revoked or expired.

    Notes its use, at most once a minute.
    """
    row = _found(engine, _FIND, secret)
    if row is None:
        return None
    if row.untouched:
        with transaction(engine) as connection:
            connection.execute(_TOUCH, {"token_id": row.token_id})
    return Valid(Principal(f"token:{row.token_id}", cast(Role, row.role), row.name), row.lasts_s)


def open_session(
    engine: Engine, role: str, token_id: int | None, days: float, *, process_token: bytes | None = None
) -> str:
    """Open a browser's session for so many days and return its secret.

    With `token_id` it ends with that token; with `process_token`, the digest of a token that is not stored, it holds
    only for servers that accept that one. Raises `Invalid` on an unknown role or a length that is not positive.
    """
    faults = _role_faults(role)
    if not 0 < days <= 3650:
        faults.append(Fault("days", "must be above 0 and at most 3650"))
    if faults:
        raise Invalid(faults, what="the session")
    secret = f"wss_{secrets.token_urlsafe(32)}"
    values = {
        "sha256": digest(secret),
        "role": role,
        "token_id": token_id,
        "process_token": process_token,
        "seconds": days * 86400.0,
    }
    with transaction(engine) as connection:
        connection.execute(_FORGET_OLD_SESSIONS)
        connection.execute(_OPEN_SESSION, values)
    return secret


def session(engine: Engine, secret: str, accepted: Container[bytes] = ()) -> Principal | None:
    """Whose session this is, or None where it is unknown, closed or expired, or its token is.

    `accepted` are the digests of the tokens that the asking server accepts although they are not stored.
    """
    row = _found(engine, _FIND_SESSION, secret)
    if row is None or (row.process_token is not None and bytes(row.process_token) not in accepted):
        return None
    role = cast(Role, row.role)
    if row.token_id is not None:
        return Principal(f"token:{row.token_id}", role, row.name)
    return Principal(f"session:{bytes(row.sha256).hex()[:16]}", role, "browser")


def close_session(engine: Engine, secret: str) -> None:
    """End a session; nothing happens where there is none."""
    with transaction(engine) as connection:
        connection.execute(_CLOSE_SESSION, {"sha256": digest(secret)})


def _found(engine: Engine, statement: sa.TextClause, secret: str) -> sa.Row[Any] | None:
    if len(secret) > _MAX_SECRET:
        return None
    wanted = digest(secret)
    with transaction(engine) as connection:
        row = connection.execute(statement, {"sha256": wanted}).one_or_none()
    return row if row is not None and hmac.compare_digest(bytes(row.sha256), wanted) else None


def _role_faults(role: str) -> list[Fault]:
    return [] if role in ROLES else [Fault("role", f"must be one of {', '.join(ROLES)}")]
