import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.resize import area_weights, into_square, resize, shrink, unpack, weights

RNG = np.random.default_rng(0)


def test_unpacking_at_the_original_size_gives_the_bits() -> None:
    ink = RNG.random((700, 105, 105)) < 0.3
    packed = np.packbits(ink.reshape(700, -1), axis=1)
    assert np.array_equal(unpack(packed, 105, 105), ink * np.uint8(255))


def test_a_pixel_is_the_mean_of_the_pixels_it_covers() -> None:
    images = RNG.integers(0, 256, (3, 105, 105), dtype=np.uint8)
    means = images.reshape(3, 35, 3, 35, 3).mean((2, 4))
    assert np.abs(shrink(images, 35) - means).max() <= 0.5001
    packed = np.packbits((images > 99).reshape(3, -1), axis=1)
    means = (images > 99).reshape(3, 35, 3, 35, 3).mean((2, 4)) * 255
    assert np.abs(unpack(packed, 105, 35) - means).max() <= 0.5001


@pytest.mark.parametrize("size", [1, 14, 28, 32, 64, 104, 105, 210])
def test_no_ink_is_lost_at_any_size(size: int) -> None:
    weights = area_weights(105, size)
    assert np.allclose(weights.sum(1), 1)
    assert np.allclose(weights.sum(0), size / 105)
    assert (weights >= 0).all()


def test_fractions_of_a_pixel_count_as_fractions() -> None:
    assert np.allclose(area_weights(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_enlarging_interpolates_between_the_middles_of_pixels() -> None:
    assert np.allclose(weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    images = RNG.integers(0, 256, (700, 28, 28), dtype=np.uint8)
    expected = F.interpolate(torch.from_numpy(images).float()[:, None], size=(35, 35), mode="bilinear")[:, 0]
    assert np.abs(resize(images, 35) - expected.numpy()).max() <= 0.502
    # A smooth slope stays one: no two steps as blocks of equal pixels would have.
    slope = np.broadcast_to(np.arange(0, 252, 9, dtype=np.uint8), (1, 28, 28))
    steps = np.diff(resize(slope, 56)[0, 10, 2:-2].astype(int))
    assert set(steps.tolist()) <= {4, 5}


def test_resizing_shrinks_by_area_and_leaves_the_same_size_alone() -> None:
    images = RNG.integers(0, 256, (600, 28, 28), dtype=np.uint8)
    assert np.array_equal(resize(images, 14), shrink(images, 14))
    assert np.array_equal(resize(images, 28), images)


@pytest.mark.parametrize("size", [5, 20, 40, 61])
@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (40, 40), (1, 40), (39, 40)])
def test_a_rectangle_stands_in_the_middle_of_a_square(shape: tuple[int, int], size: int) -> None:
    image = RNG.integers(0, 256, (3, *shape), dtype=np.uint8)
    square = np.zeros((3, 40, 40), dtype=np.uint8)
    top, left = (40 - shape[0]) // 2, (40 - shape[1]) // 2
    square[:, top : top + shape[0], left : left + shape[1]] = image
    assert np.abs(into_square(image, size).astype(int) - resize(square, size)).max() <= 1
