"""What the way to PostgreSQL promises: one schema, one transaction a thread, one clear error."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine

from hpo import database
from hpo.tables import SCHEMA, metadata


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
    database.upgrade(engine)
    assert database.check(engine) == "current"


def test_x(engine: Engine) -> None:
    with database.transaction(engine) as c:
        print(c.execute(sa.text("select 1")).scalar())
