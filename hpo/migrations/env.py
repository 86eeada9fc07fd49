"""How Alembic runs our steps: on the connection `schema.upgrade` hands over, with the version table in our schema."""

from typing import Any

from alembic import context

from hpo.tables import SCHEMA, metadata


def ours(name: str | None, kind: str, parents: Any) -> bool:
    """Of the whole database, look at our schema only."""
    return name == SCHEMA if kind == "schema" else True


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    include_name=ours,
)
with context.begin_transaction():
    context.run_migrations()
