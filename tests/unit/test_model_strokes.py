import numpy as np
import pytest
import torch

from model import baseline, episode, strokes
from model.drawings import Dataset, Drawings


@pytest.fixture(scope="module")
def full() -> Dataset:
    return strokes.generate(28)


def parts(data: Dataset) -> tuple[Drawings, Drawings, Drawings]:
    return data.train, data.validation, data.test


def test_the_same_seed_gives_the_same_drawings_and_another_seed_others() -> None:
    one, again, other = (strokes.generate(28, seed=seed, shape=strokes.SMALL) for seed in (3, 3, 4))
    for a, b in zip(parts(one), parts(again), strict=True):
        assert torch.equal(a.images, b.images)
        assert a.characters == b.characters
    assert one.train.images.shape != other.train.images.shape or not torch.equal(one.train.images, other.train.images)


def test_the_split_has_omniglots_shape_and_shares_no_alphabet(full: Dataset) -> None:
    assert [len(part.alphabets) for part in parts(full)] == [30, 10, 10]
    assert [part.drawers for part in parts(full)] == [12, 4, 4]
    names = [name for part in parts(full) for name in part.alphabets]
    assert len(set(names)) == 50
    assert full.name == "strokes"
    for part in parts(full):
        assert part.images.shape == (len(part.characters), part.drawers, 28, 28)
        assert torch.bincount(part.alphabet).min() >= 20


def test_pixels_do_better_than_chance_and_leave_room_to_learn(full: Dataset) -> None:
    for part in (full.validation, full.test):
        tasks = episode.draw(part, 1000, 20, seed=0)
        assert 0.2 < baseline.nearest_neighbour(part, tasks) / 1000 < 0.6


@pytest.mark.parametrize("size", [14, 28, 35, 64, 105])
def test_every_drawing_at_every_size_has_ink_and_mostly_paper(size: int) -> None:
    data = strokes.generate(size, shape=strokes.SMALL)
    for part in parts(data):
        assert part.size == size
        share = part.flat.float().div(255).mean((1, 2))
        assert share.min() > 0.002
        assert share.max() < 0.35


def test_a_drawer_has_a_hand_of_their_own(full: Dataset) -> None:
    # Those whose pen is thick on one half of an alphabet's letters have a thick pen on the other half.
    agreement = []
    for a in range(len(full.train.alphabets)):
        ink = full.train.images[full.train.alphabet == a].float().mean((2, 3))  # (characters, drawers)
        ink = ink / ink.mean(1, keepdim=True)
        agreement.append(np.corrcoef(ink[::2].mean(0), ink[1::2].mean(0))[0, 1])
    assert np.mean(agreement) > 0.8


def test_no_two_drawings_of_a_character_are_the_same(full: Dataset) -> None:
    flat = full.train.flat
    assert len({image.numpy().tobytes() for image in flat}) == len(flat)
