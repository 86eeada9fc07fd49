"""Each loss is the formula of its source, computed once more in plain Python, and its slopes are always finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.init import initialise
from model.loss import loss
from model.net import SiameseNet
from model.spec import TrainConfig, config
from tests.unit.siamese import POINT, TINY

DRAWERS = 4
P, K = 3, 2
Vector = list[float]


def setup(**settings: Any) -> tuple[SiameseNet, TrainConfig]:
    recipe = config(POINT, {**TINY, "fc": 5, **settings}, 0)
    net = SiameseNet(recipe.net)
    initialise(net, "paper", torch.Generator().manual_seed(0))
    return net, recipe


def embeddings(count: int, seed: int = 0, sphere: bool = False) -> Tensor:
    drawn = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1) if sphere else drawn


def pairs() -> Batch:
    """Four pairs of six images, one image in several, with weights that differ."""
    return Batch(
        torch.tensor([0, 1, 4, 5, 8, 9]),
        torch.tensor([0, 2, 0, 1]),
        torch.tensor([1, 3, 4, 5]),
        torch.tensor([1.0, 1.0, 0.0, 0.0]),
        torch.tensor([0.4, 0.3, 0.2, 0.1]),
    )


def crossed() -> Batch:
    """P characters, K drawings, two negatives to each positive pair; the positives come first."""
    first = torch.tensor([0, 2, 4, 0, 0, 2, 2, 4, 4])
    second = torch.tensor([1, 3, 5, 2, 5, 1, 4, 0, 3])
    same = torch.tensor([1.0] * 3 + [0.0] * 6)
    weight = torch.tensor([0.5 / 3] * 3 + [0.5 / 6] * 6)
    return Batch(torch.tensor([0, 3, 5, 6, 8, 10]), first, second, same, weight, positives=3)


def triplets() -> Batch:
    nothing = torch.zeros(0)
    index = nothing.long()
    which = torch.tensor([[0, 1, 2], [2, 3, 0], [4, 5, 1]])
    return Batch(torch.tensor([0, 3, 5, 6, 8, 10]), index, index, nothing, nothing, triplets=which)


def distance(kind: str, a: Vector, b: Vector) -> float:
    if kind == "l1":
        return sum(abs(x - y) for x, y in zip(a, b, strict=True))
    if kind == "cosine":
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return squared if kind == "squared" else math.sqrt(squared)


def character(batch: Batch) -> list[int]:
    return [image // DRAWERS for image in batch.images.tolist()]


@pytest.mark.parametrize("kind", ["l1", "squared"])
def test_sigmoid_is_the_weighted_cross_entropy_of_the_paper_s_head(kind: str) -> None:
    net, recipe = setup(loss="sigmoid", distance=kind)
    h, batch, power = embeddings(6), pairs(), 1 if kind == "l1" else 2
    alpha, bias = net.output.weight[0].tolist(), net.output.bias.item()
    expected, rows = 0.0, h.tolist()
    for i, j, same, weight in zip(batch.first, batch.second, batch.same, batch.weight, strict=True):
        logit = bias + sum(a * abs(x - y) ** power for a, x, y in zip(alpha, rows[i], rows[j], strict=True))
        p = 1 / (1 + math.exp(-logit))
        expected -= weight.item() * math.log(p if same else 1 - p)
    assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2", "squared", "cosine"])
@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_contrastive_is_the_spring_of_2006(kind: str, margin: float) -> None:
    net, recipe = setup(loss="contrastive", distance=kind, margin=margin)
    h, batch = embeddings(6), pairs()
    expected, rows = 0.0, h.tolist()
    for i, j, same, weight in zip(batch.first, batch.second, batch.same, batch.weight, strict=True):
        d = distance(kind, rows[i], rows[j])
        expected += weight.item() * 0.5 * (d**2 if same else max(0.0, margin - d) ** 2)
    assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "l2", "squared", "cosine"])
@pytest.mark.parametrize("shape", ["triplets", "characters"])
def test_triplet_without_mining_is_the_hinge_of_the_triplets_as_drawn(kind: str, shape: str) -> None:
    settings = {} if shape == "triplets" else {"batches": "pxk", "characters": 4, "drawings": 2}
    net, recipe = setup(loss="triplet", distance=kind, margin=0.2, **settings)
    batch = triplets() if shape == "triplets" else crossed()
    drawn = [(0, 1, 2), (2, 3, 0), (4, 5, 1)]
    if shape == "characters":
        drawn = [(0, 1, 2), (0, 1, 5), (2, 3, 1), (2, 3, 4), (4, 5, 0), (4, 5, 3)]
    satisfied, seeds = 0, 10
    for seed in range(seeds):
        h = embeddings(6, seed, sphere=True)
        rows = h.tolist()
        gaps = [distance(kind, rows[a], rows[p]) - distance(kind, rows[a], rows[n]) for a, p, n in drawn]
        satisfied += sum(gap + 0.2 <= 0 for gap in gaps)
        expected = sum(max(0.0, gap + 0.2) for gap in gaps) / len(drawn)
        assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert 0 < satisfied < seeds * len(drawn), "some add nothing, some do"


def semi_hard(kind: str, rows: list[Vector], of: list[int], anchor: int, positive: int) -> float:
    """FaceNet, section 3.2: the closest negative that is farther than the positive; else the mildest violation."""
    near = distance(kind, rows[anchor], rows[positive])
    negatives = [distance(kind, rows[anchor], rows[n]) for n in range(len(rows)) if of[n] != of[anchor]]
    farther = [d for d in negatives if d > near]
    return near - (min(farther) if farther else max(negatives))


@pytest.mark.parametrize("kind", ["l1", "l2", "squared", "cosine"])
@pytest.mark.parametrize("shape", ["triplets", "characters"])
@pytest.mark.parametrize("sphere", [True, False])
def test_semi_hard_mining_follows_facenet_s_rule(kind: str, shape: str, sphere: bool) -> None:
    settings = {} if shape == "triplets" else {"batches": "pxk", "characters": 4, "drawings": 2}
    net, recipe = setup(loss="triplet", mining="semi-hard", distance=kind, normalise=sphere, margin=0.4, **settings)
    batch = triplets() if shape == "triplets" else crossed()
    fell_back = 0
    for seed in range(20):
        h = embeddings(6, seed, sphere)
        rows, of = h.tolist(), character(batch)
        gaps = [semi_hard(kind, rows, of, a, p) for a, p in ((0, 1), (2, 3), (4, 5))]
        fell_back += sum(gap > 0 for gap in gaps)
        expected = sum(max(0.0, gap + 0.4) for gap in gaps) / 3
        assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < fell_back < 60, "both parts of the rule were met"


def test_a_negative_exactly_as_far_as_the_positive_is_not_farther() -> None:
    net, recipe = setup(loss="triplet", mining="semi-hard", distance="l1", normalise=False, margin=0.5, fc=1)
    h = torch.tensor([[0.0], [1.0], [-1.0], [1.0], [3.0], [9.0]])
    batch = triplets()
    batch = replace(batch, triplets=batch.triplets[:1])
    assert loss(net, h, batch, recipe, DRAWERS).item() == 0.0, "3, not 1 and not 9"
    assert loss(net, h.clamp(max=1.2), batch, recipe, DRAWERS).item() == pytest.approx(1 - 1.2 + 0.5)


@pytest.mark.parametrize("kind", ["l1", "l2", "squared", "cosine"])
def test_softmax_weighs_a_positive_against_the_drawings_of_others_and_nothing_else(kind: str) -> None:
    """Neither the anchor itself nor its other positives stand in the denominator."""
    net, recipe = setup(loss="softmax", batches="pxk", distance=kind, temperature=0.7, characters=4, drawings=3)
    batch = replace(crossed(), images=torch.tensor([0, 1, 2, 4, 5, 8]))  # 3, 2 and 1 of a character
    h = embeddings(6)
    rows, of = h.tolist(), character(batch)
    terms = []
    for anchor in range(6):
        score = [math.exp(-distance(kind, rows[anchor], rows[i]) / 0.7) for i in range(6)]
        others = sum(score[i] for i in range(6) if of[i] != of[anchor])
        terms += [-math.log(score[i] / (score[i] + others)) for i in range(6) if of[i] == of[anchor] and i != anchor]
    assert len(terms) == 6 + 2
    assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_classes_is_the_cross_entropy_of_the_character() -> None:
    net, recipe = setup(loss="classes", classes=3)
    h, batch = embeddings(6), pairs()
    batch = replace(batch, weight=torch.full((4,), 0.25))
    logits = (h @ net.output.weight.T + net.output.bias).tolist()
    each = [math.log(sum(math.exp(x) for x in row)) - row[of] for row, of in zip(logits, character(batch), strict=True)]
    assert loss(net, h, batch, recipe, DRAWERS).item() == pytest.approx(sum(each) / 6, rel=1e-5)


LOSSES: dict[str, tuple[dict[str, Any], Batch]] = {
    "sigmoid": ({}, pairs()),
    "contrastive l1": ({"loss": "contrastive", "distance": "l1"}, pairs()),
    "contrastive l2": ({"loss": "contrastive", "distance": "l2"}, pairs()),
    "contrastive cosine": ({"loss": "contrastive", "distance": "cosine"}, pairs()),
    "triplet": ({"loss": "triplet"}, triplets()),
    "semi-hard": ({"loss": "triplet", "mining": "semi-hard"}, triplets()),
    "semi-hard l1": ({"loss": "triplet", "mining": "semi-hard", "distance": "l1", "normalise": False}, triplets()),
    "semi-hard l2": ({"loss": "triplet", "mining": "semi-hard", "normalise": False}, triplets()),
    "semi-hard cosine": ({"loss": "triplet", "mining": "semi-hard", "distance": "cosine"}, crossed()),
    "softmax": ({"loss": "softmax", "batches": "pxk", "characters": 4, "drawings": 2}, crossed()),
    "softmax l2": ({"loss": "softmax", "distance": "l2", "batches": "pxk", "characters": 4, "drawings": 2}, crossed()),
    "softmax cosine": (
        {"loss": "softmax", "distance": "cosine", "batches": "pxk", "characters": 4, "drawings": 2},
        crossed(),
    ),
    "classes": ({"loss": "classes", "classes": 3}, pairs()),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("same", ["two", "all", "nothing"])
def test_slopes_are_finite_where_embeddings_coincide(name: str, same: str) -> None:
    settings, batch = LOSSES[name]
    net, recipe = setup(**settings)
    h = embeddings(6, sphere=recipe.normalise)
    h = {"two": h[[0, 0, 1, 1, 0, 2]], "all": h[[0] * 6], "nothing": torch.zeros_like(h)}[same].requires_grad_()
    value = loss(net, h, batch, recipe, DRAWERS)
    value.backward()
    assert value.isfinite()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert h.grad.abs().max() < 1e3


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_stays_in_fp32_within_bf16(name: str) -> None:
    settings, batch = LOSSES[name]
    net, recipe = setup(**settings)
    h = embeddings(6, sphere=recipe.normalise)
    plain = loss(net, h, batch, recipe, DRAWERS)
    with torch.autocast("cpu", torch.bfloat16):
        within = loss(net, h, batch, recipe, DRAWERS)
    assert plain.dtype == within.dtype == torch.float32
    assert plain.shape == ()
    assert torch.equal(plain, within)


@pytest.mark.parametrize("name", ["sigmoid", "contrastive l2", "classes"])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_losses_of_parts_add_up_to_that_of_the_batch(name: str, count: int) -> None:
    net, recipe = setup(**LOSSES[name][0])
    left, right = torch.arange(10).chunk(2)
    same = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    batch = Batch(
        torch.arange(10) % 12, left, right, same, torch.full((5,), 0.2), matrices=torch.rand(10, 2, 3), twins=True
    )
    h = embeddings(10)
    whole = loss(net, h, batch, recipe, DRAWERS)
    parts = list(batch.parts(count))
    assert sorted(torch.cat([places for _, places in parts]).tolist()) == list(range(10))
    for part, places in parts:
        assert torch.equal(part.images, batch.images[places])
        assert torch.equal(part.matrices, batch.matrices[places])
    total = sum(loss(net, h[places], part, recipe, DRAWERS) for part, places in parts)
    torch.testing.assert_close(total, whole)
