"""The mark of an upgrade: a database that has it is not compared again, and any doubt brings the comparison back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from hpo import schema, stamp

START = """
import sys
from hpo import database, schema
engine = database.connect(sys.argv[1])
schema.upgrade(engine)
assert schema.check(engine) == "current"
print(sorted({"alembic", "optuna"} & sys.modules.keys()))
"""


def test_a_start_on_a_current_database_needs_no_alembic(postgres_url: str) -> None:
    ran = subprocess.run([sys.executable, "-c", START, postgres_url], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE whetstone.alembic_version SET version_num = '0001'",
        "UPDATE public.alembic_version SET version_num = 'v3.0.0.d'",
        "INSERT INTO public.alembic_version VALUES ('two heads')",
        "DELETE FROM public.alembic_version",
        "DROP FUNCTION whetstone.stamp",
        "DROP TABLE whetstone.alembic_version",
    ],
)
def test_a_database_that_was_changed_since_is_looked_at_whole(engine: Engine, change: str) -> None:
    with engine.begin() as connection:
        assert stamp.matches(connection)
        connection.execute(sa.text(change))
        assert not stamp.matches(connection)


def test_another_version_of_the_code_is_another_stamp(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "9999_next.py").write_text("revision = '9999'")
    with engine.connect() as connection:
        with monkeypatch.context() as other:
            other.setattr(stamp, "_MIGRATIONS", tmp_path)
            assert not stamp.matches(connection)
        with monkeypatch.context() as other:
            other.setattr(stamp, "version", lambda _: "6.0.0")
            assert not stamp.matches(connection)
        assert stamp.matches(connection)


def test_a_stamp_that_is_gone_is_put_back_by_the_next_upgrade(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP FUNCTION whetstone.stamp"))
    assert schema.check(engine) == "old"
    schema.upgrade(engine)
    assert schema.check(engine) == "current"


def test_an_upgrade_leaves_no_function_of_another_version_behind(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP FUNCTION whetstone.stamp"))
        connection.execute(sa.text("DROP FUNCTION whetstone.settle"))
        connection.execute(sa.text("CREATE FUNCTION whetstone.settle(integer) RETURNS integer LANGUAGE sql RETURN 1"))
        connection.execute(sa.text("CREATE FUNCTION whetstone.settle(text) RETURNS integer LANGUAGE sql RETURN 1"))
    schema.upgrade(engine)
    found = sa.text("SELECT oid::regprocedure::text, prorettype::regtype::text FROM pg_proc WHERE proname = 'settle'")
    with engine.connect() as connection:
        assert connection.execute(found).all() == [("whetstone.settle(integer)", "void")]
