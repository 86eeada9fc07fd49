"""The threshold is the best there is on validation pairs, and test pairs are judged by it alone."""

from __future__ import annotations

import math

import pytest
import torch

from model import verification
from model.distortion import clean
from model.drawings import Drawings
from model.geometry import Conv, NetConfig
from model.init import initialise
from model.net import SiameseNet
from model.verification import Pairs, area, draw, judged, threshold
from tests.unit.siamese import SIDE, drawings
from tests.unit.test_model_pairs import make

CONFIG = NetConfig(SIDE, (Conv(4, 3, "floor"), Conv(6, 2)), (8,))


def network(seed: int = 0) -> SiameseNet:
    net = SiameseNet(CONFIG)
    initialise(net, "he", torch.Generator().manual_seed(seed))
    return net.on("cpu")


def test_every_alphabet_gives_as_many_pairs_and_half_of_them_are_of_one_character() -> None:
    shown = make((25, 12, 20, 40), drawers=4)
    pairs = draw(shown, 10_000, seed=1)
    assert len(pairs) == 10_000
    first, second = pairs.first // 4, pairs.second // 4
    alphabet = shown.alphabet[first]
    assert torch.equal(alphabet, shown.alphabet[second])
    assert torch.bincount(alphabet).tolist() == [2500] * 4
    assert torch.bincount(alphabet[pairs.same]).tolist() == [1250] * 4
    assert torch.equal(first == second, pairs.same)
    assert (pairs.first % 4 != pairs.second % 4).all()


def test_the_same_seed_gives_the_same_pairs_and_repeated_ones_are_counted_once() -> None:
    shown = drawings(1)
    one, again, other = (draw(shown, 300, seed) for seed in (7, 7, 8))
    assert torch.equal(one.first, again.first)
    assert torch.equal(one.second, again.second)
    assert not torch.equal(one.first, other.first)
    few = Pairs(torch.tensor([0, 1, 0, 2]), torch.tensor([1, 0, 1, 3]), torch.tensor([True, True, True, False]))
    assert few.distinct == 2


def brute(similarity: torch.Tensor, same: torch.Tensor) -> int:
    """Right answers by the best of every bound that could matter."""
    bounds = [-math.inf, *(value.item() for value in similarity)]
    return max(int(((similarity > bound) == same).sum()) for bound in bounds)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_threshold_is_right_more_often(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(60, generator=generator) < 0.5
    similarity = (torch.randn(60, generator=generator) + same).mul(4).round()  # many ties
    bound = threshold(similarity, same)
    assert int(judged(similarity, same, bound).sum()) == brute(similarity, same)
    assert not (similarity == bound).any()


def test_of_equally_good_thresholds_the_middle_one_is_taken() -> None:
    same = torch.tensor([True, True, False, False])
    assert threshold(torch.tensor([3.0, 4.0, 1.0, 2.0]), same) == 2.5
    # Right four times at 1.5, at 3.5 and at 5.5.
    three = torch.tensor([True, True, True, False, False, False])
    assert threshold(torch.tensor([6.0, 4.0, 2.0, 5.0, 3.0, 1.0]), three) == 3.5


def test_a_collapsed_or_broken_network_is_right_half_the_time_or_never() -> None:
    same = torch.arange(100) % 2 == 0
    tied = torch.full((100,), 0.3)
    assert judged(tied, same, threshold(tied, same)).sum() == 50
    broken = torch.full((100,), torch.nan)
    assert judged(broken, same, threshold(broken, same)).sum() == 0
    assert area(tied, same) == 0.5
    assert area(broken, same) == 0.0
    for value in (torch.inf, -torch.inf, torch.nan):  # as the similarity of any pair
        one = torch.tensor([1.0, 0.0, value])
        for truth in (True, False):
            answers = torch.tensor([True, False, truth])
            assert judged(one, answers, threshold(one, answers)).tolist() == [True, True, False]


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(80, generator=generator) < 0.4
    similarity = (torch.randn(80, generator=generator) + same).mul(2).round()
    alike, unlike = similarity[same], similarity[~same]
    order = (alike[:, None] > unlike).double() + (alike[:, None] == unlike).double() / 2
    assert area(similarity, same) == pytest.approx(order.mean().item())


def test_test_pairs_do_not_move_the_threshold() -> None:
    validation, test = draw(drawings(1), 60, 1), draw(drawings(2), 60, 1)
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(60, generator=generator) + validation.same
    unseen = torch.randn(60, generator=generator) + test.same
    result = verification.verify(known, validation, unseen + 10, test)
    assert result.threshold == verification.verify(known, validation, unseen, test).threshold
    assert result.test.correct == int(test.same.sum())  # all far above it: "same" to everything
    assert result.validation.correct == brute(known, validation.same)


@torch.no_grad()
def test_similarities_are_those_of_a_forward_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    net, shown = network(), drawings(5)
    pairs = draw(shown, 50, 0)
    expected = [
        net(clean(shown.flat[torch.stack([a, b])])).item() for a, b in zip(pairs.first, pairs.second, strict=True)
    ]
    whole = verification.similarities(net, shown, pairs)
    assert whole.tolist() == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("model.verification._CHUNK_VALUES", 1)
    assert torch.allclose(verification.similarities(net, shown, pairs), whole, atol=1e-5)


def test_each_distinct_image_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, shown, seen = network(), drawings(5), []
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda images: seen.append(len(images)) or embed(images))
    pairs = draw(shown, 500, 0)
    verification.similarities(net, shown, pairs)
    assert sum(seen) == len(torch.cat([pairs.first, pairs.second]).unique()) <= len(shown)


def test_pixels_are_compared_by_their_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.tensor([[255, 0, 0, 0], [255, 255, 0, 0], [0, 0, 9, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    shown = Drawings(images.view(2, 2, 2, 2), torch.zeros(2, dtype=torch.int64), ("A",), ("A/1", "A/2"))
    pairs = Pairs(torch.tensor([0, 0, 2, 0]), torch.tensor([1, 2, 2, 3]), torch.tensor([True, False, True, False]))
    expected = [0.5**0.5, 0.0, 1.0, 0.0]
    assert verification.pixel_similarities(shown, pairs).tolist() == pytest.approx(expected)
    monkeypatch.setattr("model.verification._CHUNK_PAIRS", 1)
    assert verification.pixel_similarities(shown, pairs).tolist() == pytest.approx(expected)


def test_drawings_of_another_size_are_refused() -> None:
    other = drawings(5, side=16)
    with pytest.raises(ValueError, match="12 pixels a side, the drawings have 16"):
        verification.similarities(network(), other, draw(other, 10, 0))
