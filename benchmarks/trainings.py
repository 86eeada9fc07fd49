"""Real trainings, many and short, kept as data that a search can be tried on: `python -m benchmarks.trainings record`

Each is the `mini` preset's network under its settings, for a few seconds of one core, with eta, mu and lambda tied into
the convolutions and the head: six dimensions, wider than the preset's, so that some points fail. Promise: point i is
the same on every machine (one scrambled Sobol sequence), each row is written whole when its training has ended, and a
call with the same file goes on where it stopped. `repeat` trains some points again under other seeds: their noise.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import HUGE_PAGES
from benchmarks.measure import say

RECORDED = Path(__file__).parent / "data" / "trainings.csv"
"""What was recorded for this repository; its head says how."""
PRESET = Path(__file__).parent.parent / "presets" / "mini.yaml"
SHORT = {"pairs_per_epoch": 4096, "epochs": 5, "patience": None, "validation_tasks": 2000}
"""Laid over the preset's settings: five short epochs, 160 steps of 128 pairs."""
GROUPS = {"conv": ("conv1", "conv2", "conv3", "conv4"), "head": ("fc", "output")}
RANGES = {"eta": (0.01, 1.0, True), "mu": (0.0, 0.99, False), "lambda": (1e-6, 1e-2, True)}
"""Lowest, highest, and whether on a logarithmic scale: for each group by itself."""
DIMENSIONS = tuple(f"{name}_{group}" for name in RANGES for group in GROUPS)
COLUMNS = ("point", "seed", *DIMENSIONS, "outcome", "value", "epochs", "seconds")
SEQUENCE = 20150704
"""Of the scrambled Sobol sequence."""
CHANCE = 1 / 20


@dataclass(frozen=True)
class Training:
    """One row. `value` is the best accuracy of any epoch; None where the run died before its first was measured."""

    point: int
    seed: int
    params: dict[str, float]
    """By dimension, as `DIMENSIONS` names them."""
    outcome: str
    value: float | None
    epochs: int
    seconds: float


def read(path: Path = RECORDED) -> list[Training]:
    """What is recorded in a file, in the order of points and seeds."""
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        trainings = [
            Training(
                int(row["point"]),
                int(row["seed"]),
                {name: float(row[name]) for name in DIMENSIONS},
                row["outcome"],
                float(row["value"]) if row["value"] else None,
                int(row["epochs"]),
                float(row["seconds"]),
            )
            for row in rows
        ]
    return sorted(trainings, key=lambda training: (training.point, training.seed))


def points(count: int) -> list[dict[str, float]]:
    """The first `count` points of the sequence."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(DIMENSIONS), scramble=True, rng=SEQUENCE)
    unit = sequence.random_base2(math.ceil(math.log2(count)))[:count]
    scales = [scale for scale in RANGES.values() for _ in GROUPS]
    return [
        {name: _scaled(share, *scale) for name, share, scale in zip(DIMENSIONS, row.tolist(), scales, strict=True)}
        for row in unit
    ]


def _scaled(share: float, low: float, high: float, log: bool) -> float:
    value = low * (high / low) ** share if log else low + (high - low) * share
    return float(f"{value:.6g}")  # as it is written, so that a repeated training is of the very same point


def to_repeat(trainings: Sequence[Training], count: int) -> list[Training]:
    """Trainings that learned something, spread evenly from the worst to the best."""
    learned = [one for one in trainings if one.seed == one.point and (one.value or 0.0) > 2 * CHANCE]
    learned.sort(key=lambda one: one.value or 0.0)
    return [learned[(2 * place + 1) * len(learned) // (2 * count)] for place in range(count)]


class Trainer:
    """Trains points, one after the other, on one thread."""

    def __init__(self, data: str) -> None:
        os.environ.setdefault(HUGE_PAGES, "1")  # as `whetstone train` does, before torch is loaded
        import torch

        from benchmarks.parts import load
        from hpo.yaml_document import read as read_yaml
        from model import spec

        torch.set_num_threads(1)
        document: dict[str, Any] = read_yaml(PRESET.read_text())
        self._settings = document["settings"] | SHORT
        self._config = spec.config
        self._data = load(28, data)

    def train(self, point: int, params: dict[str, float], seed: int) -> Training:
        from model.train import fit

        whole = {
            name: {label: params[f"{name}_{group}"] for group, labels in GROUPS.items() for label in labels}
            for name in RANGES
        }
        began = time.process_time()
        result = fit(self._config(whole, self._settings, seed), self._data, lambda epoch, metrics: None)
        seconds = time.process_time() - began
        return Training(point, seed, params, result.outcome, result.value, result.epochs, seconds)


class File:
    """A file that grows by whole rows; two processes may write to it at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            self._append(",".join(COLUMNS))

    def trainings(self) -> list[Training]:
        return read(self._path)

    def add(self, training: Training) -> None:
        value = "" if training.value is None else f"{training.value:.5f}"
        params = [f"{training.params[name]:.6g}" for name in DIMENSIONS]
        ends = [training.outcome, value, str(training.epochs), f"{training.seconds:.2f}"]
        self._append(",".join([str(training.point), str(training.seed), *params, *ends]))

    def _append(self, line: str) -> None:
        with self._path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())


def _wanted(chosen: argparse.Namespace, file: File) -> Iterator[tuple[int, dict[str, float], int]]:
    """Point, parameters and seed of the trainings asked for that the file does not hold yet."""
    recorded = file.trainings()
    have = {(one.point, one.seed) for one in recorded}
    if chosen.what == "record":
        wanted = [(place, params, place) for place, params in enumerate(points(chosen.count))]
    else:
        again = to_repeat(recorded, chosen.count)
        # Seeds of no other point, so that nothing of two trainings is the same by accident.
        wanted = [(one.point, one.params, 100_000 + 10 * one.point + more) for more in range(4) for one in again]
    for place, (point, params, seed) in enumerate(wanted):
        if place % chosen.of == chosen.part and (point, seed) not in have:
            yield point, params, seed


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainings", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("record", "repeat"), help="new points, or recorded ones under other seeds")
    parser.add_argument("--count", type=int, required=True, help="how many points")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV; goes on where it stopped")
    parser.add_argument("--part", type=int, default=0, help="which of the processes this is, from 0")
    parser.add_argument("--of", type=int, default=1, help="how many processes share the work")
    parser.add_argument("--data", default="omniglot", help="omniglot, strokes, or small (shows that it runs)")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.part < chosen.of or chosen.count < 1:
        parser.error("--part counts from 0 and stays below --of; --count is at least 1")
    trainer, file = Trainer(chosen.data), File(chosen.out)
    for point, params, seed in _wanted(chosen, file):
        training = trainer.train(point, params, seed)
        file.add(training)
        value = "" if training.value is None else f" {100 * training.value:.1f}%"
        say.print(f"point {point}, seed {seed}: {training.outcome}{value} in {training.seconds:.1f} s")


if __name__ == "__main__":
    main()
