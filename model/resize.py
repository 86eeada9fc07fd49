"""Images of any size, from packed bits or grey images: smaller by area averaging, larger by bilinear interpolation.

Promise: a pixel of the smaller image is the mean of exactly the area it covers, fractions of pixels included, so no
stroke is lost however far an image shrinks. A larger image has no steps. At the original size nothing changes; bits
are then 255 for ink. Packed bits are enlarged by area, too: their edges stay as sharp as they were.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_CHUNK = 512
"""Images shrunk at a time: 512 x 105 x 105 float32 is 23 MB."""


def unpack(packed: NDArray[np.uint8], side: int, size: int) -> NDArray[np.uint8]:
    """(n, ceil(side * side / 8)) uint8 of bits, 1 = ink, to (n, size, size) uint8, 255 = ink."""
    # One look-up turns a byte into its eight pixels: several times faster than unpacking bits and multiplying.
    bytes_of = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * np.uint8(255)
    table = bytes_of.view(np.uint64)[:, 0]
    if size == side:
        out = np.empty((len(packed), side * side), dtype=np.uint8)
        for start in range(0, len(packed), _CHUNK):
            out[start : start + _CHUNK] = _pixels(table, packed[start : start + _CHUNK], side)
        return out.reshape(-1, side, side)
    out = np.empty((len(packed), size, size), dtype=np.uint8)
    for start in range(0, len(packed), _CHUNK):
        pixels = _pixels(table, packed[start : start + _CHUNK], side).reshape(-1, side, side)
        out[start : start + _CHUNK] = shrink(pixels, size)
    return out


def shrink(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, side, side) uint8 to (n, size, size) uint8, rounded to the nearest grey."""
    rows = area_weights(images.shape[-1], size)
    return _apply(rows, images, rows)


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, side, side) uint8 to (n, size, size) uint8: area averages where that is smaller, bilinear where larger."""
    side = images.shape[-1]
    if side == size:
        return images
    rows = weights(side, size)
    out = np.empty((len(images), size, size), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        out[start : start + _CHUNK] = _apply(rows, images[start : start + _CHUNK], rows)
    return out


def into_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(n, height, width) uint8 to (n, size, size) uint8: in the middle of a square, what is added being 0."""
    _, height, width = image.shape
    side = max(height, width)
    square = weights(side, size)
    top, left = (side - height) // 2, (side - width) // 2
    # The added pixels are 0, so leaving their weights out is the same as adding them.
    return _apply(square[:, top : top + height], image, square[:, left : left + width])


@lru_cache(maxsize=8)
def weights(side: int, size: int) -> NDArray[np.float64]:
    """(size, side): the part of each old pixel in each new one, along one axis; rows add up to 1. Not to be changed."""
    if size <= side:
        return area_weights(side, size)
    middle = np.clip((np.arange(size)[:, None] + 0.5) * (side / size) - 0.5, 0, side - 1)
    near: NDArray[np.float64] = np.clip(1 - np.abs(middle - np.arange(side)[None, :]), 0, None)
    return near


def area_weights(side: int, size: int) -> NDArray[np.float64]:
    """(size, side): the part of each old pixel in each new one, along one axis; rows add up to 1."""
    new = np.arange(size)[:, None] * (side / size)
    old = np.arange(side)[None, :]
    overlap = np.minimum(new + side / size, old + 1) - np.maximum(new, old)
    weights: NDArray[np.float64] = np.clip(overlap, 0, None) * (size / side)
    return weights


def _apply(rows: NDArray[np.float64], images: NDArray[np.uint8], columns: NDArray[np.float64]) -> NDArray[np.uint8]:
    """rows @ image @ columns.T for each of (n, height, width), rounded to the nearest grey."""
    left, right = torch.from_numpy(rows).to(torch.float32), torch.from_numpy(columns).to(torch.float32)
    pixels = torch.from_numpy(images.astype(np.float32))
    return (left @ pixels @ right.T).round_().clamp_(0, 255).to(torch.uint8).numpy()


def _pixels(table: NDArray[np.uint64], packed: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(n, side * side), 0 or 255."""
    return table[packed].view(np.uint8)[:, : side * side]
