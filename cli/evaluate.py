"""`whetstone evaluate`: score a checkpoint on one-shot tasks."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import output, scoring, settings
from cli.remote import Json
from cli.train import usable
from hpo.errors import Fault, Invalid


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder with best.json, or that file.")],
    tasks: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many one-shot tasks.")] = scoring.TASKS,
    way: Annotated[int, typer.Option(min=2, max=1000, help="Characters to choose among.")] = scoring.WAY,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks.")] = scoring.FRESH_SEED,
    data: Annotated[str, typer.Option(help="omniglot, strokes, or auto: what it was trained on.")] = "auto",
    test: Annotated[
        bool, typer.Option("--test", help="Lake's 400 official trials instead: once, at the very end.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    json: Json = False,
) -> None:
    """Score a checkpoint on validation tasks it has not seen, beside 1-nearest neighbour and chance."""
    from model import baseline, dataset, episode
    from model import evaluate as evaluation

    if data not in ("auto", "omniglot", "strokes"):
        raise Invalid([Fault("--data", "must be auto, omniglot or strokes")], "the command")
    chosen = settings.load()
    device = usable(device)
    net, config, metrics, trained_on = evaluation.load(checkpoint, device)
    if test:
        drawings, episodes = episode.lake_runs(chosen.data_root, config.net.input)
        name = "Lake's official trials"
        _record_test(checkpoint)
    else:
        source: Any = trained_on or "auto" if data == "auto" else data
        loaded = dataset.load(
            config.net.input, source=source, data_root=chosen.data_root, home=chosen.home_dir, notify=output.say
        )
        drawings, name = loaded.validation, f"{loaded.name}, validation alphabets"
        episodes = episode.draw(drawings, tasks, way, seed)
    score = evaluation.one_shot(net, drawings.to(device), episodes)
    nearest = scoring.row(baseline.nearest_neighbour(drawings, episodes), len(episodes))
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "tasks_from": name,
        "way": episodes.way,
        "tasks": score.tasks,
        "correct": score.correct,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "nearest_neighbour": nearest["accuracy"],
        "chance": baseline.chance(episodes.way),
        "while_training": metrics.get("accuracy"),
    }
    if json:
        output.print_json(result)
        return
    output.out.print(f"{score.tasks:,} {episodes.way}-way one-shot tasks ({name})\n")
    rows = [
        ["this network", f"[bold green]{output.percent(score.accuracy)}[/]", _bounds(score.interval)],
        ["pixel 1-nearest neighbour", output.percent(nearest["accuracy"]), _bounds(nearest["interval"])],
        ["chance", output.percent(result["chance"]), ""],
    ]
    output.out.print(output.table(None, ["", ("accuracy", "right"), ("95% interval", "right")], rows))


def _bounds(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _record_test(checkpoint: Path) -> None:
    """Leave a line beside the checkpoint: test data that is looked at often is no test any more."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    with (folder / "test-uses.jsonl").open("a") as file:
        file.write(jsonlib.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "what": "lake_runs"}) + "\n")
