"""The `whetstone` command: it composes the coordinator, the API, the workers and the model; none of them knows it.

Every sub-command imports its rooms when it runs, so that `whetstone --help` is quick and a worker's machine needs no
Optuna. Exit codes: 0 done, 1 it could not be done (one line says why), 2 the input was wrong (every fault is named).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from cli import output

ROOMS = {"hpo", "model", "workers", "api", "cli"}
"""An exception class of one of our rooms was raised on purpose: its message is written for people."""

app = typer.Typer(
    name="whetstone",
    help="Self-hosted Bayesian hyperparameter optimisation. Start with: whetstone demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"whetstone {package_version('whetstone')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Self-hosted Bayesian hyperparameter optimisation."""


def register() -> typer.Typer:
    """Hang every command on the tree."""
    from cli import data, database, demo, evaluate, fleet, reproduce, serve, study, token, train, trial, worker

    app.command("serve")(serve.serve)
    app.command("worker")(worker.worker)
    app.command("demo")(demo.demo)
    app.add_typer(study.app, name="study")
    app.add_typer(trial.app, name="trial")
    app.add_typer(fleet.app, name="workers")
    app.command("train")(train.train)
    app.command("evaluate")(evaluate.evaluate)
    app.add_typer(reproduce.app, name="reproduce")
    app.add_typer(data.app, name="data")
    app.add_typer(database.app, name="db")
    app.add_typer(token.app, name="token")
    return app


def main() -> None:
    """Entry point: run the command, and turn what was raised on purpose into one line and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    from hpo.rest import ApiError

    try:
        register()(args=arguments, prog_name="whetstone")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `whetstone ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ApiError as error:
        refuse(error.message, [fault_line(detail) for detail in error.details])
        return 2 if error.status == 422 else 1
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in ROOMS):
            raise  # a bug of ours: the traceback is the report
        faults = getattr(error, "faults", None)
        what, lone, _ = str(error).partition(" has 1 fault")  # a lone fault without a place: the document is the place
        told = [f"{what}: {fault}" if lone and what and not fault.at else str(fault) for fault in faults or ()]
        refuse(_message(error), told)
        return 1 if faults is None else 2
    return 0


def _message(error: Exception) -> str:
    """What an error says to people; the system's own name the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    faults = getattr(error, "faults", ())
    if len(faults) > 1 and str(error) == "; ".join(map(str, faults)):  # each gets a line of its own below
        return f"{len(faults)} faults:"
    return str(error)


def fault_line(detail: object) -> str:
    if isinstance(detail, dict) and "fault" in detail:
        return f"{detail['at']}: {detail['fault']}" if detail.get("at") else str(detail["fault"])
    return str(detail)


def refuse(message: str, details: list[str]) -> None:
    """Print an error: one line, and the faults below it where there are several."""
    if len(details) == 1:
        message, details = details[0], []
    output.err.print(f"[bold red]whetstone:[/] {output.escape(message)}", soft_wrap=True)
    for detail in details:
        output.err.print(f"  {output.escape(detail)}", soft_wrap=True)


if __name__ == "__main__":
    main()
