"""Verification: do two drawings show the same character? (Koch et al. 2015, section 4.2)

Promise: the threshold above which a pair counts as "same" is chosen on validation pairs alone, exactly, and the test
pairs are judged by it once. Every distinct image is embedded once, whatever the number of pairs. A similarity that is
not a finite number is a wrong answer whichever the truth, so a broken network scores no better than a collapsed one.

The paper's 10,000 validation pairs hold 5,000 of one character, and four drawers of 277 characters give only 1,662
distinct ones (test: 382 characters, 2,292): pairs repeat, and Wilson's interval, which takes them for independent, is
narrower than it should be. `Pairs.distinct` says how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import evaluate
from model.drawings import Drawings
from model.evaluate import Score, never
from model.net import SiameseNet
from model.pairs import PairSampler

PAPER_PAIRS = 10_000
"""Validation pairs, and as many test pairs (section 4.1)."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of drawings by two different people, as flat indices into the `Drawings` they were drawn from.

    first   (P,) int64
    second  (P,) int64
    same    (P,) bool, whether both show one character
    """

    first: Tensor
    second: Tensor
    same: Tensor

    def __len__(self) -> int:
        return int(self.same.shape[0])

    @property
    def distinct(self) -> int:
        """How many of the pairs differ, whichever image is the first."""
        low, high = torch.minimum(self.first, self.second), torch.maximum(self.first, self.second)
        return len(set(zip(low.tolist(), high.tolist(), strict=True)))


@dataclass(frozen=True)
class Verification:
    """How well one network tells same from different.

    `auc` is the chance that a test pair of one character is more alike than one of two, a tie counting half.
    """

    threshold: float
    validation: Score
    test: Score
    auc: float


def draw(drawings: Drawings, pairs: int, seed: int) -> Pairs:
    """`pairs` pairs, equally many from every alphabet, half of them of one character, the others of two of it.

    The same seed gives the same pairs. Raises DataError where the drawings cannot give such pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second, same = PairSampler(drawings, pairs).draw(generator, equal_shares=True)
    return Pairs(first.cpu(), second.cpu(), same.cpu() > 0.5)


def verify(validation: Tensor, validation_pairs: Pairs, test: Tensor, test_pairs: Pairs) -> Verification:
    """From the similarities (P,) of both sets of pairs: the threshold by the one, accuracy by the other."""
    bound = threshold(validation, validation_pairs.same)
    return Verification(
        bound,
        Score.of(judged(validation, validation_pairs.same, bound)),
        Score.of(judged(test, test_pairs.same, bound)),
        area(test, test_pairs.same),
    )


@torch.no_grad()
def similarities(
    net: SiameseNet,
    drawings: Drawings,
    pairs: Pairs,
    *,
    bf16: bool = False,
    interrupt: Callable[[], bool] = never,
) -> Tensor:
    """How alike `net` finds each pair: (P,) float64 on the CPU. Raises Interrupted, ValueError for another size."""
    if drawings.size != net.config.input:
        raise ValueError(f"the network sees {net.config.input} pixels a side, the drawings have {drawings.size}")
    shown, place = torch.unique(torch.cat([pairs.first, pairs.second]), return_inverse=True)
    features = evaluate.embed(net, drawings, shown, bf16=bf16, interrupt=interrupt)
    first, second = place.to(features.device).chunk(2)
    chunk = max(1, _CHUNK_VALUES // features.shape[1])
    parts = [net.compare(features[first[part]], features[second[part]]).cpu() for part in _pieces(len(pairs), chunk)]
    return torch.cat(parts).double()


def pixel_similarities(drawings: Drawings, pairs: Pairs) -> Tensor:
    """Cosine similarity of the pixels of each pair, (P,) float64: what a network has to beat."""
    flat = drawings.flat.flatten(1)
    first, second = pairs.first.to(flat.device), pairs.second.to(flat.device)
    parts = []
    for part in _pieces(len(pairs), _CHUNK_PAIRS):
        left, right = flat[first[part]].double(), flat[second[part]].double()
        lengths = (left.square().sum(1) * right.square().sum(1)).sqrt().clamp_min(1.0)
        parts.append(((left * right).sum(1) / lengths).cpu())
    return torch.cat(parts)


def threshold(similarity: Tensor, same: Tensor) -> float:
    """The bound by which `judged` is right most often.

    Pairs of equal similarity stay together. Candidates are one below all, one above all and the middle between any two
    neighbours; of equally good ones the middle one is taken.
    """
    honest = _honest(similarity, same)
    values = torch.unique(honest[honest.isfinite()])  # sorted
    if len(values) == 0:
        return 0.0
    bounds = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])
    alike, unlike = honest[same].sort().values, honest[~same].sort().values
    right = (len(alike) - torch.searchsorted(alike, bounds, right=True)) + torch.searchsorted(
        unlike, bounds, right=True
    )
    best = (right == right.max()).nonzero().flatten()
    return float(bounds[best[len(best) // 2]])


def judged(similarity: Tensor, same: Tensor, bound: float) -> Tensor:
    """(P,) bool: which pairs are told right, "same" being a similarity above `bound`."""
    return (_honest(similarity, same) > bound) == same


def area(similarity: Tensor, same: Tensor) -> float:
    """The area under the receiver operating characteristic: 1 is perfect, 0.5 is guessing."""
    honest = _honest(similarity, same)
    alike, unlike = honest[same], honest[~same].sort().values
    if len(alike) == 0 or len(unlike) == 0:
        raise ValueError("the area needs pairs of both kinds")
    below, reached = torch.searchsorted(unlike, alike), torch.searchsorted(unlike, alike, right=True)
    return float((below + reached).double().mean() / 2 / len(unlike))


_CHUNK_VALUES = 2**24
"""Differences of features held at once (64 MiB)."""
_CHUNK_PAIRS = 500
"""Pairs of images held at once as float64: 88 MB at 105 pixels."""


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _honest(similarity: Tensor, same: Tensor) -> Tensor:
    """Float64, with what is no finite number at the wrong end of the scale."""
    wrong = torch.where(same, -torch.inf, torch.inf).to(torch.float64)
    return torch.where(similarity.isfinite(), similarity.to(torch.float64), wrong)
