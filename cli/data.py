"""`whetstone data`: the data sets on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import output, settings
from cli.remote import Json

app = typer.Typer(help="Fetch and check Omniglot, Lake's runs and MNIST.", no_args_is_help=True)


@app.command()
def fetch(
    root: Annotated[
        Path | None, typer.Option(help="Where to put them. Default WHETSTONE_DATA, else HOME/data.", file_okay=False)
    ] = None,
) -> None:
    """Download the data sets (about 25 MB), check them, and pack Omniglot for fast loading."""
    from model import fetch as fetching

    chosen = settings.load()
    fetching.fetch(root or chosen.data_root, home=chosen.home_dir, notify=output.say)


@app.command()
def info(json: Json = False) -> None:
    """Say which data sets are there, where, and whether their counts are right."""
    from model import fetch as fetching

    chosen = settings.load()
    root = chosen.data_root
    found = fetching.info(root, home=chosen.home_dir)
    if json:
        output.print_json(found)
        return
    rows = [[output.escape(row["name"]), row["state"], output.escape(row["detail"])] for row in found["sets"]]
    output.out.print(f"Data root: {output.escape(str(root))}")
    output.out.print(output.table(None, ["data set", "state", "detail"], rows))
