"""How often does a network pick the right character? One-shot evaluation (Koch et al. 2015, section 4.3).

Promise: every distinct image is embedded once, whatever the number of tasks, and a task is answered right only by a
similarity that is strictly the largest, with nothing in its row that is not a number. A network that says the same of
every pair therefore scores 0, never 100%: ties and NaN count as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.baseline import interval
from model.checkpoint import Best, CheckpointError, open_checkpoint
from model.distortion import clean, distort
from model.drawings import Drawings
from model.episode import Episodes
from model.net import SiameseNet
from model.precision import autocast
from model.spec import TrainConfig

PAPER_TASKS = 320
"""One-shot tasks by which the paper chose its epoch."""

_CHUNK_FLOPS = 1e11
"""Work between two looks at `interrupt`: a second or two on one slow core."""
_CHUNK_VALUES = {"cpu": 2**19, "cuda": 2**24}
"""Differences of features held at once while tasks are answered: on a CPU what its cache holds (2 MiB)."""

_VIEWS_SEED = 0


class Interrupted(Exception):
    """The evaluation was asked to stop before it had an answer to every task."""


@dataclass(frozen=True)
class Score:
    """Right answers among tasks, with the Wilson 95% interval of their share."""

    correct: int
    tasks: int
    accuracy: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, right: Tensor) -> Score:
        """From (T,) bool, one a task."""
        correct, tasks = int(right.sum()), right.numel()
        return cls(correct, tasks, correct / tasks, interval(correct, tasks))


def never() -> bool:
    """The interrupt that does not come."""
    return False


def one_shot(
    net: SiameseNet,
    drawings: Drawings,
    episodes: Episodes,
    *,
    bf16: bool = False,
    views: int = 0,
    interrupt: Callable[[], bool] = never,
) -> Score:
    """Score `net` on tasks over `drawings` of its own input size, on the device it is on. Raises Interrupted."""
    return Score.of(answer(net, drawings, episodes, bf16=bf16, views=views, interrupt=interrupt))


def answer(
    net: SiameseNet,
    drawings: Drawings,
    episodes: Episodes,
    *,
    bf16: bool = False,
    views: int = 0,
    interrupt: Callable[[], bool] = never,
) -> Tensor:
    """Which tasks `net` answers right: (T,) bool on the CPU. Raises Interrupted; ValueError for another image size.

    A character's similarity is the mean over its drawings in the support set. With `views` an image's embedding is the
    mean over itself and so many distorted copies (by the paper's distortions, the same ones each time).
    """
    return answer_each(net, drawings, [episodes], bf16=bf16, views=views, interrupt=interrupt)[0]


def answer_each(
    net: SiameseNet,
    drawings: Drawings,
    sets: Sequence[Episodes],
    *,
    bf16: bool = False,
    views: int = 0,
    interrupt: Callable[[], bool] = never,
) -> list[Tensor]:
    """`answer` for several sets of tasks, of other ways and shots, over the same drawings: each embedded once."""
    indices = [torch.cat([tasks.query, tasks.support.flatten()]) for tasks in sets]
    shown, place = torch.unique(torch.cat(indices), return_inverse=True)
    features = embed(net, drawings, shown, bf16=bf16, views=views, interrupt=interrupt)  # (U, E)
    right = []
    for tasks, places in zip(sets, place.split([len(index) for index in indices]), strict=True):
        query, support = places[: len(tasks)], places[len(tasks) :].view(tasks.support.shape)  # (T,), (T, N, K)
        right.append(_decide(net, features, query, support, tasks.target, interrupt))
    return right


@torch.no_grad()
def _decide(
    net: SiameseNet,
    features: Tensor,
    query: Tensor,
    support: Tensor,
    target: Tensor,
    interrupt: Callable[[], bool],
) -> Tensor:
    """Which tasks are answered right, (T,) bool; `query` (T,) and `support` (T, N, K) are rows of `features` (U, E)."""
    query, support, target = (index.to(features.device) for index in (query, support, target))
    right = torch.empty(len(query), dtype=torch.bool, device=features.device)
    chunk = max(1, _CHUNK_VALUES.get(features.device.type, 2**24) // (support[0].numel() * features.shape[1]))
    for begin in range(0, len(query), chunk):
        if interrupt():
            raise Interrupted
        part = slice(begin, begin + chunk)
        similarity = net.compare(features[query[part], None, None], features[support[part]])  # (t, N, K)
        right[part] = strictly_best(similarity.mean(2), target[part])
    return right.cpu()


@torch.no_grad()
def embed(
    net: SiameseNet,
    drawings: Drawings,
    shown: Tensor,
    *,
    bf16: bool = False,
    views: int = 0,
    interrupt: Callable[[], bool] = never,
) -> Tensor:
    """Embeddings (U, E) of the drawings with these flat indices, on the network's device. Raises as `answer` does."""
    if drawings.size != net.config.input:
        raise ValueError(f"the network sees {net.config.input} pixels a side, the drawings have {drawings.size}")
    device, images = net.device, drawings.flat
    shown = shown.to(images.device)
    chunk = int(min(256, max(8, _CHUNK_FLOPS // net.config.flops)))
    features = torch.empty(len(shown), net.config.embedding, device=device)
    generator = torch.Generator().manual_seed(_VIEWS_SEED)
    for begin in range(0, len(shown), chunk):
        if interrupt():
            raise Interrupted
        some = images[shown[begin : begin + chunk]].to(device)
        features[begin : begin + chunk] = _seen(net, clean(some), bf16)
        for _ in range(views):
            if interrupt():
                raise Interrupted
            features[begin : begin + chunk] += _seen(net, distort(some, generator), bf16)
    if views and net.config.normalise:
        return F.normalize(features, dim=1, eps=1e-6)
    return features / (1 + views) if views else features


def _seen(net: SiameseNet, pixels: Tensor, bf16: bool) -> Tensor:
    with autocast(pixels.device, bf16):
        return net.embed(pixels.contiguous(memory_format=torch.channels_last))


def strictly_best(similarity: Tensor, target: Tensor) -> Tensor:
    """(T, N) similarities, (T,) places: is the one at `target` larger than every other, and all of them finite?"""
    own = similarity.gather(1, target[:, None])
    reached = (similarity >= own).sum(1)  # itself, and whatever ties with it or beats it
    return (reached == 1) & similarity.isfinite().all(1)


class Loaded(NamedTuple):
    """A checkpoint's network, recipe, metrics of its epoch, and the data set it was trained on ("" where not noted)."""

    net: SiameseNet
    config: TrainConfig
    metrics: Mapping[str, float]
    data: str


def load(path: Path | str, device: torch.device | str = "cpu") -> Loaded:
    """The checkpoint in a folder (its best, else its last), or of one of its files. Raises CheckpointError."""
    saved = open_checkpoint(path)
    if isinstance(saved, Best):
        weights, metrics = dict(saved.weights), dict(saved.metrics)
    else:
        kept = "average." if saved.config.average else "net."
        weights = {name.removeprefix(kept): t for name, t in saved.tensors.items() if name.startswith(kept)}
        metrics = dict(saved.history[-1]) if saved.history else {}
    net = SiameseNet(saved.config.net)
    try:
        net.load_state_dict(weights)
    except RuntimeError as fault:
        raise CheckpointError(f"{path}: its weights are not those of the network in its JSON") from fault
    return Loaded(net.on(device), saved.config, metrics, saved.data)
