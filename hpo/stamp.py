"""The mark that an upgrade leaves in the database, by which the next start knows that there is nothing to do.

To compare two Alembic histories takes most of a second of imports; to read the stamp, two statements. It names this
code's migrations and functions, Optuna's version, and the revisions that the upgrade ended at. The invariant: a stamp
that matches was left by an upgrade that would be repeated word for word; any doubt is no match.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from hpo import functions

_MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

# The revisions that both schemas are at, and what is there to be asked. A table that is missing is NULL, not an error.
_THERE = sa.text("""
    SELECT to_regclass('whetstone.alembic_version') IS NOT NULL AND to_regclass('public.alembic_version') IS NOT NULL
       AND to_regprocedure('whetstone.stamp()') IS NOT NULL
""")
_REVISIONS = sa.text("""
    SELECT (SELECT string_agg(version_num, ',') FROM whetstone.alembic_version) || ' '
        || (SELECT string_agg(version_num, ',') FROM public.alembic_version)
""")
_STAMP = sa.text("SELECT whetstone.stamp()")


def leave(connection: Connection) -> None:
    """Stamp a database that was just brought up to date, in the transaction of the upgrade."""
    connection.exec_driver_sql(
        "CREATE OR REPLACE FUNCTION whetstone.stamp() RETURNS text LANGUAGE sql IMMUTABLE "
        f"AS $$ SELECT '{_stamp(connection)}' $$"
    )


def matches(connection: Connection) -> bool:
    """Whether the database is as an upgrade by this very code would leave it."""
    if not connection.execute(_THERE).scalar():
        return False
    return bool(connection.execute(_STAMP).scalar() == _stamp(connection))


def _stamp(connection: Connection) -> str:
    files = sorted(_MIGRATIONS.glob("*.py"))
    code = "\0".join([version("optuna"), functions.digest(), *(f"{file.name}\0{file.read_text()}" for file in files)])
    return f"{hashlib.sha256(code.encode()).hexdigest()} {connection.execute(_REVISIONS).scalar()}"
