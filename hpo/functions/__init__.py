"""What PostgreSQL does in one call: the functions of the schema `whetstone`, one file each, made anew by every upgrade.

A function is VOLATILE where it writes: under READ COMMITTED each of its statements then sees what was committed when
that statement began, so it may take a lock and read what the lock protects, in one round trip and one commit. They are
called through `database.call`, outside of any transaction. Invariant: the functions of a database are those of the
code that upgraded it last; `installed` tells whether they are ours.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

_FOLDER = Path(__file__).parent

# Where both histories stand: ours, and Optuna's.
_AT = """
    (SELECT string_agg(version_num, ' ') FROM whetstone.alembic_version) || ' '
    || (SELECT string_agg(version_num, ' ') FROM public.alembic_version)
"""
_REVISIONS = sa.text(f"SELECT {_AT}")
_MARK = sa.text(f"SELECT whetstone.functions_digest(), {_AT}")


def sources() -> dict[str, str]:
    """The text of each function's file by its name, in the order in which they are made."""
    return {path.stem: path.read_text("utf-8") for path in sorted(_FOLDER.glob("*.sql"))}


def digest() -> str:
    """What tells one version of this code, as far as the schema goes, from another."""
    parts = [f"{name}\0{text}" for name, text in sources().items()]
    parts += [path.name for path in sorted((_FOLDER.parent / "migrations" / "versions").glob("*.py"))]
    return hashlib.sha256("\0".join([*parts, version("optuna")]).encode()).hexdigest()


def install(connection: Connection) -> None:
    """Make the functions, or replace those of another version, in the caller's transaction.

    It is the last step of an upgrade: both histories of the schema are at the code's heads.
    """
    connection.exec_driver_sql("SET LOCAL check_function_bodies = off")  # they call each other, in no order
    for text in sources().values():
        connection.exec_driver_sql(text.replace("%", "%%"))
    mark = f"{digest()} {connection.execute(_REVISIONS).scalar_one()}"
    connection.exec_driver_sql(
        "CREATE OR REPLACE FUNCTION whetstone.functions_digest() RETURNS text LANGUAGE sql IMMUTABLE "
        f"AS $$ SELECT '{mark}' $$"
    )


def installed(connection: Connection) -> bool:
    """Whether the last upgrade of the database was this code's, and neither schema has moved since."""
    there = connection.execute(sa.text("SELECT to_regprocedure('whetstone.functions_digest()')")).scalar()
    if there is None:
        return False
    mark, revisions = connection.execute(_MARK).one()
    return bool(mark == f"{digest()} {revisions}")
