"""`whetstone evaluate`: score a checkpoint on one-shot tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output, scoring, settings, uses
from cli.remote import Json
from cli.train import usable
from hpo.errors import Fault, Invalid

if TYPE_CHECKING:
    from model.spec import TrainConfig

SOURCES = ("auto", "omniglot", "strokes", "mnist", "folder")
LAKE = "Lake's 400 official trials"


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder with best.json, or that file.")],
    tasks: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many one-shot tasks.")] = scoring.TASKS,
    way: Annotated[int, typer.Option(min=2, max=1000, help="Characters to choose among.")] = scoring.WAY,
    shot: Annotated[int, typer.Option(min=1, max=1000, help="Drawings of each, by as many people.")] = 1,
    views: Annotated[
        int, typer.Option(min=0, max=1000, help="Distorted copies beside each image, whose embeddings are averaged.")
    ] = 0,
    across: Annotated[bool, typer.Option("--across", help="Characters of all alphabets, not of one.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks.")] = scoring.FRESH_SEED,
    data: Annotated[
        str, typer.Option(help="auto (what it was trained on), omniglot, strokes, mnist, folder.")
    ] = "auto",
    test: Annotated[
        bool, typer.Option("--test", help="Lake's 400 official trials instead: once, at the very end.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    json: Json = False,
) -> None:
    """Score a checkpoint on validation tasks it has not seen, beside 1-nearest neighbour and chance."""
    from model import baseline, dataset, episode
    from model import evaluate as evaluation

    faults = []
    if data not in SOURCES:
        faults.append(Fault("--data", f"must be one of {', '.join(SOURCES)}"))
    asked = {
        "--tasks": tasks != scoring.TASKS,
        "--way": way != scoring.WAY,
        "--shot": shot != 1,
        "--across": across,
        "--seed": seed != scoring.FRESH_SEED,
        "--data": data != "auto",
    }
    if test and any(asked.values()):
        named = " and ".join(option for option, changed in asked.items() if changed)
        faults.append(
            Fault("--test", f"are 400 given trials of 20 ways and one shot within an alphabet: leave {named} out")
        )
    if faults:
        raise Invalid(faults, "the command")
    chosen = settings.load()
    device = usable(device)
    net, config, metrics, trained_on = evaluation.load(checkpoint, device)
    if data == "folder" and config.folder is None:
        what = f"folder is for networks that were trained on one; this one was trained on {trained_on or config.data}"
        raise Invalid([Fault("--data", what)], "the command")
    if test:
        drawings, episodes = episode.lake_runs(chosen.data_root, config.net.input)
        name, seen = LAKE, drawings.coloured() if config.net.channels == 3 else drawings
    else:
        roots: dict[str, Any] = {"data_root": chosen.data_root, "home": chosen.home_dir}
        wanted = trained_with(config, trained_on) | ({} if data == "auto" else {"source": data})
        loaded = dataset.load(**wanted, **roots, notify=output.say)
        drawings, name = loaded.validation, f"{loaded.name}, validation alphabets"
        episodes, seen = episode.draw(drawings, tasks, way, seed, shot=shot, across=across), drawings
    used: dict[str, Any] = {}
    if test:
        with uses.recorded(checkpoint, "lake_runs", "whetstone evaluate --test") as use:
            score = evaluation.one_shot(net, seen.to(device), episodes, views=views)
            use.score(score.accuracy, score.tasks)
        used["test_uses"] = use.count
    else:
        score = evaluation.one_shot(net, seen.to(device), episodes, views=views)
    nearest = scoring.row(baseline.nearest_neighbour(drawings, episodes), len(episodes))
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "tasks_from": name,
        "way": episodes.way,
        "shot": episodes.shot,
        "views": views,
        "across_alphabets": across,
        "tasks": score.tasks,
        "correct": score.correct,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "nearest_neighbour": nearest["accuracy"],
        "chance": baseline.chance(episodes.way),
        "while_training": metrics.get("accuracy"),
        **used,
    }
    if json:
        output.print_json(result)
        return
    shots = "one-shot" if episodes.shot == 1 else f"{episodes.shot}-shot"
    kind = f"{score.tasks:,} {episodes.way}-way {shots} tasks{' across alphabets' if across else ''}"
    output.out.print(f"{kind} ({output.escape(name)})\n")
    rows = [
        ["this network", f"[bold green]{output.percent(score.accuracy)}[/]", _bounds(score.interval)],
        ["pixel 1-nearest neighbour", output.percent(nearest["accuracy"]), _bounds(nearest["interval"])],
        ["chance", output.percent(result["chance"]), ""],
    ]
    output.out.print(output.table(None, ["", ("accuracy", "right"), ("95% interval", "right")], rows))
    if test:
        output.out.print(f"\n{uses.told(use.count)}")


def _bounds(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def trained_with(config: TrainConfig, trained_on: str) -> dict[str, Any]:
    """The data set that a checkpoint was trained on, as `model.dataset.load` takes it."""
    return config.wanted | ({"source": trained_on} if config.data == "auto" and trained_on else {})
