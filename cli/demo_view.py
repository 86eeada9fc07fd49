"""What the demo shows: a line for each finished trial, the live progress, and the table at the end."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli import output

FINISHED = ("complete", "infeasible", "pruned", "failed")
BASELINES = {
    "untrained": "untrained network",
    "nearest_neighbour": "pixel 1-nearest neighbour",
    "chance": "chance",
}


def finished(study: dict[str, Any]) -> int:
    """How many trials of a study are over (cancelled ones do not count)."""
    return sum(study["counts"][state] for state in FINISHED)


def trial_line(trial: dict[str, Any], study: dict[str, Any]) -> str:
    """One finished trial, with the reason where it did not complete."""
    best = study["best"] and study["best"]["trial"] == trial["trial"]
    why = trial["reason"] if trial["state"] != "complete" else ""
    again = f"  attempt {trial['attempts']}" if trial["attempts"] > 1 else ""
    value = "" if trial["state"] == "infeasible" else output.value_of(trial, "siamese")
    return (
        f"  trial {trial['trial']:>2}   {output.state(trial['state'])}{'':{10 - len(trial['state'])}} "
        f"{value:>6}   {output.seconds(trial['seconds']):>7}{again}"
        f"{'   [green]best so far[/]' if best else ''}[dim]{'   ' + output.escape(why[:60]) if why else ''}[/]"
    )


def progress(
    study: dict[str, Any], running: list[dict[str, Any]], elapsed: float, left: float | None
) -> RenderableType:
    """The live part: trials done, running, best so far, time left."""
    done = finished(study)
    total = study["budget"]["trials"] or done
    head = Table.grid(padding=(0, 2))
    head.add_row(
        "",
        ProgressBar(total=total, completed=done, width=16),
        f"[bold]{done}[/] of {total} trials",
        f"best [bold green]{output.value_of(study['best'], 'siamese')}[/]",
        f"{output.seconds(elapsed)}, {_left(left)}",
    )
    rows = Table.grid(padding=(0, 2))
    for trial in sorted(running, key=lambda t: int(t["trial"])):
        epoch = "starting" if trial["epoch"] is None else f"epoch {trial['epoch']}"
        rows.add_row(
            f"  trial {trial['trial']:>2}", output.state("running"), epoch, output.escape(trial["worker"] or "")
        )
    return Group(Text(), head, rows)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "..."
    return f"about {output.seconds(seconds)} left" if seconds >= 1 else "nearly done"


def result_table(result: dict[str, Any]) -> RenderableType:
    """The best trials with 95% intervals next to what costs nothing, then their hyperparameters by layer."""
    scores = [
        [f"trial {row['trial']}", f"[bold green]{output.percent(row['accuracy'])}[/]", interval(row["interval"])]
        for row in result["top"]
    ]
    for key, name in BASELINES.items():
        line = result["baselines"][key]
        bounds = interval(line["interval"]) if "interval" in line else ""
        scores.append([name, output.percent(line["accuracy"]), bounds])
    labels = list(next(iter(result["best"]["params"].values())))
    points: list[list[str]] = []
    for row in result["top"]:
        for position, (name, values) in enumerate(row["params"].items()):
            trial = f"trial {row['trial']}" if position == 0 else ""
            points.append([trial, name, *(output.show(values[label]) for label in labels)])
        points.append([""] * (2 + len(labels)))
    return Group(
        output.table(None, ["", ("accuracy", "right"), ("95% interval", "right")], scores),
        Text(),
        output.table(None, ["", "", *((label, "right") for label in labels)], points[:-1]),
    )


def interval(bounds: list[float]) -> str:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def next_commands(result: dict[str, Any], home: Path, *, serving: bool) -> list[tuple[str, str]]:
    """Commands to copy, each with what it does."""
    given = {"WHETSTONE_DATA": os.environ.get("WHETSTONE_DATA"), "WHETSTONE_HOME": os.path.relpath(home)}
    where = "".join(f"{name}={shlex.quote(value)} " for name, value in given.items() if value)
    tool = os.path.relpath(Path(sys.executable).absolute().parent / "whetstone")
    commands = [
        (f"{where}{tool} evaluate {os.path.relpath(result['best']['checkpoint'])}", "score the best network again")
    ]
    if not serving:
        commands += [
            (
                f"{where}{tool} demo --trials {result['trials'] + 20} --serve",
                "go on with this study, leave its pages up",
            ),
            (f"{where}{tool} serve", "browse it, and launch studies of your own"),
        ]
    if result["data"] != "omniglot":
        commands.append((f"{where}{tool} data fetch", "get Omniglot, Lake's runs and MNIST"))
    return commands
