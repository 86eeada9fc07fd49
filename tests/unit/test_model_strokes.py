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


def thickness(images: torch.Tensor) -> torch.Tensor:
    """(..., S, S) to (...): twice the ink over the length of its edge, in pixels."""
    ink = (images > 127).float()
    edge = (ink.diff(dim=-1).abs().sum((-1, -2)) + ink.diff(dim=-2).abs().sum((-1, -2))).clamp_min(1)
    return 2 * ink.sum((-1, -2)) / edge


def test_a_drawer_has_a_pen_of_their_own() -> None:
    # Those whose pen is thick on one half of the letters have a thick pen on the other half; and pens differ.
    images = strokes.generate(105, shape=strokes.Shape((2, 1, 1), (12, 2, 2), (24, 24))).train.images
    for letters in images.split(24):
        pens = thickness(letters)  # (letters, drawers)
        halves = pens[::2].mean(0), pens[1::2].mean(0)
        assert np.corrcoef(*halves)[0, 1] > 0.9
        assert halves[0].max() / halves[0].min() > 1.3


def test_a_hand_slants_and_stretches_and_shakes() -> None:
    rng = np.random.default_rng(0)
    letters, _ = strokes._alphabet(rng, 24)
    points, _ = strokes._write(rng, letters, 40)
    flat = letters.reshape(24, -1, 2).astype(np.float64)
    plan = np.concatenate([flat, np.ones((24, flat.shape[1], 1))], 2)
    maps, rest = np.empty((24, 40, 2, 2)), np.empty((24, 40))
    for c in range(24):
        for d in range(40):
            drawn = points[c, d].reshape(-1, 2)
            solution = np.linalg.lstsq(plan[c], drawn, rcond=None)[0]
            maps[c, d] = solution[:2].T
            rest[c, d] = np.sqrt(((plan[c] @ solution - drawn) ** 2).mean())
    # What no affine map explains: a shaking hand, some steadier than others.
    assert rest.min() > 0.01
    assert 0.02 < rest.mean() < 0.12
    assert rest.mean(0).max() / rest.mean(0).min() > 1.5
    # The map itself differs more between drawers than between the letters of one.
    for entry in ((0, 0), (1, 1), (0, 1)):
        values = maps[:, :, entry[0], entry[1]]
        assert values.mean(0).std() > 0.8 * values.std(0).mean()
    # A turn moves the two off-diagonal entries apart, a slant only one of them.
    assert (maps[:, :, 0, 1] + maps[:, :, 1, 0]).mean(0).std() > 0.08


def test_no_two_drawings_of_a_character_are_the_same(full: Dataset) -> None:
    flat = full.train.flat
    assert len({image.numpy().tobytes() for image in flat}) == len(flat)
