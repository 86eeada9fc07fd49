"""`whetstone data`: the data sets on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

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
    where = root or chosen.data_root
    if not output.err.is_terminal:  # in a log, a line for each quarter of a file
        fetching.fetch(where, home=chosen.home_dir, notify=output.say)
        return
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.err, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(output.escape(name))
            bars.update(tasks[name], completed=done, total=total)

        fetching.fetch(where, home=chosen.home_dir, progress=progress, notify=output.say)


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
