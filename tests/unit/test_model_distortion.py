import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.distortion import clean, distort, draw_bends, draw_matrices, warp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def forward() -> tuple[Tensor, Tensor]:
    """Linear parts (n, 2, 2) and translations (n, 2) of the maps from a picture to its distortion."""
    inverse = draw_matrices(200_000, generator()).double()
    linear = torch.linalg.inv(inverse[:, :, :2])
    return linear, -(linear @ inverse[:, :, 2:])[:, :, 0]


def near(a: Tensor, b: float) -> Tensor:
    return (a - b).abs() < 1e-6


def test_each_component_is_present_with_probability_one_half(forward: tuple[Tensor, Tensor]) -> None:
    linear, translation = forward
    identity = near(linear, 0).logical_or(near(linear, 1)).flatten(1).all(1) & near(linear[:, 0, 1], 0)
    assert identity.float().mean().sub(0.5**5).abs() < 0.003  # no rotation, shear x, y, scale x, y
    still = near(translation, 0)
    assert still.float().mean(0).sub(0.5).abs().max() < 0.01
    assert still.all(1).float().mean().sub(0.25).abs() < 0.01


def test_rotations_reach_ten_degrees_and_no_further(forward: tuple[Tensor, Tensor]) -> None:
    linear, _ = forward
    # What keeps lengths is a rotation alone: no shear, no scale.
    rigid = near(linear @ linear.mT - torch.eye(2, dtype=torch.float64), 0).flatten(1).all(1)
    angles = torch.atan2(linear[rigid, 1, 0], linear[rigid, 0, 0]) * 180 / math.pi
    assert angles.abs().max() <= 10.0001
    assert angles.min() < -9.9
    assert angles.max() > 9.9
    assert angles[angles.abs() > 1e-6].abs().mean() == pytest.approx(5, abs=0.15)


def test_scales_and_shears_fill_their_ranges_for_each_axis(forward: tuple[Tensor, Tensor]) -> None:
    linear, _ = forward
    diagonal = near(linear[:, 0, 1], 0) & near(linear[:, 1, 0], 0)
    sheared = near(linear[:, 0, 0], 1) & near(linear[:, 1, 1], 1)
    for values, low, high in (
        (linear[diagonal, 0, 0], 0.8, 1.2),
        (linear[diagonal, 1, 1], 0.8, 1.2),
        (linear[sheared, 0, 1], -0.3, 0.3),
        (linear[sheared, 1, 0], -0.3, 0.3),
    ):
        assert low - 1e-6 <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-6


def test_translation_is_two_of_105_pixels_at_any_size(forward: tuple[Tensor, Tensor]) -> None:
    _, translation = forward
    pixels = translation * 105 / 2  # the picture spans 2
    assert pixels.abs().max() <= 2.0001
    assert pixels.abs().amax(0).min() > 1.99
    # In the picture: nothing but translation moves the middle of what stands in the middle.
    for side in (105, 35):
        block = torch.zeros(1000, side, side, dtype=torch.uint8)
        middle, reach = side // 2, side // 6
        block[:, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1] = 255
        moved = distort(block, generator(3))[:, 0]
        weight = moved.sum((1, 2))
        rows = (moved.sum(2) * torch.arange(side)).sum(1) / weight - middle
        assert 1.9 < rows.abs().max() * 105 / side < 2.05


def test_what_lies_outside_of_the_picture_is_paper() -> None:
    ink = torch.full((512, 28, 28), 255, dtype=torch.uint8)
    out = distort(ink, generator())
    assert out.min() == 0
    assert out.max() <= 1.0001
    assert out[:, 0, 14, 14].min() > 0.999


def test_ink_and_paper_become_one_and_zero() -> None:
    images = torch.randint(0, 256, (8, 28, 28), dtype=torch.uint8, generator=generator())
    assert torch.equal(clean(images), images[:, None].float() / 255)
    assert distort(torch.zeros_like(images), generator()).abs().max() == 0


def test_an_image_without_any_component_stays_as_it_is() -> None:
    images = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=generator()).expand(2000, 28, 28)
    unchanged = (distort(images, generator()) - clean(images)).abs().flatten(1).amax(1) < 1e-4
    assert unchanged.float().mean().item() == pytest.approx(0.5**7, abs=0.006)


def test_twins_are_distorted_separately_and_the_same_generator_repeats() -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 5:20, 10:14] = 255
    batch = image.expand(64, 28, 28)
    out = distort(batch, generator(1))
    assert len({row.numpy().tobytes() for row in out}) > 55
    assert torch.equal(out, distort(batch, generator(1)))
    assert out.shape == (64, 1, 28, 28)
    assert out.dtype == torch.float32


def test_the_channels_of_a_colour_image_move_together() -> None:
    grey = torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8, generator=generator())
    colour = torch.stack([grey, 255 - grey, torch.zeros_like(grey)], 1)
    assert torch.equal(clean(colour), colour.float() / 255)
    moved = distort(colour, generator(2))
    assert moved.shape == (64, 3, 28, 28)
    assert torch.equal(moved[:, :1], distort(grey, generator(2)))
    assert torch.equal(moved[:, 1:2], distort(255 - grey, generator(2)))
    assert moved[:, 2].max() == 0


@pytest.mark.parametrize("side", [1, 28, 105])
def test_a_matrix_means_what_it_means_to_affine_grid(side: int) -> None:
    images = torch.randint(0, 256, (64, side, side), dtype=torch.uint8, generator=generator())
    matrices = draw_matrices(64, generator())
    grid = F.affine_grid(matrices, [64, 1, side, side], align_corners=False)
    torch.testing.assert_close(
        warp(images, matrices), F.grid_sample(clean(images), grid, align_corners=False), rtol=0, atol=1e-4
    )


def test_an_elastic_distortion_bends_by_the_bicubic_surface_through_its_points() -> None:
    images = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    matrices = draw_matrices(3, torch.Generator().manual_seed(1))
    bends = draw_bends(3, torch.Generator().manual_seed(2), 0.1)
    field = F.interpolate(bends, size=(20, 20), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(matrices, [3, 1, 20, 20], align_corners=False) + field
    expected = F.grid_sample(clean(images), grid, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(warp(images, matrices, bends), expected, atol=1e-4, rtol=0)
    still = torch.zeros_like(bends)
    assert torch.equal(warp(images, matrices, still), warp(images, matrices))


def test_strength_widens_the_ranges_so_many_times() -> None:
    plain, wide = (draw_matrices(500, torch.Generator().manual_seed(3), by)[:, :, 2] for by in (1.0, 2.0))
    assert wide.abs().max() > 1.5 * plain.abs().max()
    turned = draw_matrices(20_000, torch.Generator().manual_seed(4), 2.5)[:, :, :2]
    assert torch.linalg.det(turned).min() > 0
