"""A score is what it claims to be: ties and NaN are wrong, and each image is looked at once."""

from __future__ import annotations

import pytest
import torch

from model import evaluate
from model.baseline import interval
from model.distortion import clean, distort
from model.episode import Episodes, draw
from model.evaluate import Interrupted, Score, answer, answer_each, one_shot, strictly_best
from model.geometry import Conv, NetConfig
from model.init import initialise
from model.net import SiameseNet
from tests.unit.siamese import SIDE, drawings

CONFIG = NetConfig(SIDE, (Conv(4, 3, "floor"), Conv(6, 2)), (8,))
SHOWN = drawings(5)
TASKS = draw(SHOWN, 60, 6, 0)


def network(seed: int = 0) -> SiameseNet:
    net = SiameseNet(CONFIG)
    initialise(net, "he", torch.Generator().manual_seed(seed))
    return net.on("cpu")


@torch.no_grad()
def naive(net: SiameseNet, tasks: Episodes) -> list[bool]:
    """One forward pass for every pair of every task, as the formula has it."""
    answers = []
    for query, support, target in zip(tasks.query, tasks.support, tasks.target, strict=True):
        likeness = [
            [net(clean(SHOWN.flat[torch.stack([query, image])])).item() for image in shots] for shots in support
        ]
        seen = [sum(each) / len(each) for each in likeness]
        answers.append(seen.index(max(seen)) == int(target) and seen.count(max(seen)) == 1)
    return answers


def test_embedding_each_image_once_gives_the_answers_of_a_forward_per_pair() -> None:
    net = network()
    right = answer(net, SHOWN, TASKS)
    assert right.tolist() == naive(net, TASKS)
    assert 0 < right.sum() < len(TASKS)


def test_a_character_s_similarity_is_the_mean_over_its_shots() -> None:
    net = network()
    tasks = draw(SHOWN, 60, 6, 0, shot=3)
    right = answer(net, SHOWN, tasks)
    assert right.tolist() == naive(net, tasks)
    assert right.tolist() != answer(net, SHOWN, TASKS).tolist()


def test_each_distinct_image_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = network(), []
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda images: seen.append(len(images)) or embed(images))
    answer(net, SHOWN, TASKS)
    assert sum(seen) == len(torch.unique(torch.cat([TASKS.query, TASKS.support.flatten()]))) <= len(SHOWN)


def test_several_sets_of_tasks_share_their_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = network(), []
    sets = [
        draw(SHOWN, 30, way, way, shot=shot, across=across)
        for way, shot, across in ((3, 1, False), (6, 3, False), (9, 2, True))
    ]
    alone = [answer(net, SHOWN, tasks).tolist() for tasks in sets]
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda images: seen.append(len(images)) or embed(images))
    assert [right.tolist() for right in answer_each(net, SHOWN, sets)] == alone
    assert sum(seen) <= len(SHOWN)


@pytest.mark.parametrize("place", range(6))
def test_a_network_that_says_the_same_of_everything_scores_nothing(place: int) -> None:
    """argmax of a tie is index 0: with the true class there, a collapsed network would read 100%."""
    net = network()
    with torch.no_grad():
        net.output.weight.zero_()
    order = torch.arange(6).roll(place)
    tasks = Episodes(TASKS.query, TASKS.support[:, order], torch.full_like(TASKS.target, place))
    assert one_shot(net, SHOWN, tasks) == Score(0, 60, 0.0, interval(0, 60))


def test_a_network_of_nan_scores_nothing() -> None:
    net = network()
    with torch.no_grad():
        net.output.bias.fill_(torch.nan)
    assert one_shot(net, SHOWN, TASKS).correct == 0


def test_only_a_strict_and_finite_maximum_is_right() -> None:
    inf, nan = torch.inf, torch.nan
    rows = [
        ([3.0, 1.0, 2.0], True),
        ([3.0, 3.0, 2.0], False),
        ([1.0, 2.0, 2.0], False),
        ([1.0, 2.0, 3.0], False),
        ([3.0, 2.0, 2.0], True),
        ([nan, 1.0, 2.0], False),
        ([3.0, nan, 2.0], False),
        ([inf, 1.0, 2.0], False),
        ([3.0, -inf, 2.0], False),
        ([2.0, 2.0, 2.0], False),
        ([-1.0, -2.0, -3.0], True),
    ]
    similarity = torch.tensor([row for row, _ in rows])
    first = torch.zeros(len(rows), dtype=torch.int64)
    assert strictly_best(similarity, first).tolist() == [right for _, right in rows]
    assert strictly_best(similarity.flip(1), first + 2).tolist() == [right for _, right in rows]


def test_saturated_logits_that_differ_are_no_tie() -> None:
    """sigmoid(40) and sigmoid(50) are both exactly 1 in fp32: the comparison is made before it."""
    assert strictly_best(torch.tensor([[40.0, 50.0]]), torch.tensor([1])).item()
    net = network()
    with torch.no_grad():
        net.output.bias.fill_(1000.0)
        net.output.weight.mul_(100.0)
    assert one_shot(net, SHOWN, TASKS).correct > 0


def test_an_interrupt_ends_an_evaluation_between_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.evaluate._CHUNK_FLOPS", 1.0)
    asked: list[int] = []

    def third() -> bool:
        asked.append(1)
        return len(asked) == 3

    net, embedded = network(), []
    embed = net.embed
    monkeypatch.setattr(net, "embed", lambda images: embedded.append(len(images)) or embed(images))
    with pytest.raises(Interrupted):
        answer(net, SHOWN, TASKS, interrupt=third)
    assert embedded == [8, 8]


def test_the_answers_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(network(), SHOWN, TASKS)
    monkeypatch.setattr("model.evaluate._CHUNK_FLOPS", 1.0)
    monkeypatch.setitem(evaluate._CHUNK_VALUES, "cpu", 1)
    assert torch.equal(answer(network(), SHOWN, TASKS), whole)


def test_drawings_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="12 pixels a side, the drawings have 16"):
        answer(network(), drawings(5, side=16), TASKS)


def test_a_score_carries_wilson_s_interval() -> None:
    score = Score.of(torch.tensor([True] * 58 + [False] * 42))
    assert (score.correct, score.tasks, score.accuracy) == (58, 100, 0.58)
    assert score.interval == pytest.approx((0.482, 0.672), abs=1e-3)


def test_an_embedding_of_several_views_is_the_mean_over_them_and_the_same_each_time() -> None:
    net, shown = network(), torch.arange(5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        images = SHOWN.flat[shown]
        seen = [net.embed(clean(images)), *(net.embed(distort(images, generator)) for _ in range(3))]
    views = evaluate.embed(net, SHOWN, shown, views=3)
    torch.testing.assert_close(views, torch.stack(seen).mean(0))
    assert torch.equal(views, evaluate.embed(net, SHOWN, shown, views=3))
    assert not torch.allclose(views, evaluate.embed(net, SHOWN, shown))


def test_several_views_stay_on_the_unit_sphere_where_embeddings_lie_on_it() -> None:
    config = NetConfig(SIDE, CONFIG.conv, (8,), head="none", distance="l2", activation="none", normalise=True)
    net = SiameseNet(config)
    initialise(net, "he", torch.Generator().manual_seed(0))
    lengths = evaluate.embed(net.on("cpu"), SHOWN, torch.arange(5), views=2).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))
