"""Training the networks of a reproduction: one run a folder, gone on with where it stopped.

Promise: the same command after an interrupt goes on from the last checkpoint, and a network that was scored already is
not scored again, so that test data is used once for each network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli import output, settings, uses
from cli.train import OUTCOME_CODE, interruptible, keep_others_work, usable

if TYPE_CHECKING:
    from model.drawings import Dataset
    from model.spec import TrainConfig

SCORES = "scores.json"


@dataclass(frozen=True)
class Choice:
    """What a person chose on the command line."""

    scale: float
    data: str
    seed: int
    checkpoint: Path | None = None
    tasks: int = 0


class Bench:
    """What all steps of one reproduction share: folder, device, data, and whether it was told to stop."""

    def __init__(self, folder: Path, device: str, interrupt: Callable[[], bool]) -> None:
        self.folder, self.device, self.interrupt = folder, device, interrupt
        self.settings = settings.load()
        self._loaded: dict[str, Dataset] = {}

    def data(self, config: TrainConfig) -> Dataset:
        """The data set that a recipe trains on, at its size. Raises DataError."""
        return self.load(**config.wanted)

    def load(self, size: int, source: str, **more: Any) -> Dataset:
        """A data set at `size` x `size` pixels, read once. Raises DataError."""
        from model import dataset

        key = json.dumps([size, source, more])
        if key not in self._loaded:
            self._loaded[key] = dataset.load(
                size,
                source=source,  # type: ignore[arg-type]
                data_root=self.settings.data_root,
                home=self.settings.home_dir,
                notify=output.say,
                **more,
            )
        return self._loaded[key]

    def train(self, config: TrainConfig, name: str) -> Path:
        """Train into FOLDER/runs/NAME, or go on there. Exits 130 where it is interrupted, 1 where the run is dead."""
        from model.checkpoint import Checkpoints
        from model.train import fit

        into, data = self.folder / "runs" / name, self.data(config)
        store = Checkpoints(into)
        keep_others_work(store, config, data.name)
        parameters, side = config.net.parameters, config.net.input
        what = f"{parameters:,} parameters on {data.name} at {side} x {side} pixels, on {self.device}"
        output.say(f"{name}: training {what}. Checkpoints: {into}")

        def report(epoch: int, metrics: dict[str, float]) -> None:
            output.err.print(
                f"{name}   epoch {epoch + 1} of {config.epochs}   loss {metrics['loss']:.4f}   "
                f"one-shot validation [bold]{output.percent(metrics['accuracy'])}[/]   "
                f"{metrics['pairs_per_s']:,.0f} pairs/s   {output.seconds(metrics['seconds'])}",
                soft_wrap=True,
            )

        result = fit(config, data, report, device=self.device, store=store, interrupt=self.interrupt)
        if result.outcome == "stopped":
            output.say("Stopped; the same command goes on from here.")
            raise typer.Exit(OUTCOME_CODE["stopped"])
        if result.outcome != "complete":
            output.say(f"{name}: the network died ({result.reason}). Another --seed may do better")
            raise typer.Exit(OUTCOME_CODE["infeasible"])
        return into

    def scored(self, name: str, checkpoint: Path, how: dict[str, Any], score: Callable[[], dict[str, Any]]) -> Any:
        """What `score` gives, or what it gave before for the same weights scored the same way. Exits 130 if stopped."""
        from model.evaluate import Interrupted

        path = self.folder / SCORES
        known = _read(path)
        key = {"weights": digest(checkpoint), **how}
        if known.get(name, {}).get("key") != key:
            try:
                known[name] = {"key": key, "score": score()}
            except Interrupted:
                output.say("Stopped; the same command goes on from here.")
                raise typer.Exit(OUTCOME_CODE["stopped"]) from None
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(known, indent=1))
            aside.replace(path)
        return known[name]["score"]


def digest(checkpoint: Path) -> str:
    """SHA-256 of the weights that `model.evaluate.load` would take, "" where there are none."""
    stems = ("best", "last") if checkpoint.is_dir() else (checkpoint.stem,)
    for stem in stems:
        path = uses.folder_of(checkpoint) / f"{stem}.safetensors"
        if path.exists():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


@contextmanager
def bench(folder: Path, device: str, threads: int | None) -> Iterator[Bench]:
    """A bench for one reproduction, on which the first Ctrl-C writes a checkpoint and ends it."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    place = usable(device)
    folder.mkdir(parents=True, exist_ok=True)
    with interruptible() as interrupt:
        yield Bench(folder, place, interrupt)


def _read(path: Path) -> dict[str, Any]:
    """Scores of before; a file that cannot be read counts for nothing, for all of it can be scored anew."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
