"""What the way to PostgreSQL promises: one schema, one transaction a thread, one clear error."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import optuna
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from optuna.storages import RDBStorage
from sqlalchemy import Connection, Engine

from hpo import database, schema
from hpo.database import CommitUnknown, in_transaction, retrying, transaction
from hpo.errors import DatabaseUnavailable
from hpo.tables import SCHEMA, metadata


@pytest.fixture
def counter(engine: Engine) -> Engine:
    """An engine on a database with a table of two rows to fight over."""
    with transaction(engine) as connection:
        connection.execute(
            sa.text("CREATE TABLE counter AS SELECT n AS id, 0 AS value FROM generate_series(1, 2) AS n")
        )
        connection.execute(sa.text("ALTER TABLE counter ADD PRIMARY KEY (id)"))
    return engine


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    engine = database.connect(empty_url)
    yield engine
    engine.dispose()


def bump(connection: Connection, row: int = 1) -> None:
    connection.execute(sa.text("UPDATE counter SET value = value + 1 WHERE id = :row"), {"row": row})


def value(engine: Engine, row: int = 1) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT value FROM counter WHERE id = :row"), {"row": row}).scalar_one())


def cut(engine: Engine, connection: Connection) -> None:
    """Take the server's side of a connection away, as a restart of the server does."""
    pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    with engine.connect() as other:
        # The second argument waits until it is really gone.
        other.execute(sa.text("SELECT pg_terminate_backend(:pid, 60000)"), {"pid": pid})


# The schema


def test_migrations_make_exactly_the_tables_that_queries_are_written_against(postgres_url: str) -> None:
    # With nothing of ours on the search path, PostgreSQL names every table with its schema, as our definitions do.
    engine = sa.create_engine(postgres_url, connect_args={"options": "-csearch_path=pg_catalog"})
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table_schema": SCHEMA,
                "include_schemas": True,
                "include_name": lambda name, kind, _: name == SCHEMA if kind == "schema" else True,
                "include_object": lambda thing, _n, kind, _r, _c: kind != "table" or thing.schema == SCHEMA,
                "compare_type": True,
                "compare_server_default": True,
            },
        )
        differences = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []


def test_upgrading_again_changes_nothing(engine: Engine) -> None:
    def stamp() -> list[object]:
        with engine.connect() as connection:
            return [
                connection.execute(sa.text(statement)).all()
                for statement in (
                    "SELECT * FROM alembic_version",
                    "SELECT * FROM whetstone.alembic_version",
                    "SELECT * FROM version_info",
                    "SELECT oid, relname FROM pg_class ORDER BY oid",
                )
            ]

    before = stamp()
    schema.upgrade(engine)
    assert stamp() == before
    assert schema.check(engine) == "current"


def test_two_upgrades_at_once_make_one_schema(empty: Engine) -> None:
    assert schema.check(empty) == "empty"
    faults: list[BaseException] = []

    def upgrade() -> None:
        try:
            schema.upgrade(empty)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert schema.check(empty) == "current"


def test_a_database_that_stock_optuna_made_is_taken_as_it_is(empty: Engine, empty_url: str) -> None:
    study = optuna.create_study(storage=RDBStorage(empty_url), study_name="before us")
    study.enqueue_trial({"x": 1.0})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 2), n_trials=2)
    assert schema.check(empty) == "old"
    schema.upgrade(empty)
    assert schema.check(empty) == "current"
    again = optuna.load_study(study_name="before us", storage=RDBStorage(empty_url))
    assert again.trials == study.trials


def test_optunas_own_migrations_are_run_and_leave_our_logging_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v3.0.0.d'"))
    assert schema.check(engine) == "old"
    # pytest's handlers would hide it: a process whose logging nobody has set up yet.
    program = """
import logging, sys
from hpo import database, schema
log = logging.getLogger("ours")
engine = database.connect(sys.argv[1])
schema.upgrade(engine)
print(schema.check(engine), log.disabled, logging.getLogger().handlers)
"""
    url = engine.url.render_as_string(hide_password=False)
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "current False []", done.stderr


@pytest.mark.parametrize("where", ["public", SCHEMA])
def test_a_database_of_newer_code_is_refused_untouched(engine: Engine, where: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {where}.alembic_version SET version_num = 'from the future'"))
        connection.execute(sa.text("DROP INDEX whetstone_trials_state"))
    assert schema.check(engine) == "new"
    with pytest.raises(schema.DatabaseTooNew, match=r"newer Whetstone or Optuna .* DATABASE_URL"):
        schema.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT to_regclass('whetstone_trials_state')")).scalar() is None


def test_a_user_called_like_our_schema_still_finds_optunas_tables(empty: Engine, empty_url: str) -> None:
    # PostgreSQL looks into the schema of the user's own name before it looks into public.
    url = sa.make_url(empty_url)
    with empty.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = 'whetstone'")).scalar():
            pytest.skip("this server has a user of that name, who is left alone")
        connection.execute(sa.text("CREATE ROLE whetstone LOGIN PASSWORD 'secret'"))
        connection.execute(sa.text(f'ALTER DATABASE "{url.database}" OWNER TO whetstone'))
        connection.execute(sa.text("GRANT ALL ON SCHEMA public TO whetstone"))
    query = {name: text for name, text in url.query.items() if name != "passfile"}
    theirs = url.set(username="whetstone", password="secret", query=query).render_as_string(hide_password=False)
    engine = database.connect(theirs)
    try:
        for _ in range(2):
            schema.upgrade(engine)
        stock = RDBStorage(theirs)
        study = optuna.create_study(storage=stock, study_name="stock")
        assert [row.study_name for row in stock.get_all_studies()] == ["stock"]
        assert study.trials == []
        stock.engine.dispose()
        # A dump that is restored elsewhere loses that setting of the user's; our own connections do without it.
        with engine.begin() as connection:
            connection.execute(sa.text(f'ALTER ROLE whetstone IN DATABASE "{url.database}" RESET ALL'))
        engine.dispose()
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT study_name FROM studies")).scalar() == "stock"
    finally:
        engine.dispose()
        with empty.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("REASSIGN OWNED BY whetstone TO CURRENT_USER"))
            connection.execute(sa.text("DROP OWNED BY whetstone"))
            connection.execute(sa.text("DROP ROLE whetstone"))


# Transactions


def test_nested_transactions_are_one_and_commit_at_the_outermost_exit(counter: Engine) -> None:
    with transaction(counter) as outer:
        with transaction(counter) as inner:
            assert inner is outer
            bump(inner)
        assert in_transaction(counter)
        assert value(counter) == 0
    assert not in_transaction(counter)
    assert value(counter) == 1


def test_an_exception_rolls_all_back(counter: Engine) -> None:
    def fail() -> None:
        with transaction(counter) as outer:
            bump(outer)
            with transaction(counter) as inner:
                bump(inner, 2)
                raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert (value(counter), value(counter, 2)) == (0, 0)
    with transaction(counter) as after:
        bump(after)
    assert value(counter) == 1


def test_half_a_transaction_is_never_committed_by_swallowing_its_error(counter: Engine) -> None:
    def swallow() -> None:
        with transaction(counter) as outer:
            bump(outer)
            try:
                with transaction(counter) as inner:
                    bump(inner, 2)
                    raise LookupError
            except LookupError:
                pass

    with pytest.raises(RuntimeError, match="nothing was committed"):
        swallow()
    assert (value(counter), value(counter, 2)) == (0, 0)


def test_threads_and_engines_do_not_share_a_transaction(counter: Engine, postgres_url: str) -> None:
    seen: list[bool] = []
    second = database.connect(postgres_url)
    with transaction(counter) as connection:
        thread = threading.Thread(target=lambda: seen.append(in_transaction(counter)))
        thread.start()
        thread.join()
        seen.append(in_transaction(second))
        with transaction(second) as other:
            assert other is not connection
    second.dispose()
    assert seen == [False, False]


def test_time_is_read_when_asked_not_when_the_transaction_began(engine: Engine) -> None:
    with transaction(engine) as connection:
        first = database.now(connection)
        connection.execute(sa.text("SELECT pg_sleep(0.05)"))
        later = database.now(connection)
    assert later - first >= timedelta(seconds=0.05)
    assert abs(later - datetime.now(UTC)) < timedelta(minutes=1)


# Retries


def test_deadlocked_work_is_done_again(counter: Engine) -> None:
    both_hold_one = threading.Barrier(2)
    faults: list[BaseException] = []
    tries = [0, 0]

    def work(first: int, second: int) -> None:
        def once(connection: Connection) -> None:
            tries[first - 1] += 1
            bump(connection, first)
            if tries[first - 1] == 1:
                both_hold_one.wait(60)
            bump(connection, second)

        try:
            retrying(counter, once)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=order) for order in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert (value(counter), value(counter, 2)) == (2, 2)
    assert sum(tries) == 3


def test_work_whose_connection_is_lost_before_the_commit_is_done_again(counter: Engine) -> None:
    tries = 0

    def once(connection: Connection) -> str:
        nonlocal tries
        tries += 1
        bump(connection)
        if tries == 1:
            cut(counter, connection)
            bump(connection)
        return "done"

    assert retrying(counter, once) == "done"
    assert (tries, value(counter)) == (2, 1)


def test_work_lost_at_the_commit_is_done_again_only_if_that_does_no_harm(counter: Engine) -> None:
    tries = 0

    def once(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        bump(connection)
        if tries == 1:
            cut(counter, connection)

    with pytest.raises(CommitUnknown, match="lost at the commit"):
        retrying(counter, once)
    assert tries == 1
    tries = 0
    retrying(counter, once, idempotent=True)
    assert (tries, value(counter)) == (2, 1)


def test_an_error_of_the_work_itself_is_not_retried(counter: Engine) -> None:
    tries = 0

    def once(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        connection.execute(sa.text("SELECT 1 / 0"))

    with pytest.raises(sa.exc.DataError):
        retrying(counter, once)
    assert tries == 1


def test_a_pooled_connection_that_died_meanwhile_is_replaced_unseen(engine: Engine) -> None:
    with transaction(engine) as connection:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
    killer = database.connect(engine.url.render_as_string(hide_password=False))
    with killer.connect() as other:
        assert other.execute(sa.text("SELECT pg_terminate_backend(:pid, 60000)"), {"pid": pid}).scalar()
    killer.dispose()
    with transaction(engine) as connection:
        assert connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() != pid


# One error


@pytest.mark.parametrize(
    "url", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg2://u:p@h/d", " postgresql://u:p@h/d\n"]
)
def test_the_usual_addresses_mean_the_same(url: str) -> None:
    assert database.connect(url).url.render_as_string(hide_password=False) == "postgresql+psycopg2://u:p@h/d"


@pytest.mark.parametrize("url", ["", "sqlite:///x.db", "mysql://u:hidden@h/d", "postgresql://u:hidden@h:port/d", "//"])
def test_any_other_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="DATABASE_URL") as refused:
        database.connect(url)
    assert "hidden" not in str(refused.value)


def test_a_server_that_does_not_answer_is_one_line_without_the_password() -> None:
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        engine = database.connect(f"postgresql://somebody:hidden@127.0.0.1:{port}/d")
        for call in (database.ping, schema.upgrade, schema.check):
            with pytest.raises(DatabaseUnavailable, match=f"127.0.0.1:{port} does not answer") as refused:
                call(engine)
            assert "\n" not in str(refused.value)
            assert "hidden" not in str(refused.value)


@pytest.mark.skipif("WHETSTONE_TEST_DATABASE_URL" in os.environ, reason="that server may ask for no password")
def test_a_wrong_password_is_said_without_it(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = sa.make_url(postgres_url)
    query = {name: text for name, text in url.query.items() if name != "passfile"}
    engine = database.connect(url.set(password="hidden", query=query).render_as_string(hide_password=False))
    with pytest.raises(DatabaseUnavailable, match="authentication failed") as refused:
        database.ping(engine)
    assert "hidden" not in str(refused.value) + caplog.text


def test_a_server_lost_in_the_middle_is_the_same_error(counter: Engine) -> None:
    def work() -> None:
        with transaction(counter) as connection:
            cut(counter, connection)
            bump(connection)

    with pytest.raises(DatabaseUnavailable):
        work()


def test_a_user_who_may_not_make_tables_is_told_what_to_do(empty: Engine) -> None:
    role = f"{empty.url.database}_guest"
    with empty.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'"))
    query = {name: text for name, text in empty.url.query.items() if name != "passfile"}
    url = empty.url.set(username=role, password="secret", query=query).render_as_string(hide_password=False)
    engine = database.connect(url)
    try:
        with pytest.raises(DatabaseUnavailable, match=f"refuses to make tables for the user {role}.*db upgrade"):
            schema.upgrade(engine)
    finally:
        engine.dispose()
        with empty.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"DROP ROLE {role}"))


def test_a_process_out_of_connections_says_so(postgres_url: str) -> None:
    engine = database.connect(postgres_url, pool_size=1, max_overflow=0, pool_timeout_s=0.2)
    with engine.connect(), pytest.raises(DatabaseUnavailable, match="every connection of this process is in use"):
        database.ping(engine)
    engine.dispose()
