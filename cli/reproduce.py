"""`whetstone reproduce`: the experiments of the paper, trained and tabled beside its figures.

Each command trains what it needs (or takes a checkpoint), scores it, and leaves a table, its JSON and a plot. Of all
`whetstone` commands these and `evaluate --test` alone touch test data, and each use is recorded with the checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cli import output
from cli.remote import Json
from hpo.errors import Fault, Invalid

app = typer.Typer(
    help="The paper's experiments beside its figures: tables and plots. `--scale` shrinks them, and they say so.",
    no_args_is_help=True,
)

Scale = Annotated[
    float,
    typer.Option(
        min=1e-4,
        max=1.0,
        help="Share of the paper's work: pairs and epochs shrink by its square root, and below 0.1 images and network "
        "do too. 1 is the paper's (hours on a large GPU), 0.1 is days on a CPU core, 0.01 minutes.",
    ),
]
Into = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder for runs, table and plot; default reproduction/NAME.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the training.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto (a CUDA device, or the CPU), cpu, cuda or cuda:N.")]
Given = Annotated[
    Path | None, typer.Option(help="Score this one, a folder with best.json, and train none.", show_default=False)
]
Source = Annotated[str, typer.Option(help="omniglot, or strokes to try the command without it.")]
Tasks = Annotated[int, typer.Option(min=1, max=1_000_000, help="Tasks for each figure.")]


@app.command()
def verification(
    scale: Scale = 1.0,
    into: Into = None,
    data: Source = "omniglot",
    seed: Seed = 1,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Same or different? 30k, 90k and 150k training pairs, without and with distorted copies: six networks.

    They are trained one after another. On one CPU core all six take about 6 minutes at --scale 0.01, and one at 0.001.
    """
    _huge_pages()
    from cli.reproduction_report import publish
    from cli.reproduction_run import Choice, bench
    from cli.reproduction_verification import reproduce

    choice = Choice(scale, _known(data), seed)
    with bench(_folder(into, "verification"), device, threads) as place:
        publish(reproduce(place, choice), place.folder, json=json)


@app.command()
def oneshot(
    checkpoint: Given = None,
    scale: Scale = 1.0,
    into: Into = None,
    data: Source = "omniglot",
    seed: Seed = 1,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Lake's 400 official trials, 20 characters each, beside chance, 1-nearest neighbour, people, BPL and others.

    On one CPU core it takes about 2 minutes at --scale 0.01; with --checkpoint nothing is trained.
    """
    _huge_pages()
    from cli.reproduction_oneshot import reproduce_lake
    from cli.reproduction_report import publish
    from cli.reproduction_run import Choice, bench

    choice = Choice(scale, _known(data), seed, checkpoint=checkpoint)
    with bench(_folder(into, "oneshot"), device, threads) as place:
        publish(reproduce_lake(place, choice), place.folder, json=json)


@app.command()
def mnist(
    scale: Scale = 1.0,
    into: Into = None,
    tasks: Tasks = 10_000,
    data: Source = "omniglot",
    seed: Seed = 1,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """10-way one-shot tasks of MNIST's digits by a network trained on Omniglot, both at 35 x 35 pixels.

    On one CPU core it takes about 4 minutes at --scale 0.01.
    """
    _huge_pages()
    from cli.reproduction_oneshot import reproduce_mnist
    from cli.reproduction_report import publish
    from cli.reproduction_run import Choice, bench

    choice = Choice(scale, _known(data), seed, tasks=tasks)
    with bench(_folder(into, "mnist"), device, threads) as place:
        publish(reproduce_mnist(place, choice), place.folder, json=json)


@app.command()
def ways(
    checkpoint: Given = None,
    scale: Scale = 1.0,
    into: Into = None,
    tasks: Tasks = 1000,
    data: Source = "omniglot",
    seed: Seed = 1,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Accuracy against the number of characters to choose among, on training, validation and test alphabets.

    Within one alphabet as far as there are any so large, and across all of them up to 60. Without a checkpoint it
    trains the network of `reproduce oneshot`; where that is done, give its folder reproduction/oneshot/runs/oneshot.
    """
    _huge_pages()
    from cli.reproduction_report import publish
    from cli.reproduction_run import Choice, bench
    from cli.reproduction_ways import reproduce

    choice = Choice(scale, _known(data), seed, checkpoint=checkpoint, tasks=tasks)
    with bench(_folder(into, "ways"), device, threads) as place:
        publish(reproduce(place, choice), place.folder, json=json)


def _huge_pages() -> None:
    """Read by torch when it is loaded."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _known(data: str) -> str:
    if data not in ("omniglot", "strokes"):
        raise Invalid([Fault("--data", "must be omniglot or strokes")], "the command")
    return data


def _folder(into: Path | None, name: str) -> Path:
    from cli.reproduction_report import plots

    if not plots():
        output.say("No plot will be drawn, for matplotlib is not here: pip install 'whetstone[plots]'")
    return into or Path("reproduction") / name
