"""What tokens and sessions promise: the secret is known to its owner only, and ends when it is to end."""

from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from hpo import tokens
from hpo.errors import Invalid, NotFound
from hpo.tokens import Principal


def run(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement))


def principal(engine: Engine, secret: str) -> Principal | None:
    found = tokens.look_up(engine, secret)
    return None if found is None else found.principal


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(hours=1)


def test_a_token_says_who_is_speaking(engine: Engine) -> None:
    token_id, secret = tokens.create(engine, "gpu box 3", "worker")
    assert secret.startswith("wst_")
    assert principal(engine, secret) == Principal(f"token:{token_id}", "worker", "gpu box 3")


@pytest.mark.parametrize("secret", ["", "wst_", "wst_" + "x" * 43, "x" * 100_000, "\udcff\x00"])
def test_any_other_secret_is_nobody(engine: Engine, secret: str) -> None:
    tokens.create(engine, "someone", "admin")
    assert principal(engine, secret) is None
    assert tokens.session(engine, secret) is None


def test_a_token_is_no_session_and_a_session_no_token(engine: Engine) -> None:
    _, token = tokens.create(engine, "someone", "admin")
    session = tokens.open_session(engine, "admin", None, 1)
    assert tokens.session(engine, token) is None
    assert principal(engine, session) is None


def test_a_secret_is_drawn_anew_and_stored_nowhere(engine: Engine) -> None:
    made = [tokens.create(engine, "same name", "viewer")[1] for _ in range(20)]
    made += [tokens.open_session(engine, "viewer", None, 1) for _ in range(20)]
    assert len({secret.removeprefix("wst_").removeprefix("wss_") for secret in made}) == 40
    assert all(len(secret) >= 4 + 43 for secret in made)  # 256 bits
    with engine.connect() as connection:
        stored = "".join(
            str(connection.execute(sa.text(f"SELECT array_agg(t::text) FROM whetstone.{table} t")).scalar())
            for table in ("tokens", "sessions")
        )
    for secret in made:
        assert secret not in stored
        assert secret.encode().hex()[:24] not in stored  # as PostgreSQL shows bytes
        assert hashlib.sha256(secret.encode()).hexdigest() in stored


def test_a_revoked_token_is_refused_and_its_sessions_with_it(engine: Engine) -> None:
    token_id, secret = tokens.create(engine, "someone", "admin")
    _, other = tokens.create(engine, "another", "admin")
    session = tokens.open_session(engine, "admin", token_id, 1)
    own = tokens.open_session(engine, "admin", None, 1)
    assert tokens.session(engine, session) == Principal(f"token:{token_id}", "admin", "someone")
    tokens.revoke(engine, token_id)
    tokens.revoke(engine, token_id)
    assert principal(engine, secret) is None
    assert tokens.session(engine, session) is None
    assert principal(engine, other) is not None
    assert tokens.session(engine, own) is not None
    with pytest.raises(NotFound, match="token 99"):
        tokens.revoke(engine, 99)


def test_an_expired_token_is_refused_and_its_sessions_with_it(engine: Engine) -> None:
    token_id, secret = tokens.create(engine, "someone", "admin", expires_at=soon())
    session = tokens.open_session(engine, "admin", token_id, 1)
    assert principal(engine, secret) is not None
    assert tokens.session(engine, session) is not None
    run(engine, "UPDATE whetstone.tokens SET expires_at = clock_timestamp()")
    assert principal(engine, secret) is None
    assert tokens.session(engine, session) is None


def test_a_session_ends_when_it_is_closed_or_its_days_are_over(engine: Engine) -> None:
    closed, expired, kept = (tokens.open_session(engine, "viewer", None, 30) for _ in range(3))
    found = tokens.session(engine, kept)
    assert found is not None
    assert found.role == "viewer"
    assert found != tokens.session(engine, closed)  # two browsers are two people, as far as we know
    tokens.close_session(engine, closed)
    tokens.close_session(engine, closed)
    assert tokens.session(engine, closed) is None
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE whetstone.sessions SET expires_at = clock_timestamp() WHERE sha256 = :sha256"),
            {"sha256": tokens.digest(expired)},
        )
    assert tokens.session(engine, expired) is None
    tokens.open_session(engine, "viewer", None, 30)
    with engine.connect() as connection:  # those that are over are cleared away
        assert connection.execute(sa.text("SELECT count(*) FROM whetstone.sessions")).scalar() == 2
    assert tokens.session(engine, kept) == found


def test_the_last_use_is_noted_once_a_minute(engine: Engine) -> None:
    _, secret = tokens.create(engine, "someone", "worker")

    def used() -> datetime | None:
        return tokens.listing(engine)[0].last_used_at

    assert used() is None
    principal(engine, secret)
    first = used()
    assert first is not None
    principal(engine, secret)
    assert used() == first
    run(engine, "UPDATE whetstone.tokens SET last_used_at = last_used_at - interval '61 seconds'")
    principal(engine, secret)
    again = used()
    assert again is not None
    assert again > first


def test_a_token_in_use_never_waits_for_the_note_of_its_use(engine: Engine) -> None:
    token_id, secret = tokens.create(engine, "someone", "worker")
    found: list[Principal | None] = []
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT 1 FROM whetstone.tokens WHERE token_id = :id FOR UPDATE"), {"id": token_id})
        thread = threading.Thread(target=lambda: found.append(principal(engine, secret)), daemon=True)
        thread.start()
        thread.join(60)
        assert len(found) == 1
    assert found[0] is not None


def test_tokens_are_listed_without_their_secrets(engine: Engine) -> None:
    expires = soon()
    first, secret = tokens.create(engine, "first", "admin", expires_at=expires)
    second, _ = tokens.create(engine, "second", "viewer")
    tokens.revoke(engine, second)
    rows = tokens.listing(engine)
    assert [(row.token_id, row.name, row.role) for row in rows] == [
        (first, "first", "admin"),
        (second, "second", "viewer"),
    ]
    assert [row.expires_at for row in rows] == [expires, None]
    assert [row.revoked_at is None for row in rows] == [True, False]
    assert secret not in repr(rows)
    assert tokens.digest(secret).hex() not in repr(rows)


def test_a_token_that_makes_no_sense_is_refused_naming_every_fault(engine: Engine) -> None:
    with pytest.raises(Invalid) as refused:
        tokens.create(engine, "two\nlines", "root", expires_at=datetime(2030, 1, 1))
    assert [fault.at for fault in refused.value.faults] == ["role", "name", "expires_at"]
    with pytest.raises(Invalid):
        tokens.open_session(engine, "admin", None, 0)
    assert tokens.listing(engine) == []
