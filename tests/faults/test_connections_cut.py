"""A connection that is cut at any query of a call: the call is done once, or says that PostgreSQL does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import psycopg2
import pytest
import sqlalchemy as sa

from hpo import database
from hpo.errors import DatabaseUnavailable
from tests.faults.proxy import Proxy, When
from tests.integration.leases_harness import ask, coordinator, study, tell


@pytest.fixture
def proxy(postgres_url: str, tmp_path: Path) -> Iterator[Proxy]:
    def terminate(pid: int) -> None:
        with psycopg2.connect(postgres_url.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))

    made = Proxy(postgres_url, tmp_path / "proxy", terminate)
    yield made
    made.close()


@pytest.fixture
def through(proxy: Proxy) -> Iterator[sa.Engine]:
    engine = database.connect(proxy.url)
    yield engine
    engine.dispose()


def test_a_call_is_one_round_trip(proxy: Proxy, through: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RESTED_S", 600.0)  # else a connection that has rested is asked first
    database.call(through, "SELECT 1")  # connecting takes some
    for _ in range(3):
        before = proxy.queries
        assert database.call(through, "SELECT %(what)s", {"what": "x"}) == "x"
        assert proxy.queries == before + 1
    with database.transaction(through) as conn:
        assert conn.execute(sa.text("SELECT 2")).scalar_one() == 2, "its connection serves transactions as before"


def test_a_call_that_finds_no_server_says_so(proxy: Proxy, through: sa.Engine) -> None:
    database.call(through, "SELECT 1")
    proxy.close()
    with pytest.raises(DatabaseUnavailable, match="does not answer"):
        database.call(through, "SELECT 1")


@pytest.mark.parametrize("when", get_args(When))
def test_an_ask_and_a_tell_that_are_cut_anywhere_are_done_once_or_refused_plainly(
    engine: sa.Engine, proxy: Proxy, through: sa.Engine, when: When
) -> None:
    direct, cut = coordinator(engine), coordinator(through)
    number = direct.create_study(study()).study
    warm = ask(cut, number)
    tell(cut, warm, 0.5)
    for nth in range(4):
        before = _leases(engine)
        proxy.arm(when, nth)
        lease = _unless_unavailable(lambda: ask(cut, number))
        proxy.disarm()
        assert _leases(engine) - before in ((1,) if lease is not None else (0, 1))
        if lease is None:
            continue
        proxy.arm(when, nth)
        reply = _unless_unavailable(lambda lease=lease: tell(cut, lease, 0.25))
        proxy.disarm()
        again = tell(direct, lease, 0.25)
        assert reply in (None, again)
        assert direct.get_trial(number, lease.trial).value == 0.25


def _unless_unavailable(call: Any) -> Any:
    try:
        return call()
    except DatabaseUnavailable:
        return None


def _leases(engine: sa.Engine) -> int:
    with engine.connect() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM whetstone.attempts")).scalar_one())
