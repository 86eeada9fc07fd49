"""PostgreSQL for the tests: a real server for each test process, and a fresh migrated database for each test.

The server is the embedded one, in a temporary folder, unless WHETSTONE_TEST_DATABASE_URL names another (whose user may
create databases). It starts with the first test that asks for it.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine


def pytest_configure(config: pytest.Config) -> None:
    """One computing thread a test process: the suite runs in several. Hypothesis draws the same each time, in any.

    A shell's background jobs ignore Ctrl-C, and so would the commands that are tested: here they hear it.
    """
    from hypothesis import HealthCheck, settings

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    settings.register_profile(
        "whetstone", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("whetstone")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server where databases may be made; nothing in it outlives the test process."""
    given = os.environ.get("WHETSTONE_TEST_DATABASE_URL")
    if given:
        yield given
        return
    from hpo.embedded import EmbeddedPostgres

    # What the tests write need not survive a power cut.
    fast = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "200"}
    with EmbeddedPostgres(Path(tmp_path_factory.mktemp("postgres")), settings=fast) as server:
        yield server.url


@pytest.fixture(scope="session")
def _template(postgres_server: str) -> Iterator[str]:
    """The name of a migrated, empty database that the others are copied from."""
    from hpo import schema

    with _made(postgres_server) as name:
        engine = connect(_named(postgres_server, name))
        schema.upgrade(engine)
        engine.dispose()
        yield name


@pytest.fixture
def postgres_url(postgres_server: str, _template: str) -> Iterator[str]:
    """The URL of a fresh, migrated database of this test's own."""
    with _made(postgres_server, _template) as name:
        yield _named(postgres_server, name)


@pytest.fixture
def empty_url(postgres_server: str) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    with _made(postgres_server) as name:
        yield _named(postgres_server, name)


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    """An engine on a fresh, migrated database of this test's own."""
    made = connect(postgres_url)
    yield made
    made.dispose()


def connect(url: str) -> Engine:
    """An engine that waits for a server that is slow to answer: these tests' machine may be busy."""
    from hpo import database

    return database.connect(url, connect_timeout_s=60)


class _made:
    """A database that exists for as long as the block runs."""

    def __init__(self, server: str, template: str = "template0") -> None:
        self.server = server
        self.template = template
        self.name = f"whetstone_test_{uuid.uuid4().hex[:16]}"

    def __enter__(self) -> str:
        # Copying files is quicker than logging each page where nothing waits for a disk.
        self._run(f'CREATE DATABASE "{self.name}" TEMPLATE "{self.template}" STRATEGY file_copy')
        return self.name

    def __exit__(self, *_: object) -> None:
        self._run(f'DROP DATABASE IF EXISTS "{self.name}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        import sqlalchemy as sa

        engine = connect(self.server)
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text(statement))
        finally:
            engine.dispose()


def _named(server: str, name: str) -> str:
    from hpo import database

    return database.normalise(server).set(database=name).render_as_string(hide_password=False)
