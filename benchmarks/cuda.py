"""The trainer on a CUDA device: `python -m benchmarks.cuda --json FILE`.

Measures pairs a second of the full network and of mini, an update at a time and as a CUDA graph; how far the two are
apart in their losses; and what several small trials at once give together, as processes that run `fit` and as streams
of one process. The device's name stands with the figures. Promise: on a machine without CUDA it says so, writes no
figure and ends well. A timing begins and ends with a device that is idle.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import Figure, Results, machine, median, say, show, spread, write
from model import optim, spec, strokes
from model.capture import Captured
from model.init import initialise
from model.net import SiameseNet
from model.precision import wants_bf16
from model.step import Updates
from model.train import fit

if TYPE_CHECKING:
    from model.drawings import Dataset
    from model.spec import TrainConfig

RATES = {"eta": 0.01, "mu": 0.9, "lambda": 1e-4}
GOALS = {"cuda_full_pairs_per_s": ">= 20000"}
"""Aimed at on one H200."""
WORTH = 1.5
"""Several trials at once are kept where together they are so many times as fast as one."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    nets: dict[str, tuple[int, ...]]
    """Batch sizes by network."""
    warm: int = 20
    steps: int = 200
    turns: int = 3
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    epochs: int = 4
    epoch_pairs: int = 200 * 128


FULL = Scale({"paper": (128, 512, 1024), "mini": (128, 1024)})
QUICK = Scale({"mini": (16,)}, warm=1, steps=2, turns=1, at_once=(1, 2), epochs=2, epoch_pairs=32)


class Trial:
    """One run's updates, without its evaluations."""

    def __init__(self, config: TrainConfig, data: Dataset, device: torch.device, kind: Callable[..., Updates]) -> None:
        self.net = SiameseNet(config.net)
        initialise(self.net, config.init, torch.Generator().manual_seed(config.seed))
        self.net.on(device)
        optimizer = optim.optimizer(self.net, config)
        bf16 = wants_bf16(config.precision, device)
        drawings = data.train.to(device)
        self.updates = kind(
            self.net, optimizer, drawings, config, lambda _: torch.Generator().manual_seed(config.seed), bf16=bf16
        )
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.step = 0
        self.losses: list[torch.Tensor] = []

    def run(self, steps: int, *, losses: bool = False) -> None:
        """Queue so many updates on the current stream."""
        for _ in range(steps):
            loss = self.updates.make(self.step, lambda: False)
            self.step += 1
            if losses:
                self.losses.append(loss.clone())


def recipe(net: str, batch: int, seed: int = 0, **settings: Any) -> TrainConfig:
    return spec.config(RATES, {"net": net, "batch_pairs": batch, **settings}, seed)


def idle(device: torch.device) -> None:
    """Wait until nothing is left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(trial: Trial, scale: Scale, device: torch.device) -> list[float]:
    """Updates a second, turn by turn."""
    trial.run(scale.warm)
    turns = []
    for _ in range(scale.turns):
        idle(device)
        began = time.perf_counter()
        trial.run(scale.steps)
        idle(device)
        turns.append(scale.steps / (time.perf_counter() - began))
    return turns


def kernel_by_kernel_and_as_a_graph(
    results: Results, scale: Scale, device: torch.device, data: Callable[[int], Dataset], graph: Callable[..., Updates]
) -> None:
    """Pairs a second of each network by batch, and the largest gap between the losses of the first updates."""
    for net, batches in scale.nets.items():
        best = 0.0
        for batch in batches:
            config = recipe(net, batch)
            median_of: dict[str, float] = {}
            losses: dict[str, torch.Tensor] = {}
            for how, kind in (("eager", Updates), ("graph", graph)):
                try:
                    turns, losses[how], note = _measured(config, data(config.net.input), device, kind, scale)
                except torch.OutOfMemoryError as fault:
                    results.skipped[f"{net}_{batch}_{how}_pairs_per_s"] = str(fault).splitlines()[0]
                    continue
                finally:
                    _free(device)
                median_of[how] = median(turns)
                results.also.append(Figure(f"{net}_{batch}_{how}_pairs_per_s", median_of[how], "pairs/s", note=note))
                results.details[f"{net}_{batch}_{how}"] = turns
            if len(losses) < 2:
                continue
            gap = ((losses["graph"] - losses["eager"]).abs() / losses["eager"].abs()).max().item()
            results.also.append(Figure(f"{net}_{batch}_loss_gap", 100 * gap, "%", note="largest of the first updates"))
            best = max(best, median_of["graph"])
        if not best:
            continue
        name = f"cuda_{'full' if net == 'paper' else net}_pairs_per_s"
        results.figures.append(Figure(name, best, "pairs/s", GOALS.get(name, ""), "as a graph, best batch size"))


def _measured(
    config: TrainConfig, data: Dataset, device: torch.device, kind: Callable[..., Updates], scale: Scale
) -> tuple[list[float], torch.Tensor, str]:
    """Pairs a second by turns, the losses of the first updates, and what there is to say."""
    trial = Trial(config, data, device, kind)
    trial.run(min(20, scale.warm), losses=True)
    turns = [config.batch_pairs * speed for speed in speeds(trial, scale, device)]
    refused = getattr(trial.updates, "refused", False)
    note = f"batches of {config.batch_pairs}, {spread(turns, 0)}" + ("; NOT RECORDED" if refused else "")
    return turns, torch.stack(trial.losses).cpu(), note


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def streams(scale: Scale, device: torch.device, data: Dataset, graph: Callable[..., Updates]) -> dict[int, float]:
    """Pairs a second of so many mini trials together, each on a stream and in a thread of one process."""
    found = {}
    batch = min(scale.nets["mini"])
    for count in scale.at_once:
        trials = [Trial(recipe("mini", batch, seed), data, device, graph) for seed in range(count)]
        idle(device)
        for trial in trials:  # one after another: a process records one graph at a time
            _on_stream(trial, scale.warm)
        idle(device)
        threads = [threading.Thread(target=_on_stream, args=(trial, scale.steps)) for trial in trials]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        idle(device)
        found[count] = count * batch * scale.steps / (time.perf_counter() - began)
    return found


def _on_stream(trial: Trial, steps: int) -> None:
    with torch.cuda.stream(trial.stream) if trial.stream is not None else contextlib.nullcontext():
        trial.run(steps)


def processes(scale: Scale, device: torch.device) -> dict[int, float]:
    """Pairs a second of so many processes together, each at a `fit` of mini on the one device, evaluations left out."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for count in scale.at_once:
        barrier, answers = context.Barrier(count), context.SimpleQueue()
        given = (scale, str(device), barrier, answers)
        each = [context.Process(target=_fit, args=(*given, seed), daemon=True) for seed in range(count)]
        for process in each:
            process.start()
        for process in each:
            process.join()
        if failed := [process.exitcode for process in each if process.exitcode]:
            say.print(f"{count} processes: {len(failed)} failed")
            continue
        found[count] = sum(answers.get() for _ in each)
    return found


def _fit(scale: Scale, device: str, barrier: Any, answers: Any, seed: int) -> None:
    """One of the processes: the median speed of the epochs after the first, which all of them begin together."""
    torch.set_num_threads(1)
    batch = min(scale.nets["mini"])
    settings = {"pairs_per_epoch": scale.epoch_pairs, "epochs": scale.epochs, "patience": None, "validation_tasks": 1}
    found: list[float] = []

    def report(epoch: int, metrics: dict[str, float]) -> None:
        barrier.wait(timeout=600)
        found.append(metrics["pairs_per_s"])

    try:
        fit(recipe("mini", batch, seed, way=2, **settings), _data(28, scale), report, device=device)
        answers.put(median(found[1:]))
    except BaseException:
        barrier.abort()  # the others wait for it
        raise


def _data(size: int, scale: Scale) -> Dataset:
    """Stroke characters: what a drawing shows costs a step nothing."""
    return strokes.generate(size, shape=strokes.SMALL) if scale is QUICK or size > 28 else strokes.generate(size)


def together(results: Results, how: str, found: dict[int, float]) -> None:
    """What several trials at once give, beside one alone."""
    for count, speed in found.items():
        results.also.append(Figure(f"mini_{how}_{count}_pairs_per_s", speed, "pairs/s", note="all together"))
    if 1 in found and len(found) > 1:
        best = max(found, key=lambda count: found[count])
        gain = found[best] / found[1]
        kept = "worth keeping" if gain >= WORTH else f"below {WORTH}: not worth keeping"
        results.figures.append(Figure(f"cuda_mini_{how}_gain", gain, "x", note=f"{best} at once; {kept}"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, its figures mean nothing")
    chosen = parser.parse_args(arguments)
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    facts, results = machine(), Results()
    if not torch.cuda.is_available():
        why = f"there is no CUDA device here that torch {torch.__version__} can use"
        say.print(f"Nothing measured: {why}.")
        names = ("cuda_full_pairs_per_s", "cuda_mini_pairs_per_s", "cuda_mini_streams_gain", "cuda_mini_processes_gain")
        results.skipped = dict.fromkeys(names, why)
        write(chosen.json, results, machine=facts, device=None)
        return
    scale, device = QUICK if chosen.quick else FULL, torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    about = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "quick": chosen.quick}
    kernel_by_kernel_and_as_a_graph(results, scale, device, lambda size: _data(size, scale), Captured)
    together(results, "streams", streams(scale, device, _data(28, scale), Captured))
    together(results, "processes", processes(scale, device))
    write(chosen.json, results, machine=facts, **about)
    show(results, facts | about)


if __name__ == "__main__":
    main()
