"""`whetstone train`: one network from a file of hyperparameters, without any service."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output, settings
from cli.remote import Json

if TYPE_CHECKING:
    from model.checkpoint import Checkpoints
    from model.spec import TrainConfig

OUTCOME_CODE = {"complete": 0, "infeasible": 1, "stopped": 130}


def usable(device: str) -> str:
    """The device's name for torch, tried out. Raises `DeviceUnusable`."""
    from workers.device import candidates, probe

    chosen = candidates(device)[0]
    probe(chosen)
    return chosen.name


def train(
    recipe: Annotated[
        Path, typer.Argument(help="YAML with params (eta, mu, lambda, by layer or one number), settings and seed.")
    ],
    into: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the checkpoints; training goes on from what is there.")
    ] = Path("run"),
    device: Annotated[str, typer.Option(help="auto (a CUDA device, or the CPU), cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.")] = None,
    json: Json = False,
) -> None:
    """Train one network. Ctrl-C writes a checkpoint; the same command goes on from it, to the same result."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, read by torch when it is loaded
    import torch

    from model import dataset, spec
    from model.checkpoint import Checkpoints
    from model.train import fit, load_recipe

    config = spec.config(*load_recipe(recipe))
    torch.set_num_threads(threads or os.cpu_count() or 1)
    place = usable(device)
    chosen = settings.load()
    data = dataset.load(
        config.net.input, source=config.data, data_root=chosen.data_root, home=chosen.home_dir, notify=output.say  # type: ignore[arg-type]
    )  # fmt: skip
    keep_others_work(Checkpoints(into), config, data.name)
    stopping: list[int] = []

    def stop(number: int, _: object) -> None:
        stopping.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends us at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    def report(epoch: int, metrics: dict[str, float]) -> None:
        output.err.print(
            f"epoch {epoch:>4}   loss {metrics['loss']:.4f}   "
            f"accuracy [bold]{output.percent(metrics['accuracy'])}[/]   "
            f"{metrics['pairs_per_s']:,.0f} pairs/s   {output.seconds(metrics['seconds'])}"
        )

    parameters = config.net.parameters
    output.err.print(
        f"Training {parameters:,} parameters on {data.name} at {data.size} x {data.size} pixels, on {place}. "
        f"Checkpoints: {output.escape(str(into))}"
    )
    result = fit(config, data, report, device=place, store=Checkpoints(into), interrupt=lambda: bool(stopping))
    summary: dict[str, Any] = {
        "outcome": result.outcome,
        "value": result.value,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "reason": result.reason,
        "seconds": round(result.seconds, 2),
        "checkpoint": str(into),
    }
    if json:
        output.print_json(summary)
    elif result.outcome == "stopped":
        output.say(f"Stopped; the checkpoint is in {into}. The same command goes on from it.")
    elif result.outcome == "infeasible":
        output.say(f"This point is infeasible: {result.reason}")
    else:
        output.out.print(f"Best: [bold green]{output.percent(result.value)}[/] at epoch {result.best_epoch}")
        output.out.print(f"Score it on fresh tasks: whetstone evaluate {output.escape(str(into))}", soft_wrap=True)
    raise typer.Exit(OUTCOME_CODE[result.outcome])


def keep_others_work(store: Checkpoints, config: TrainConfig, data: str) -> None:
    """Refuse to train over the checkpoints of another run. Raises CheckpointError."""
    from model.checkpoint import CheckpointError
    from model.train import essence

    state, _ = store.load_last()
    if state is None:
        return
    remedy = "choose another folder with -o, or remove this one"
    if state.data not in ("", data):
        where = "set WHETSTONE_DATA to a folder that holds omniglot-py/, " if state.data == "omniglot" else ""
        raise CheckpointError(
            f"{store.folder} holds a network trained on {state.data}, and this run would train on {data}: "
            f"{where}{remedy}"
        )
    if essence(state.config) != essence(config):
        raise CheckpointError(
            f"{store.folder} holds another run: its hyperparameters, settings or seed differ; {remedy}"
        )
