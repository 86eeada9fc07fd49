"""`whetstone db`: the schema."""

from __future__ import annotations

import typer

from cli import output, settings, store

app = typer.Typer(help="Look after the database.", no_args_is_help=True)


@app.callback()
def database() -> None:
    """Look after the database."""


@app.command()
def upgrade() -> None:
    """Create or upgrade the tables (Optuna's and ours) at DATABASE_URL, or in the embedded PostgreSQL."""
    with store.open_store(settings.load(), migrate=True):
        output.out.print("The database is up to date.")
