"""What runs in the measured processes: each function serves one `Child` by the name it has in `PARTS`.

Promise: the trainer's own parts go through what a user runs, `model.train.fit` and `model.evaluate`, and read its own
metrics; nothing here knows a shorter way. Each part imports what it needs when it runs, so that a process holds no more
than what it measures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.child import Channel

if TYPE_CHECKING:
    from model.drawings import Dataset
    from model.spec import TrainConfig

TASKS_SEED = 20260511
"""Of the tasks of seed 0's run, and so on: neither a study's own (0) nor those of `whetstone evaluate`."""
RATES = {"eta": 0.01, "mu": 0.9, "lambda": 1e-4}
"""Of steps whose speed alone matters; as the textbook's."""


def load(size: int, data: str) -> Dataset:
    """The data set at this size. `data`: auto, omniglot, strokes, or small (a handful of strokes, for quick runs)."""
    from benchmarks.measure import say
    from cli import settings
    from model import dataset, strokes

    if data == "small":
        return strokes.generate(size, shape=strokes.SMALL)
    chosen = settings.load()
    source: Any = data
    return dataset.load(size, source=source, data_root=chosen.data_root, home=chosen.home_dir, notify=say.print)


def prepare(channel: Channel, data: str, folder: str) -> NoReturn:
    """Pack the data set once for all that follow, and lay its drawings out as files for the textbook.

    Answers {"name": of the data set, "bytes": by size, of its uint8 images, "bf16": whether "auto" takes it here}.
    """
    import torch

    from benchmarks import textbook
    from model.precision import wants_bf16

    while True:
        request = channel.receive()
        loaded = {size: load(size, data) for size in request["sizes"]}
        if request["files"]:
            full = loaded[105]
            textbook.unpack(full.train, Path(folder) / "train")
            textbook.unpack(full.validation, Path(folder) / "validation")
        images = {
            size: sum(part.images.numel() for part in (one.train, one.validation, one.test))
            for size, one in loaded.items()
        }
        bf16 = wants_bf16("auto", torch.device("cpu"))
        channel.send(name=next(iter(loaded.values())).name, bytes=images, bf16=bf16)


def step(channel: Channel, net: str, precision: str, batch: int, steps: int, data: str) -> None:
    """Complete training steps by `fit`, an epoch of `steps` for each request.

    Answers {"pairs_per_s": as `fit` reports it, "flops": of one image, "input_s": what drawing, gathering and
    distorting a batch takes by itself}.
    """
    import torch

    from model import spec
    from model.train import fit

    torch.set_num_threads(1)
    settings = {
        "net": net,
        "precision": precision,
        "batch_pairs": batch,
        "pairs_per_epoch": batch * steps,
        "epochs": 1_000_000,
        "patience": None,
        "validation_tasks": 1,
        "way": 2,
    }
    config = spec.config(RATES, settings, 0)
    loaded = load(config.net.input, data)
    draw = _input(config, loaded)

    def report(epoch: int, metrics: dict[str, float]) -> None:
        channel.send(pairs_per_s=metrics["pairs_per_s"], flops=config.net.flops, input_s=draw())
        channel.receive()

    channel.receive()
    result = fit(config, loaded, report)
    raise RuntimeError(f"training ended by itself: {result.reason}")


def _input(config: TrainConfig, data: Dataset) -> Callable[[], float]:
    """Measures the input's part of a step: the median seconds of a few batches."""
    import torch

    from benchmarks.measure import median
    from model.distortion import distort
    from model.step import source

    batches = source(config, data.train, lambda purpose: torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)

    def draw() -> float:
        times = []
        for step in range(5):
            began = time.perf_counter()
            distort(data.train.flat[batches.draw(generator, step).images], generator)
            times.append(time.perf_counter() - began)
        return median(times)

    return draw


def textbook(channel: Channel, batch: int, steps: int, data: str, folder: str) -> NoReturn:
    """Complete training steps of the textbook. Answers {"pairs_per_s"}."""
    import torch
    from torch.utils.data import DataLoader

    from benchmarks import textbook as book

    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [f"{place.parent.name}/{place.name}" for place in sorted((Path(folder) / "train").glob("*/*"))]
    distorted, _ = book.transforms()
    pairs = book.Pairs(book.characters(Path(folder) / "train", names), distorted, length=1_000_000)
    timed = book.train(book.SiameseNetwork(), DataLoader(pairs, batch_size=batch), steps)
    while True:
        channel.receive()
        channel.send(pairs_per_s=batch * steps / next(timed))


def gemm(channel: Channel, sizes: list[int], seconds: float) -> NoReturn:
    """Matrix products alone. Answers {"fp32", "bf16"} in FLOP/s."""
    import torch

    from benchmarks import gemm as products

    torch.set_num_threads(1)
    while True:
        channel.receive()
        channel.send(**{dtype: products.peak(dtype, tuple(sizes), seconds) for dtype in products.DTYPES})


def evaluation(channel: Channel, tasks: int, many: int, data: str, folder: str) -> NoReturn:
    """The full network, untrained, on one-shot tasks in fp32: by `model.evaluate`, or by the textbook.

    Takes {"who": ours, many or textbook, "begin", "end"}; answers {"seconds", "right"}.
    """
    import torch

    from benchmarks import textbook as book
    from model import episode, evaluate, init
    from model.net import PAPER, SiameseNet

    torch.set_num_threads(1)
    drawings = load(PAPER.input, data).validation
    net = SiameseNet(PAPER)
    init.initialise(net, "he", torch.Generator().manual_seed(0))
    net.on("cpu")
    model = book.SiameseNetwork()
    model.load_state_dict({name: value.contiguous() for name, value in net.state_dict().items()})
    files = [path for one in book.characters(Path(folder) / "validation", drawings.characters) for path in one]
    _, transform = book.transforms()
    episodes = episode.draw(drawings, max(tasks, many), 20, TASKS_SEED)
    support = episodes.support.flatten(1)  # (T, N): one shot
    plain = list(zip(episodes.query.tolist(), support.tolist(), episodes.target.tolist(), strict=True))
    while True:
        request = channel.receive()
        began = time.perf_counter()
        if request["who"] == "textbook":
            right = book.evaluate(model, files, transform, plain[request["begin"] : request["end"]])
        else:
            right = evaluate.answer(net, drawings, episodes.first(many if request["who"] == "many" else tasks)).tolist()
        channel.send(seconds=time.perf_counter() - began, right=right[:tasks])


def training(channel: Channel, data: str) -> NoReturn:
    """Whole runs, one for each request, and how well the weights they end with do on fresh validation tasks.

    Takes {"recipe", "seed", "tasks", "cpu_seconds" or "settings" to lay over the recipe's}. The processor's time of all
    of `fit` is counted, its own evaluations with it; the last weights are scored, never the best of several. Answers
    {"correct", "tasks", "cpu_seconds", "wall_seconds", "epochs"}.
    """
    import torch

    from benchmarks import budget
    from model import episode, evaluate, spec
    from model.recipe import load_recipe

    torch.set_num_threads(1)
    sets: dict[int, Dataset] = {}
    lengths: dict[tuple[str, float], int] = {}
    while True:
        request = channel.receive()
        recipe, seconds = request["recipe"], request.get("cpu_seconds", float("inf"))
        params, settings, _ = load_recipe(recipe)
        settings = settings | {"patience": None, "max_seconds": None} | request.get("settings", {})
        config = spec.config(params, settings, request["seed"])
        side = config.net.input
        loaded = sets[side] = sets.get(side) or load(side, data)
        if config.schedule == "cosine" and "cpu_seconds" in request:
            if (recipe, seconds) not in lengths:
                lengths[recipe, seconds] = budget.epochs_within(config, loaded, seconds)
            config = replace(config, epochs=lengths[recipe, seconds])
        with tempfile.TemporaryDirectory() as folder:
            run = budget.train(config, loaded, Path(folder), seconds)
            net = evaluate.load(Path(folder) / "last.json").net
        tasks = episode.draw(loaded.validation, request["tasks"], 20, TASKS_SEED + request["seed"])
        score = evaluate.one_shot(net, loaded.validation, tasks)
        channel.send(
            correct=score.correct,
            tasks=score.tasks,
            epochs=run.result.epochs,
            cpu_seconds=run.cpu_seconds,
            wall_seconds=run.wall_seconds,
        )


PARTS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "step": step,
    "textbook": textbook,
    "gemm": gemm,
    "evaluation": evaluation,
    "training": training,
}
