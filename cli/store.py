"""The database of a command: the one at DATABASE_URL, or the embedded PostgreSQL of WHETSTONE_HOME."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli import output
from cli.settings import Settings
from hpo.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from sqlalchemy import Engine

UNMIGRATED = {
    "empty": "the database has no tables yet: run `whetstone db upgrade`",
    "old": "the database is older than this Whetstone: run `whetstone db upgrade`",
    "new": "the database is newer than this Whetstone: update Whetstone",
}


@contextmanager
def open_store(settings: Settings, *, migrate: bool | None = None) -> Iterator[Engine]:
    """An engine on a migrated database, and whatever must run for it, until the block ends.

    The embedded server is always migrated; one at DATABASE_URL only with `migrate=True`. With `settings.wait_s` a
    server that does not answer, or is not migrated yet, is waited for. Raises `DatabaseUnavailable`.
    """
    from hpo import database, schema
    from hpo.embedded import EmbeddedPostgres, running

    if settings.database_url:
        engine = _wait_for(settings.database_url, settings.wait_s, migrate=bool(migrate))
        try:
            yield engine
        finally:
            engine.dispose()
        return
    folder = settings.home_dir
    url = running(folder)
    server = None if url else EmbeddedPostgres(folder)
    if server is not None:
        server.start()
        url = server.url
    try:
        assert url is not None
        engine = database.connect(url)
        try:
            schema.upgrade(engine)
            yield engine
        finally:
            engine.dispose()
    finally:
        if server is not None:
            server.stop()


def _wait_for(url: str, wait_s: float, *, migrate: bool) -> Engine:
    from hpo import database, schema

    deadline = time.monotonic() + wait_s
    said = ""
    while True:
        engine = database.connect(url)
        try:
            if migrate:
                schema.upgrade(engine)
            elif (state := schema.check(engine)) != "current":
                raise DatabaseUnavailable(UNMIGRATED[state])
        except DatabaseUnavailable as error:
            engine.dispose()
            if time.monotonic() >= deadline:
                raise
            if str(error) != said:
                said = str(error)
                output.say(f"Waiting for the database: {said}")
            time.sleep(1)
        else:
            return engine
