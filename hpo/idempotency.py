"""Idempotency keys: a POST that creates, sent twice, creates once and is answered twice alike.

The key's row is written in the same transaction as what it guards, so either both are there or neither is. Of two
copies that arrive at once the second waits at that row until the first has committed (then it gets the stored answer)
or rolled back (then it does the work). Keys are kept for 24 hours per owner and route; `clean` forgets older ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa

from hpo.errors import KeyReused
from hpo.protocol import Wire

KEPT_HOURS = 24
REUSED = "this Idempotency-Key was used with another body: send a new key with a new request"
W = TypeVar("W", bound=Wire)

# Take the key, or wait for whoever is taking it; a key past its time is taken over as if it were new.
_TAKE = sa.text("""
    INSERT INTO whetstone.idempotency AS kept (owner, route, key, digest)
    VALUES (:owner, :route, :key, :digest)
    ON CONFLICT (owner, route, key) DO UPDATE
        SET digest = excluded.digest, answer = NULL, created_at = clock_timestamp()
        WHERE kept.created_at < clock_timestamp() - make_interval(hours => :hours)
    RETURNING true
""")

# What an earlier request with this key was answered.
_ANSWERED = sa.text("""
    SELECT digest, answer FROM whetstone.idempotency
    WHERE owner = :owner AND route = :route AND key = :key
      AND created_at >= clock_timestamp() - make_interval(hours => :hours)
""")

# Keep the answer beside what it answers.
_KEEP = sa.text("""
    UPDATE whetstone.idempotency SET answer = CAST(:answer AS jsonb)
    WHERE owner = :owner AND route = :route AND key = :key
""")

# Forget keys past their time.
_CLEAN = sa.text("""
    DELETE FROM whetstone.idempotency WHERE created_at < clock_timestamp() - make_interval(hours => :hours)
""")


@dataclass(frozen=True)
class Once:
    """One request that is to be done once.

    `owner` is the principal's id, `route` names the route and its path parameters, `key` is the client's
    Idempotency-Key and `digest` the SHA-256 of the request's body.
    """

    owner: str
    route: str
    key: str
    digest: bytes


def answered(conn: sa.Connection, once: Once | None, shape: type[W]) -> W | None:
    """Return the stored answer of an earlier request with this key, or None where there is none yet.

    Raises:
        KeyReused: the key came earlier with another body.
    """
    if once is None:
        return None
    row = conn.execute(_ANSWERED, _row(once)).one_or_none()
    if row is None or row.answer is None:
        return None
    if bytes(row.digest) != once.digest:
        raise KeyReused(REUSED)
    return shape.model_validate(row.answer)


def guard(conn: sa.Connection, once: Once | None, shape: type[W], work: Callable[[], W]) -> W:
    """Do `work` within the transaction of `conn` unless it was done before, and return its answer.

    An exception from `work` is passed on: the transaction rolls back, and the key with it.

    Raises:
        KeyReused: the key came earlier with another body.
    """
    if once is None:
        return work()
    if conn.execute(_TAKE, _row(once)).one_or_none() is None:
        # A new statement, so that it sees what the transaction we waited for has committed.
        earlier = answered(conn, once, shape)
        if earlier is not None:
            return earlier
    answer = work()
    conn.execute(_KEEP, _row(once) | {"answer": json.dumps(answer.model_dump(mode="json"))})
    return answer


def clean(conn: sa.Connection) -> int:
    """Forget the keys older than 24 hours; return how many there were."""
    return conn.execute(_CLEAN, {"hours": KEPT_HOURS}).rowcount


def _row(once: Once) -> dict[str, object]:
    return {"owner": once.owner, "route": once.route, "key": once.key, "digest": once.digest, "hours": KEPT_HOURS}
