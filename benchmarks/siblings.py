"""The siblings of the paper's network beside their published figures: `python -m benchmarks.siblings`

Trains each preset for so many seconds, scores it on fresh one-shot tasks and by the way its source measured, prints the
table of docs/results.md and writes it. Promise: a row changes nothing of its preset but what it says; the epoch is
chosen on validation tasks alone; test images (MNIST's) are looked at once a run, at its end, and each look is recorded
beside the checkpoint. A row that breaks is named in the table and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import machine, say

if TYPE_CHECKING:
    import torch

    from model.drawings import Dataset, Drawings
    from model.episode import Episodes
    from model.net import SiameseNet
    from model.spec import TrainConfig

TASKS, SEED = 4000, 20150706
"""Fresh tasks of every row, those of `whetstone evaluate --tasks 4000`."""
REFERENCES = 10
"""Sets of reference images by which MNIST's test digits are classified; the figure is their mean."""
FINEST = 12_800
"""Pairs between two looks at validation in a short run."""
MINI = ("net=mini", "eta=1e-3")
DIGITS = ("eta=1e-3",)


@dataclass(frozen=True)
class Row:
    """A published figure and the command that stands for it; `mini` is what a short run on a CPU changes of it."""

    name: str
    preset: str
    published: str
    protocol: str
    sets: tuple[str, ...] = ()
    mini: tuple[str, ...] = ()


def _contrastive(head: str, published: str, distance: str, pairs: int = 40_000) -> Row:
    margins = {"l1": 250, "l2": 6} if head == "fc2" else {"l1": 500, "l2": 10}
    sets = (f"distance={distance}", f"margin={margins[distance]}", f"fixed_pairs={pairs}")
    name = f"contrastive {head}, {distance.upper()}, {pairs // 2000}k same pairs"
    mini = (*MINI, "fc=[256, 256]") if head == "fc2" else MINI
    return Row(name, f"contrastive2018-{head.replace('_', '-')}", published, "angelic", sets, mini)


ROWS = (
    # That port's start leaves all similarities of the small network equal to the sixth digit, and its L2 ties them.
    Row("Keras port (2017)", "keras2017", "about 83%", "", (), (*MINI, "init=he")),
    Row("PyTorch project (2019)", "pytorch2019", "about 81%", "", (), MINI),
    _contrastive("fc1", "40.25%", "l1"),
    _contrastive("fc1", "41.50%", "l2"),
    _contrastive("fc1", "40.00%", "l1", 80_000),
    _contrastive("fc1", "40.00%", "l2", 80_000),
    _contrastive("fc1_reg1", "27.00%", "l1"),
    _contrastive("fc1_reg1", "27.25%", "l2"),
    _contrastive("fc2", "28.75%", "l1"),
    _contrastive("fc2", "28.00%", "l2"),
    Row("MNIST, 3 x 3, 2 fc, 2 neurons out", "mnist-siamese-out2-conv1", "97.58%", "nearest", (), DIGITS),
    Row("MNIST, 5 x 5, 2 conv, 2 fc, 2 neurons out", "mnist-siamese-out2", "98.44%", "nearest", (), DIGITS),
    Row("MNIST, 3 x 3, 2 conv, 2 fc, 2 neurons out", "mnist-siamese-out2", "98.56%", "nearest", ("kernel=3",), DIGITS),
    Row("MNIST, 3 x 3, 2 conv, 2 fc", "mnist-siamese", "98.90%", "nearest", (), DIGITS),
    Row("MNIST, classifier", "mnist-classifier", "99.37%", "classify"),
    Row("MNIST, its convolutions transferred", "mnist-transfer", "98.99%", "nearest", (), DIGITS),
    Row("triplet, random negatives", "triplet", "", ""),
    Row("triplet, semi-hard negatives", "triplet", "", "", ("mining=semi-hard",)),
    Row("P x K batches (ours)", "mini-pxk", "", ""),
    Row("P x K batches, softmax (ours)", "mini-softmax", "", ""),
)
"""In the order of docs/results.md."""


@dataclass
class Found:
    """What a row came to; `fault` instead where it broke. Accuracies are shares in [0, 1]."""

    row: str
    published: str
    command: str
    scale: str = ""
    ours: float | None = None
    interval: tuple[float, float] | None = None
    measured: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siblings", description=(__doc__ or "").split("\n")[0])
    presets = list(dict.fromkeys(row.preset for row in ROWS))
    parser.add_argument("--only", action="append", metavar="PRESET", choices=presets, help="a preset; may be repeated")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training for each row; 0 is the whole recipe")
    parser.add_argument("--net", choices=("mini", "paper"), default="mini", help="paper: the preset as it is published")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="laid over every row")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/siblings"), help="folder for the checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table to this file")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `whetstone train` does, before torch is loaded
    import torch

    from cli.train import usable

    torch.set_num_threads(chosen.threads)
    facts = machine() | {"threads": chosen.threads, "device": _named(usable(chosen.device))}
    found = []
    for row in ROWS:
        if not chosen.only or row.preset in chosen.only:
            say.print(f"{row.name} ...", markup=False)
            found.append(_tried(row, chosen))
    table = markdown(found, facts)
    print(table)  # noqa: T201 - the table is what was asked for
    if chosen.json:
        document = {"machine": facts, "seed": chosen.seed, "rows": [asdict(one) for one in found]}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    if chosen.markdown:
        with chosen.markdown.open("a") as file:
            file.write(f"\n{table}\n")


def _named(device: str) -> str:
    import torch

    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def _tried(row: Row, chosen: argparse.Namespace) -> Found:
    sets = _sets(row, chosen)
    found = Found(
        row.name, row.published, " ".join(["whetstone train", row.preset, *(f"--set {_quoted(s)}" for s in sets)])
    )
    try:
        _run(row, sets, chosen, found)
    except Exception as fault:
        found.fault = f"{type(fault).__name__}: {fault}"
        say.print(f"  {found.fault}", markup=False)
    return found


def _quoted(text: str) -> str:
    return f"'{text}'" if " " in text else text


def _sets(row: Row, chosen: argparse.Namespace) -> list[str]:
    """What is laid over the preset: the row's own, what a small run changes, and how long it may take."""
    from cli.train import read

    sets = [*row.sets, *(row.mini if chosen.net == "mini" else ())]
    if chosen.seconds:
        sets += [f"max_seconds={chosen.seconds:g}", "patience=null"]
        whole = read(row.preset, sets, chosen.seed)
        if whole.decay == 1.0 and whole.pairs_per_epoch > FINEST:  # eta does not fall, so an epoch may be any length
            epochs = math.ceil(whole.epochs * whole.pairs_per_epoch / FINEST)
            sets += [f"pairs_per_epoch={FINEST}", f"epochs={epochs}"]
    if row.preset == "mnist-transfer":
        sets.append(f"transfer={_folder(_classifier(), chosen)}")
    return [*sets, *chosen.set]


def _classifier() -> Row:
    return next(row for row in ROWS if row.preset == "mnist-classifier")


def _folder(row: Row, chosen: argparse.Namespace) -> Path:
    """A folder for each row, scale and seed: a second run of the same goes on, or finds that all is done."""
    told = "".join(c if c.isalnum() else "-" for c in "-".join([row.preset, *row.sets]))
    return Path(chosen.output, f"{told}-{chosen.net}-{chosen.seconds:g}s-seed{chosen.seed}")


def _run(row: Row, sets: list[str], chosen: argparse.Namespace, found: Found) -> None:
    """Train a row, and put into `found` what it reaches."""
    from cli import scoring, settings
    from cli.train import read, usable
    from model import dataset, episode, evaluate
    from model.checkpoint import Checkpoints
    from model.train import fit

    if row.preset == "mnist-transfer" and not (_folder(_classifier(), chosen) / "best.json").exists():
        _run(_classifier(), _sets(_classifier(), chosen), chosen, Found("", "", ""))
    config, device, folder = read(row.preset, sets, chosen.seed), usable(chosen.device), _folder(row, chosen)
    where = settings.load()
    data = dataset.load(**config.wanted, data_root=where.data_root, home=where.home_dir, notify=say.print)
    result = fit(config, data, _progress, device=device, store=Checkpoints(folder))
    if result.value is None or result.outcome != "complete":
        raise RuntimeError(f"{result.outcome}: {result.reason}")
    net = evaluate.load(folder, device).net
    asked = episode.draw(data.validation, chosen.tasks, config.way, SEED)
    score = evaluate.one_shot(net, data.validation.to(device), asked)
    found.tasks = scoring.row(score.correct, score.tasks) | {"way": config.way, "data": data.name}
    found.scale = _scale(config, result.epochs, result.seconds)
    found.ours, found.interval = score.accuracy, score.interval
    found.measured = f"{score.tasks:,} fresh {config.way}-way validation tasks"
    if row.protocol == "angelic" and data.name == "omniglot":
        few = _angelic(data)
        score = evaluate.one_shot(net, few[0].to(device), few[1])
        found.ours, found.interval = score.accuracy, score.interval
        found.measured = f"Angelic 01 to 20, {score.tasks} queries, one reference each"
    elif row.protocol in ("nearest", "classify"):
        _digits(row, net, config, data, folder, found)
    if "fresh" not in found.measured:
        found.measured += f"; fresh tasks {100 * found.tasks['accuracy']:.1f}%"
    elif data.name != "mnist":  # others draw the characters of a task from all alphabets at once, which is easier
        wide = episode.draw(data.validation, chosen.tasks, config.way, SEED, across=True)
        share = evaluate.one_shot(net, data.validation.to(device), wide).accuracy
        found.measured += f", within an alphabet; across alphabets {100 * share:.1f}%"


def _progress(epoch: int, metrics: dict[str, float]) -> None:
    if say.is_terminal:
        say.print(f"  epoch {epoch}: loss {metrics['loss']:.4f}, {100 * metrics['accuracy']:.1f}%", end="\r")


def _scale(config: TrainConfig, epochs: int, seconds: float) -> str:
    side, rates = config.net.input, {layer.eta for layer in config.layers}
    pairs = epochs * config.steps_per_epoch * config.pairs_per_batch
    eta = f"{rates.pop():g}" if len(rates) == 1 else "by layer"
    return f"{config.net.parameters:,} parameters, {side} x {side}, eta {eta}, {pairs:,} pairs in {seconds:.0f} s"


def _angelic(data: Dataset) -> tuple[Drawings, Episodes]:
    """All of Angelic's 20 characters at once: each drawing of the part asked for by each other drawer's references."""
    import torch

    from model.episode import Episodes

    few = data.validation.select(alphabets=["Angelic"])
    count, drawers = few.images.shape[:2]
    grid = [(c, q, r) for c in range(count) for q in range(drawers) for r in range(drawers) if q != r]
    character, query, reference = torch.tensor(grid).T
    support = torch.arange(count)[None, :, None] * drawers + reference[:, None, None]
    return few, Episodes(character * drawers + query, support, character)


def _digits(row: Row, net: SiameseNet, config: TrainConfig, data: Dataset, folder: Path, found: Found) -> None:
    """MNIST's whole test file: classified by the head, or by the nearest of one reference image per digit."""
    from cli import settings, uses
    from model import baseline, mnist

    command = "python -m benchmarks.siblings"
    with uses.recorded(folder, "mnist_test_images", command) as use:
        images, labels = mnist.test_images(settings.load().data_root, config.net.input)
        embedded = _embedded(net, images)
        if row.protocol == "classify":
            right = [int((net.classify(embedded).argmax(1).cpu() == labels).sum())]
        else:
            right = [_nearest(net, embedded, labels, data.validation, number) for number in range(REFERENCES)]
        total = len(labels)
        use.score(statistics.fmean(right) / total, total * len(right))
    found.ours = statistics.fmean(right) / total
    if len(right) == 1:
        found.interval = baseline.interval(right[0], total)
        found.measured = f"{total:,} test digits, classified by its head"
    else:  # which images are the references matters more than which are classified
        reach = 2.262 * statistics.stdev(right) / math.sqrt(len(right)) / total
        found.interval = max(0.0, found.ours - reach), min(1.0, found.ours + reach)
        low, high = (100 * each(right) / total for each in (min, max))
        found.measured = f"{total:,} test digits, mean of {len(right)} sets of references ({low:.1f} to {high:.1f}%)"


def _embedded(net: SiameseNet, images: torch.Tensor) -> torch.Tensor:
    import torch

    from model.distortion import clean

    with torch.no_grad():
        return torch.cat([net.embed(clean(part.to(net.device))) for part in torch.split(images, 500)])


def _nearest(net: SiameseNet, embedded: torch.Tensor, labels: torch.Tensor, known: Drawings, number: int) -> int:
    """Test digits whose nearest reference, image `number` of each digit's validation images, is of their class."""
    import torch

    from model.evaluate import strictly_best

    references = _embedded(net, known.images[:, number])  # (10, E)
    with torch.no_grad():
        alike = net.compare(embedded[:, None], references[None])  # (T, 10)
    return int(strictly_best(alike.cpu(), labels).sum())


def markdown(found: Sequence[Found], facts: dict[str, Any]) -> str:
    """The table as docs/results.md has it."""
    device = facts["cpu"] if facts["device"] == "CPU" else facts["device"]
    hardware = f"{device}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    lines = [
        f"Hardware: {hardware}; torch {facts['torch']}.",
        "",
        "| row | published | ours | 95% interval | measured on | scale | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        ours = "-" if one.ours is None else f"{100 * one.ours:.2f}%"
        reach = "" if one.interval is None else f"{100 * one.interval[0]:.1f} to {100 * one.interval[1]:.1f}"
        cells = (one.row, one.published or "-", ours, reach, one.fault or one.measured, one.scale, f"`{one.command}`")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
