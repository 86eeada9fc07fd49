"""The schema of a database: Optuna's tables by Optuna, ours by our Alembic history, one upgrade at a time.

Promise: to upgrade twice changes nothing, two at once wait for each other, and a database that a newer Whetstone or
Optuna has upgraded is refused before anything is touched.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from hpo import functions, stamp
from hpo.database import place, transaction, translated
from hpo.errors import DatabaseUnavailable, WhetstoneError
from hpo.tables import SCHEMA

_FORBIDDEN, _READ_ONLY = "42501", "25006"
_UPGRADE_LOCK = 0x77686574  # one upgrade at a time on a database

SchemaState = Literal["empty", "old", "current", "new"]


class DatabaseTooNew(WhetstoneError):
    """A newer Whetstone or Optuna has upgraded this database; this one would misread it."""

    code = "database_too_new"


def upgrade(engine: Engine) -> None:
    """Bring the database to this code's version: Optuna's stock tables, the schema `whetstone`, our indexes.

    Repeating it changes nothing, and two at once wait for each other. Raises `DatabaseUnavailable`; `DatabaseTooNew`
    before anything is touched.
    """
    with translated(engine), _permitted(engine), engine.connect() as guard:
        guard.execution_options(isolation_level="AUTOCOMMIT")
        if stamp.matches(guard):
            _keep_public_first(guard)
            return
        guard.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _UPGRADE_LOCK})
        try:
            _refuse_newer(engine)
            _keep_public_first(guard)
            _upgrade_optuna(engine)
            _upgrade_ours(engine)
        finally:
            with contextlib.suppress(DBAPIError):
                guard.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _UPGRADE_LOCK})


@contextlib.contextmanager
def _permitted(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "pgcode", None)
        if code == _FORBIDDEN:
            remedy = "make that user the database's owner, or run `whetstone db upgrade` as one who may"
            fault = f"refuses to make tables for the user {engine.url.username}"
        elif code == _READ_ONLY:
            remedy = "point DATABASE_URL at the primary server"
            fault = "is read-only"
        else:
            raise
        raise DatabaseUnavailable(f"{place(engine)} {fault}: {remedy}") from error


def check(engine: Engine) -> SchemaState:
    """How the database stands to this code: "empty", "old" (run ``whetstone db upgrade``), "current" or "new"."""
    with transaction(engine) as connection:
        if stamp.matches(connection):
            return "current"
        here = {SCHEMA: _revision(connection, SCHEMA), "public": _revision(connection, "public")}
    ours, optunas = _our_scripts(), _optuna_scripts()
    states = []
    for schema, scripts in ((SCHEMA, ours), ("public", optunas)):
        revision = here[schema]
        known = {script.revision for script in scripts.walk_revisions()}
        if revision is None:
            states.append("empty")
        elif revision not in known:
            states.append("new")
        else:
            states.append("current" if revision == scripts.get_current_head() else "old")
    if "new" in states:
        return "new"
    if states == ["empty", "empty"]:
        return "empty"
    return "old"  # also where both are at their heads: then the functions are another code's


def _refuse_newer(engine: Engine) -> None:
    if check(engine) == "new":
        raise DatabaseTooNew(
            "the database was upgraded by a newer Whetstone or Optuna than this one: "
            "install that version, or set DATABASE_URL to another database"
        )


def _revision(connection: Connection, schema: str) -> str | None:
    table = connection.execute(sa.text("SELECT to_regclass(:name)"), {"name": f"{schema}.alembic_version"}).scalar()
    if table is None:
        return None
    revision: str | None = connection.execute(
        sa.select(sa.column("version_num")).select_from(sa.table("alembic_version", schema=schema))
    ).scalar()
    return revision


def _keep_public_first(connection: Connection) -> None:
    """For stock Optuna too: a user called like our schema would find our `studies` before Optuna's."""
    user, database = connection.execute(sa.text("SELECT current_user, current_database()")).one()
    if user == SCHEMA:
        quote = connection.dialect.identifier_preparer.quote_identifier
        connection.execute(sa.text(f"ALTER ROLE {quote(user)} IN DATABASE {quote(database)} SET search_path TO public"))


def _upgrade_optuna(engine: Engine) -> None:
    from optuna.storages import RDBStorage

    # Its migrations open connections of their own from the address, so the search path travels in it.
    given = engine.url.query.get("options", "")
    options = " ".join([*([given] if isinstance(given, str) else given), "-csearch_path=public"]).strip()
    url = engine.url.update_query_dict({"options": options}).render_as_string(hide_password=False)
    storage = RDBStorage(url, skip_compatibility_check=True, engine_kwargs={"poolclass": sa.NullPool})
    try:
        if storage.get_current_version() != storage.get_head_version():
            with _logging_left_alone():
                storage.upgrade()
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextlib.contextmanager
def _logging_left_alone() -> Iterator[None]:
    """Optuna's migrations configure the process's logging, and silence every logger there is, where none is set up."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _upgrade_ours(engine: Engine) -> None:
    from alembic import command

    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        functions.install(connection)
        stamp.leave(connection)


def _config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _our_scripts() -> Any:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _optuna_scripts() -> Any:
    from alembic.script import ScriptDirectory
    from optuna.storages import _rdb

    return ScriptDirectory(str(Path(_rdb.__file__).parent / "alembic"))
