import numpy as np
import pytest

from model.resize import area_weights, shrink, unpack

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
