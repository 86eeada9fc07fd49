"""`whetstone train`: one network from a preset or a file of hyperparameters, without any service."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli import output, presets, settings
from cli.overrides import assign
from cli.remote import Json
from hpo.errors import Fault, Invalid

if TYPE_CHECKING:
    from rich.status import Status

    from model.checkpoint import Checkpoints
    from model.spec import TrainConfig
    from model.train import Progress

OUTCOME_CODE = {"complete": 0, "infeasible": 1, "stopped": 130}
_SHOWN_EVERY_S = 0.25


def usable(device: str) -> str:
    """The device's name for torch, tried out. Raises `DeviceUnusable`."""
    from workers.device import candidates, probe

    chosen = candidates(device)[0]
    probe(chosen)
    return chosen.name


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A preset, whose first point is trained (a search without one asks for it), or a YAML file with "
            "params (eta, mu, lambda, by layer or one number), settings and seed. "
            f"Presets: {', '.join(presets.names())}.",
        ),
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the checkpoints; training goes on from what is there.",
            show_default="run, or runs/PRESET",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting or hyperparameter, as KEY=VALUE or KEY.LAYER=VALUE.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the run, instead of the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="auto (a CUDA device, or the CPU), cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all cores.")] = None,
    json: Json = False,
) -> None:
    """Train one network. Ctrl-C writes a checkpoint; the same command goes on from it, to the same result."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, read by torch when it is loaded
    config = read(recipe, sets or [], seed)
    _find_transfer(config)
    into = into or (Path("runs", recipe) if recipe in presets.names() else Path("run"))
    import torch

    from model import dataset
    from model.checkpoint import Checkpoints
    from model.train import fit

    torch.set_num_threads(threads or os.cpu_count() or 1)
    place = usable(device)
    chosen = settings.load()
    data = dataset.load(**config.wanted, data_root=chosen.data_root, home=chosen.home_dir, notify=output.say)
    keep_others_work(Checkpoints(into), config, data.name)

    def report(epoch: int, metrics: dict[str, float]) -> None:
        output.err.print(
            f"epoch {epoch:>4}   loss {metrics['loss']:.4f}   "
            f"accuracy [bold]{output.percent(metrics['accuracy'])}[/]   "
            f"{metrics['pairs_per_s']:,.0f} pairs/s   {output.seconds(metrics['seconds'])}"
        )

    parameters = config.net.parameters
    output.err.print(
        f"Training {parameters:,} parameters on {escape(data.name)} at {data.size} x {data.size} pixels, "
        f"on {place}. Checkpoints: {escape(str(into))}",
        soft_wrap=True,
    )
    with interruptible() as interrupt, _live(config, quiet=json) as progress:
        result = fit(
            config,
            data,
            report,
            device=place,
            store=Checkpoints(into),
            interrupt=interrupt,
            progress=progress,
        )
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
        output.out.print(f"Score it on fresh tasks: whetstone evaluate {escape(str(into))}", soft_wrap=True)
    raise typer.Exit(OUTCOME_CODE[result.outcome])


def read(recipe: str, sets: list[str], seed: int | None) -> TrainConfig:
    """What to train, from a preset's name or a file, with `--set KEY=VALUE` and a seed laid over it.

    Raises `Invalid` or `Refused`, which name every fault.
    """
    from model import spec
    from model.recipe import load_recipe
    from model.values import suggestion

    given = _by_name(assign(sets, "epochs=5"))
    if recipe in presets.names():
        document = presets.load_all()[recipe]
        params, fixed = presets.recipe(recipe, document, given)
        written: int | None = document.get("seed")
    elif Path(recipe).suffix or Path(recipe).exists():
        params, fixed, written = load_recipe(recipe)
        params, fixed = presets.lay(params, fixed, given)
    else:
        near = suggestion(recipe, presets.names())
        known = ", ".join(presets.names())
        raise Invalid([Fault(recipe, f"is neither a file nor a preset{near or '.'} Presets: {known}")], "the recipe")
    return spec.config(params, fixed, next((s for s in (seed, written) if s is not None), 0))


def _find_transfer(config: TrainConfig) -> None:
    """Raises `Invalid` where the checkpoint to transfer from is not there, before a folder is made."""
    if config.transfer is None or Path(config.transfer).exists():
        return
    name = Path(config.transfer).name
    first = f"train it first (`whetstone train {name}`)" if name in presets.names() else "train it first"
    raise Invalid([Fault("transfer", f"{config.transfer} is not there: {first}, or name a checkpoint's folder")])


def _by_name(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides without `settings.` and `params.`, which say no more than the name does."""
    given: dict[str, Any] = {}
    for key, value in overrides.items():
        inner = value if key in ("settings", "params") and isinstance(value, dict) else {key: value}
        given = presets.merge(given, inner)
    return given


@contextmanager
def _live(config: TrainConfig, *, quiet: bool) -> Iterator[Progress]:
    """A line that tells a person at a terminal how far the epoch is; nothing in a log, or with `quiet`."""
    if quiet or not output.err.is_terminal:
        yield lambda epoch, step: None
        return
    with output.err.status("Starting ...") as line:
        yield _Line(line, config)


class _Line:
    """Hears of every step, and writes the line a few times a second."""

    def __init__(self, line: Status, config: TrainConfig) -> None:
        self._line, self._config = line, config
        self._epoch, self._since = -1, (0.0, 0)
        self._shown = 0.0

    def __call__(self, epoch: int, step: int) -> None:
        now = time.monotonic()
        if epoch != self._epoch:
            self._epoch, self._since = epoch, (now, step)
        total = self._config.steps_per_epoch
        if now - self._shown < _SHOWN_EVERY_S and step < total:
            return
        self._shown = now
        began, first = self._since
        rate = (step - first) * self._config.pairs_per_batch / max(now - began, 1e-9)
        if step == total:
            self._line.update(f"epoch {epoch}, measuring")
        else:
            pace = f", {rate:,.0f} pairs/s" if step > first else ""
            self._line.update(f"epoch {epoch}, step {step:,} of {total:,}{pace}")


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag; the second ends the process at once."""
    told: list[int] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        signal.signal(number, signal.SIG_DFL)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def keep_others_work(store: Checkpoints, config: TrainConfig, data: str) -> None:
    """Refuse to train over the checkpoints of another run. Raises CheckpointError."""
    from model.checkpoint import CheckpointError
    from model.train import essence

    state, fault = store.load_last()
    remedy = "choose another folder with -o, or remove this one"
    if state is None:
        if fault:
            raise CheckpointError(f"{fault.removeprefix('starting over, for ')}; {remedy}")
        return
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
