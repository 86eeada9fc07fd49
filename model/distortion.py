"""Random distortions of training images: affine ones (Koch et al. 2015, section 3.3), and elastic ones beside them.

Promise: rotation, shear, scale and translation, in the paper's ranges, each component present with probability 1/2,
drawn for every image by itself; outside of the picture is paper. Translation is given in pixels of the paper's 105 and
shrinks with the image. An elastic distortion bends the picture by a smooth random field (Simard, Steinkraus and Platt
2003, "Best Practices for Convolutional Neural Networks"). All images of a batch go through one call of `grid_sample`,
wherever they live.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION = math.radians(10.0)
SHEAR = 0.3
SCALE = 0.2
TRANSLATION = 2.0 / 105.0
"""Of the image's side: 2 pixels at 105."""

IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""The matrix that changes nothing."""

_KNOTS = 4
"""Points along an axis at which an elastic distortion is drawn."""


def clean(images: Tensor) -> Tensor:
    """What a network sees of undistorted images: uint8 to float32 in [0, 1], ink 1.

    (B, S, S) of grey becomes (B, 1, S, S); (B, 3, S, S) of colour stays as it is.
    """
    pixels = images.to(torch.float32).div_(255.0)
    return pixels.unsqueeze(1) if images.dim() == 3 else pixels


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """A distorted copy of each image, in the shapes of `clean`, on the images' device; channels move together.

    The numbers are drawn on the generator's device, so one CPU generator gives the same distortions everywhere.
    """
    return warp(images, draw_matrices(images.shape[0], generator))


def warp(images: Tensor, matrices: Tensor, bends: Tensor | None = None) -> Tensor:
    """`distort` by given matrices (B, 2, 3), as `draw_matrices` gives them, and bends, as `draw_bends` does."""
    pixels = clean(images)
    side = pixels.shape[-1]
    grid = _grid(matrices.to(images.device, non_blocking=True), side)
    if bends is not None:
        spread = _smooth(side, images.device)  # (side, 4)
        bent = spread @ bends.to(images.device, non_blocking=True) @ spread.T  # (B, 2, side, side)
        grid = grid + bent.permute(0, 2, 3, 1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def draw_bends(count: int, generator: torch.Generator, size: float) -> Tensor:
    """(count, 2, 4, 4) float32: how far, across and down, the picture is moved at a coarse net of points.

    Normally distributed with the standard deviation `size`, in halves of the picture's side; bicubic in between.
    """
    return torch.randn(count, 2, _KNOTS, _KNOTS, generator=generator, device=generator.device) * size


def draw_matrices(count: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """(count, 2, 3) float32: for each image the map from where a pixel lands to where it comes from.

    `strength` widens the paper's ranges so many times; up to 2.5 no picture is turned inside out.

    Coordinates are those of `affine_grid`: the picture spans [-1, 1], its middle is 0. A point p goes to
    R(angle) H(shear) S(scale) p + t; the map given is the inverse.
    """
    where = generator.device
    # (7, B): angle, shear x and y, scale x and y, translation x and y.
    spread = torch.tensor([ROTATION, SHEAR, SHEAR, SCALE, SCALE, 2 * TRANSLATION, 2 * TRANSLATION], device=where)
    uniform = (torch.rand(7, count, generator=generator, device=where) * 2 - 1) * strength
    present = torch.rand(7, count, generator=generator, device=where) < 0.5
    angle, shear_x, shear_y, scale_x, scale_y, move_x, move_y = (uniform * spread[:, None] * present).unbind()

    cos, sin = angle.cos(), angle.sin()
    a, b = 1 + scale_x, shear_x * (1 + scale_y)  # H S, by rows: [1, hx; hy, 1] [sx, 0; 0, sy]
    c, d = shear_y * (1 + scale_x), 1 + scale_y
    m00, m01 = cos * a - sin * c, cos * b - sin * d
    m10, m11 = sin * a + cos * c, sin * b + cos * d
    # Never singular: det = sx sy (1 - hx hy) >= 0.8 * 0.8 * 0.91, and >= 0.5 * 0.5 * 0.43 at strength 2.5.
    det = m00 * m11 - m01 * m10
    i00, i01, i10, i11 = m11 / det, -m01 / det, -m10 / det, m00 / det
    t0 = -(i00 * move_x + i01 * move_y)
    t1 = -(i10 * move_x + i11 * move_y)
    return torch.stack([torch.stack([i00, i01, t0], 1), torch.stack([i10, i11, t1], 1)], 1)


@functools.cache
def _smooth(side: int, device: torch.device) -> Tensor:
    """(side, 4): the weight of each of four points along an axis at each pixel, bicubic.

    It is brought to the device once: a CUDA graph of an update cannot hold a copy from the CPU.
    """
    points = torch.eye(_KNOTS)[None]  # (1, 4, 4): each point by itself
    flat = F.interpolate(points[..., None], size=(side, 1), mode="bicubic", align_corners=True)  # (1, 4, side, 1)
    return flat[0, :, :, 0].T.contiguous().to(device)


def _grid(matrices: Tensor, side: int) -> Tensor:
    """(B, side, side, 2): what `affine_grid` gives, without its product of large matrices three columns wide."""
    middles = (torch.arange(side, device=matrices.device) * 2 + 1) / side - 1  # of the pixels, along either axis
    across, down, shift = matrices.unbind(2)  # (B, 2) each
    rows = torch.addcmul(shift[:, :, None], down[:, :, None], middles)  # (B, 2, side)
    return torch.addcmul(rows[..., None], across[:, :, None, None], middles).permute(0, 2, 3, 1)
