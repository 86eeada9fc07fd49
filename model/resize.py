"""From packed bits to grey images of any size, by area averaging.

Promise: a pixel of the smaller image is the mean of exactly the area it covers, fractions of pixels included, so no
stroke is lost however far an image shrinks. At the original size the result is the bits themselves, 255 for ink.
"""

from __future__ import annotations

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
    side = images.shape[-1]
    weights = torch.from_numpy(area_weights(side, size)).to(torch.float32)
    pixels = torch.from_numpy(images).to(torch.float32)
    return (weights @ pixels @ weights.T).round_().clamp_(0, 255).to(torch.uint8).numpy()


def area_weights(side: int, size: int) -> NDArray[np.float64]:
    """(size, side): the part of each old pixel in each new one, along one axis; rows add up to 1."""
    new = np.arange(size)[:, None] * (side / size)
    old = np.arange(side)[None, :]
    overlap = np.minimum(new + side / size, old + 1) - np.maximum(new, old)
    weights: NDArray[np.float64] = np.clip(overlap, 0, None) * (size / side)
    return weights


def _pixels(table: NDArray[np.uint64], packed: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(n, side * side), 0 or 255."""
    return table[packed].view(np.uint8)[:, : side * side]
