"""What PostgreSQL does in one call: the functions of the schema `whetstone`, one file each, made anew by every upgrade.

A function is VOLATILE where it writes: under READ COMMITTED each of its statements then sees what was committed when
that statement began, so it may take a lock and read what the lock protects, in one round trip and one commit. They are
called through `database.call`, outside of any transaction. Invariant: the functions of a database are those of the
code that upgraded it last (`hpo.stamp` tells whether they are ours).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

_FOLDER = Path(__file__).parent

# Replacing would leave one whose arguments have changed beside the new one, and refuse another type of answer.
_THERE = sa.text("SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'whetstone'::regnamespace")


def sources() -> dict[str, str]:
    """The text of each function's file by its name, in the order in which they are made."""
    return {path.stem: path.read_text("utf-8") for path in sorted(_FOLDER.glob("*.sql"))}


def digest() -> str:
    """What tells one version of all the functions from another."""
    return hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources().items()).encode()).hexdigest()


def install(connection: Connection) -> None:
    """Make the functions in place of those of another version, in the caller's transaction."""
    for gone in connection.execute(_THERE).scalars().all():
        connection.exec_driver_sql(f"DROP ROUTINE {gone}")
    connection.exec_driver_sql("SET LOCAL check_function_bodies = off")  # they call each other, in no order
    for text in sources().values():
        connection.exec_driver_sql(text.replace("%", "%%"))
