"""The one way to PostgreSQL: addresses, transactions that a thread shares, retries, and calls of our functions.

Invariant: whatever runs inside `transaction(engine)` on one thread commits together or not at all, however deep it is
nested. A lost server is one error, `DatabaseUnavailable`, of one line and without the password.
"""

from __future__ import annotations

import contextlib
import random
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

import psycopg2  # type: ignore[import-untyped]
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpo.errors import DatabaseUnavailable

T = TypeVar("T")

RESTED_S = 5.0
CALLS = 3

_RETRIABLE = {"40001", "40P01"}  # serialization failure, deadlock: PostgreSQL rolled the whole transaction back
_SHUTTING_DOWN = {"57P01", "57P02", "57P03"}


class CommitUnknown(DatabaseUnavailable):
    """The connection was lost while committing: the transaction may have been stored or not."""

    code = "commit_unknown"


def connect(
    url: str,
    *,
    pool_size: int = 10,
    max_overflow: int = 40,
    pool_timeout_s: float = 30.0,
    connect_timeout_s: int = 5,
) -> Engine:
    """An engine for a PostgreSQL address (``postgres://``, ``postgresql://``, ``+psycopg2``). Opens no connection.

    Raises `DatabaseUnavailable` where the address is none of these.
    """
    engine = sa.create_engine(
        normalise(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=pool_timeout_s,
        connect_args={"connect_timeout": connect_timeout_s, "application_name": "whetstone"},
    )
    event.listen(engine, "connect", _at_home)
    event.listen(engine, "checkin", _rests)
    event.listen(engine, "checkout", _try)
    return engine


def normalise(url: str) -> URL:
    """The address with the driver we use. Raises `DatabaseUnavailable`, never repeating the address."""
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):
        parsed = None
    names = ("postgres", "postgresql", "postgresql+psycopg2")
    if parsed is None or parsed.drivername not in names:
        raise DatabaseUnavailable(
            "DATABASE_URL is no PostgreSQL address: expected postgresql://user:password@host/database"
        )
    return parsed.set(drivername="postgresql+psycopg2")


def _at_home(connection: Any, _record: Any) -> None:
    """Optuna's unqualified names mean schema public, also for a user called like our schema (`"$user"` comes first)."""
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION search_path TO public")
    connection.autocommit = False


def _rests(_connection: Any, record: Any) -> None:
    record.info["rested_at"] = time.monotonic()


def _try(connection: Any, record: Any, _proxy: Any) -> None:
    """Find out whether a pooled connection still stands, before it is used: SQLAlchemy then makes new ones.

    One that was used a moment ago is only listened to (a server that went away has closed it, and nothing is due on
    it otherwise), which costs no round trip; one that has rested is asked.
    """
    rested_at = record.info.get("rested_at")
    if rested_at is None or connection is None or connection.closed:
        return
    try:
        waiting = select.poll()  # select() itself takes no descriptor above 1,023, and every worker has one open here
        waiting.register(connection, select.POLLIN)
        if waiting.poll(0):
            raise InvalidatePoolError("the server has closed the connection")
        if time.monotonic() - rested_at > RESTED_S:
            before, connection.autocommit = connection.autocommit, True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            connection.autocommit = before
    except psycopg2.Error as error:
        raise InvalidatePoolError(str(error)) from error


class _Open(threading.local):
    """The transactions this thread has open, one an engine."""

    def __init__(self) -> None:
        self.by_engine: dict[int, _Transaction] = {}


class _Transaction:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.doomed = False


_open = _Open()


@contextlib.contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Open a transaction, or join the one this thread has open on this engine. It commits at the outermost exit.

    An exception that leaves any block rolls all back: where an outer block swallows it, the outermost exit raises
    RuntimeError instead of committing half. Raises `DatabaseUnavailable` when PostgreSQL does not answer or is lost,
    `CommitUnknown` when it is lost at the commit.
    """
    joined = _open.by_engine.get(id(engine))
    if joined is not None:
        try:
            yield joined.connection
        except BaseException:
            joined.doomed = True
            raise
        return
    try:
        with translated(engine):
            connection = engine.connect()
    except PoolTimeout as error:
        raise DatabaseUnavailable(f"{place(engine)} is busy: every connection of this process is in use") from error
    with contextlib.closing(connection), translated(engine):
        opened = _open.by_engine[id(engine)] = _Transaction(connection)
        begun = connection.begin()
        try:
            yield connection
            if opened.doomed:
                raise RuntimeError("a nested transaction failed and its error was swallowed: nothing was committed")
        except BaseException:
            with contextlib.suppress(DBAPIError):
                begun.rollback()
            raise
        finally:
            del _open.by_engine[id(engine)]
        try:
            begun.commit()
        except DBAPIError as error:
            if _lost(error):
                raise CommitUnknown(_unavailable(engine, "lost at the commit", error)) from error
            raise


def call(engine: Engine, statement: str, values: Mapping[str, Any] | None = None) -> Any:
    """Run one statement that commits as it ends, and return the first column of its first row (None without a row).

    One round trip and at most one commit: for functions of ours (`hpo.functions`), written so that the same call again
    changes nothing. For that reason it is repeated where the connection is lost or PostgreSQL gives way to another.
    `values` are psycopg2's (``%(name)s``). Raises `DatabaseUnavailable`, RuntimeError inside a transaction.
    """
    if in_transaction(engine):
        raise RuntimeError("a call commits by itself: make it outside of the transaction")
    for attempt in range(1, CALLS + 1):
        try:
            with translated(engine):
                return _committing(engine, statement, dict(values or {}))
        except PoolTimeout as error:
            raise DatabaseUnavailable(f"{place(engine)} is busy: every connection is in use") from error
        except DBAPIError as error:
            if attempt == CALLS or getattr(error.orig, "pgcode", None) not in _RETRIABLE:
                raise
        except DatabaseUnavailable:
            if attempt == CALLS:
                raise
        time.sleep(random.uniform(0.5, 1.0) * min(0.02 * 3**attempt, 1.0))
    raise AssertionError("unreachable")


def _committing(engine: Engine, statement: str, values: dict[str, Any]) -> Any:
    """Run a statement that commits by itself, past SQLAlchemy's execution, which would cost more than the round trip.

    The driver's flag is changed without a word to the server. SQLAlchemy's isolation level is not: to set it back is a
    round trip, which fails with an error of the driver's own where the connection was lost since.
    """
    pooled: Any = None
    driver: Any = None
    try:
        pooled = engine.raw_connection()
        driver = pooled.dbapi_connection
        driver.autocommit = True
        try:
            with driver.cursor() as cursor:
                cursor.execute(statement, values)
                row = cursor.fetchone()
        finally:
            if not driver.closed:
                driver.autocommit = False
        return None if row is None else row[0]
    except psycopg2.Error as error:  # of the statement, or of a connection that could not be made
        lost = driver is not None and engine.dialect.is_disconnect(error, driver, None)
        if lost:
            pooled.invalidate(error)
        raise DBAPIError.instance(
            statement, None, error, psycopg2.Error, connection_invalidated=lost, dialect=engine.dialect
        ) from error
    finally:
        if pooled is not None:
            pooled.close()


@contextlib.contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A connection for one statement, which commits as it ends: one round trip. Joins the thread's transaction if any.

    Nothing is repeated. Raises `DatabaseUnavailable`; whether a statement that wrote took effect is then not known.
    """
    if in_transaction(engine):
        with transaction(engine) as connection:
            yield connection
        return
    try:
        with translated(engine), engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.autocommit = True  # as in `_committing`: not by SQLAlchemy's isolation level
            try:
                yield connection
            finally:
                if not driver.closed:
                    driver.autocommit = False
    except PoolTimeout as error:
        raise DatabaseUnavailable(f"{place(engine)} is busy: every connection of this process is in use") from error


def in_transaction(engine: Engine) -> bool:
    """Whether this thread has a transaction open on this engine."""
    return id(engine) in _open.by_engine


def retrying(engine: Engine, work: Callable[[Connection], T], *, attempts: int = 5, idempotent: bool = False) -> T:
    """Run `work` in a transaction; again after a deadlock, a serialization failure, or a connection lost before commit.

    A connection lost at the commit leaves the outcome unknown: only `idempotent` work is run again then. Inside an open
    transaction it runs once, since only the owner of the whole can repeat it.
    """
    if in_transaction(engine):
        with transaction(engine) as connection:
            return work(connection)
    for attempt in range(1, attempts + 1):
        try:
            with transaction(engine) as connection:
                return work(connection)
        except DBAPIError as error:
            if attempt == attempts or getattr(error.orig, "pgcode", None) not in _RETRIABLE:
                raise
        except DatabaseUnavailable as error:
            if attempt == attempts or (isinstance(error, CommitUnknown) and not idempotent):
                raise
        time.sleep(random.uniform(0.5, 1.0) * min(0.02 * 3**attempt, 1.0))
    raise AssertionError("unreachable")


def now(connection: Connection) -> datetime:
    """PostgreSQL's clock at this very moment (not the transaction's start): read it after taking the lock."""
    moment: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return moment


def ping(engine: Engine) -> None:
    """One round trip. Raises `DatabaseUnavailable`."""
    with transaction(engine) as connection:
        connection.execute(sa.text("SELECT 1"))


@contextlib.contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Within it a server that is lost is `DatabaseUnavailable`."""
    try:
        yield
    except DBAPIError as error:
        if _lost(error):
            raise DatabaseUnavailable(_unavailable(engine, "does not answer", error)) from error
        raise


def _lost(error: DBAPIError) -> bool:
    code = getattr(error.orig, "pgcode", None)
    if error.connection_invalidated or code in _SHUTTING_DOWN or (code or "").startswith("08"):
        return True
    # libpq's own failures (refused, timed out, wrong password) come without a code.
    return isinstance(error, OperationalError) and code is None


def _unavailable(engine: Engine, how: str, error: DBAPIError) -> str:
    lines = [line.strip() for line in str(error.orig).splitlines() if line.strip()]
    detail = lines[0] if lines else type(error.orig).__name__
    if engine.url.password:
        detail = detail.replace(str(engine.url.password), "***")
    return f"{place(engine)} {how}: {detail}"


def place(engine: Engine) -> str:
    """Where the server is, for people: without user and password."""
    host = engine.url.host or engine.url.query.get("host") or "the local socket"
    return f"PostgreSQL at {host}:{engine.url.port}" if engine.url.port else f"PostgreSQL at {host}"
