"""Training for so much of the processor's time: what a minute of one core, or an hour of it, can buy.

Promise: all that `fit` computes counts, its own evaluations and checkpoints with it, on all threads of the process;
when the time is over the run ends where it stands. A cosine schedule has to know its end: the number of epochs that
the budget holds on this machine is found out by a few epochs of a run that is thrown away.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import median
from model.checkpoint import Checkpoints
from model.drawings import Dataset
from model.spec import TrainConfig
from model.train import FitResult, Report, Signal, fit

_MARGIN = 0.97
"""Of the budget a planned run takes; the rest is for what is not in every epoch."""


@dataclass(frozen=True)
class Run:
    """How a run on a budget ended, and what it took."""

    result: FitResult
    cpu_seconds: float
    wall_seconds: float


def _silent(epoch: int, metrics: dict[str, float]) -> None:
    return None


def train(config: TrainConfig, data: Dataset, folder: Path, seconds: float, report: Report = _silent) -> Run:
    """Train from scratch into `folder` until the processor's time is over, or the epochs are done.

    Raises RuntimeError where the recipe leads to no usable network.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    result = fit(
        config, data, report, store=Checkpoints(folder), interrupt=lambda: time.process_time() - cpu >= seconds
    )
    if result.outcome == "infeasible":
        raise RuntimeError(f"seed {config.seed}: {result.reason}")
    return Run(result, time.process_time() - cpu, time.perf_counter() - wall)


def epochs_within(config: TrainConfig, data: Dataset, seconds: float, trials: int = 4) -> int:
    """How many epochs of this recipe so much of the processor's time holds here."""
    stamps = [time.process_time()]

    def report(epoch: int, metrics: dict[str, float]) -> Signal | None:
        stamps.append(time.process_time())
        return Signal.STOP if epoch + 1 == trials else None

    with tempfile.TemporaryDirectory() as folder:
        fit(config, data, report, store=Checkpoints(folder))
    each = median(after - before for before, after in itertools.pairwise(stamps[1:]))  # the first one warms up
    return max(1, int(_MARGIN * seconds / each))
