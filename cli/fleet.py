"""`whetstone workers`: who is at work, and sending one home."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output
from cli.remote import Json, Token, Url, connect

app = typer.Typer(help="See and drain workers.", no_args_is_help=True)


@app.command("list")
def list_workers(url: Url = None, token: Token = None, json: Json = False) -> None:
    """List the workers that have been seen."""
    with connect(url, token) as client:
        workers = client.get("/api/v1/workers")
    if json:
        output.print_json(workers)
        return
    if not workers:
        output.out.print("No workers yet. Start one: whetstone worker")
        return
    rows = [
        [
            output.escape(w["worker"]),
            "stopped" if w["state"] == "stopped" else output.state(w["state"]),  # in good order: nothing to see to
            output.escape(w["device"] or "-"),
            "-" if w["trial"] is None else f"{w['study']}/{w['trial']}",
            str(w["trials_done"]),
            str(w["last_seen"])[:19].replace("T", " "),
        ]
        for w in workers
    ]
    columns = [("worker", "cut"), "state", ("device", "cut"), "study/trial", ("done", "right"), "last seen (UTC)"]
    output.out.print(output.table(None, columns, rows))


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="The worker's name.")], url: Url = None, token: Token = None
) -> None:
    """Let a worker finish its trial and give it no other."""
    with connect(url, token) as client:
        client.post(f"/api/v1/workers/{worker}/drain")
    output.out.print(f"{output.escape(worker)} gets no more trials.")
