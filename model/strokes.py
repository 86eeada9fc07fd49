"""A built-in stand-in for Omniglot: characters made of strokes, where there is neither network nor data.

Promise: the same seed gives the same data set; its split has Omniglot's shape (alphabets and drawers of the three parts
are different ones). An alphabet has a style (a grid to write on, a love of curves, a few strokes its letters share); a
character is one to four cubic Bezier strokes; a drawer has a hand: slant, turn, proportions, thickness, and an
unsteadiness that shakes every control point anew in each drawing. Nearest neighbours on pixels do far better than
chance on it and far worse than a trained network, so a search over networks has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.drawings import INK, Dataset, Drawings
from model.resize import shrink

STROKES = 4
"""The most strokes a character has."""
_CHUNK = 256

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """How large: alphabets and drawers of the three parts, and the fewest and most characters of an alphabet."""

    alphabets: tuple[int, int, int] = (30, 10, 10)
    drawers: tuple[int, int, int] = (12, 4, 4)
    characters: tuple[int, int] = (20, 32)


FULL = Shape()
SMALL = Shape(alphabets=(6, 3, 3), drawers=(6, 4, 4), characters=(20, 22))
"""For tests: 20-way tasks, drawn in a fraction of a second."""


def generate(size: int, *, seed: int = 0, shape: Shape = FULL) -> Dataset:
    """Draws the data set at `size` x `size` pixels. Deterministic in all its arguments."""
    parts = []
    for part, alphabets in enumerate(shape.alphabets):
        # A stream for each part, so that the training set does not change when the test set grows.
        rng = np.random.default_rng([seed, part])
        before = sum(shape.alphabets[:part])
        parts.append(_part(rng, size, alphabets, shape.drawers[part], shape.characters, before))
    train, validation, test = parts
    return Dataset(train, validation, test, name="strokes", size=size)


def _part(
    rng: np.random.Generator, size: int, alphabets: int, drawers: int, characters: tuple[int, int], before: int
) -> Drawings:
    images, alphabet, names, labels = [], [], [], []
    for a in range(alphabets):
        count = int(rng.integers(characters[0], characters[1] + 1))
        letters, used = _alphabet(rng, count)
        images.append(_draw(rng, letters, used, drawers, size))
        alphabet += [a] * count
        names.append(f"Strokes{before + a + 1:02}")
        labels += [f"{names[-1]}/character{c:02}" for c in range(1, count + 1)]
    return Drawings(
        torch.from_numpy(np.concatenate(images)),
        torch.tensor(alphabet, dtype=torch.int64),
        tuple(names),
        tuple(labels),
    )


def _alphabet(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[np.bool_]]:
    """The letters of one alphabet: control points (count, STROKES, 4, 2) in [-1, 1], and which strokes each has."""
    # The places where strokes of this alphabet like to begin and end: some of the nine of a shaken 3 x 3 grid.
    grid = np.stack(np.meshgrid([-0.75, 0.0, 0.75], [-0.75, 0.0, 0.75]), -1).reshape(9, 2)
    anchors = rng.permutation(grid + rng.normal(0, 0.1, grid.shape))[: int(rng.integers(6, 10))]
    curvature = rng.uniform(0.1, 0.8)
    shared = rng.uniform(0.15, 0.4)
    lengths = rng.dirichlet((0.4, 2.0, 3.0, 2.0))

    def strokes(number: tuple[int, ...]) -> NDArray[np.float64]:
        start, end = rng.integers(len(anchors), size=number), rng.integers(len(anchors) - 1, size=number)
        end = (start + 1 + end) % len(anchors)
        begin, finish = (
            anchors[start] + rng.normal(0, 0.09, (*number, 2)),
            anchors[end] + rng.normal(0, 0.09, (*number, 2)),
        )
        bend = rng.normal(0, curvature, (2, *number, 2))
        return np.stack(
            [begin, begin + (finish - begin) / 3 + bend[0], begin + (finish - begin) * 2 / 3 + bend[1], finish], -2
        )

    motifs = strokes((6,))
    letters = strokes((count, STROKES))
    borrowed = rng.random((count, STROKES)) < shared
    letters[borrowed] = motifs[rng.integers(len(motifs), size=int(borrowed.sum()))]
    number = rng.choice(STROKES, size=count, p=lengths) + 1
    used = np.arange(STROKES)[None, :] < number[:, None]
    # A letter fills the box it is written in, as letters do.
    low = np.where(used[..., None, None], letters, np.inf).min((1, 2), keepdims=True)
    high = np.where(used[..., None, None], letters, -np.inf).max((1, 2), keepdims=True)
    span = np.maximum((high - low).max(-1, keepdims=True), 0.5)
    letters = (letters - (high + low) / 2) / span * 1.7
    return letters.astype(np.float32), used


def _draw(
    rng: np.random.Generator, letters: Floats, used: NDArray[np.bool_], drawers: int, size: int
) -> NDArray[np.uint8]:
    """Every letter by every drawer: (count, drawers, size, size) uint8."""
    count = len(letters)
    points, pen = _write(rng, letters, drawers)
    canvas = _canvas(size)
    # As many points along a stroke as the canvas has pixels: they lie closer than a pen is thick.
    curves = _bezier(points, canvas).reshape(count * drawers, -1, 2)
    visible = np.repeat(np.repeat(used, drawers, axis=0), canvas, axis=1)
    radius = np.tile(pen, count)
    out = np.empty((count * drawers, size, size), dtype=np.uint8)
    for i in range(0, len(out), _CHUNK):
        ink = _ink(curves[i : i + _CHUNK], visible[i : i + _CHUNK], radius[i : i + _CHUNK], canvas)
        out[i : i + _CHUNK] = ink if canvas == size else shrink(ink, size)
    return out.reshape(count, drawers, size, size)


def _write(rng: np.random.Generator, letters: Floats, drawers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The letters in each hand: control points (count, drawers, STROKES, 4, 2), and the drawers' pens (drawers,)."""
    count = len(letters)
    turn, slant = rng.normal(0, 0.12, drawers), rng.normal(0, 0.18, drawers)
    wide, tall = rng.uniform(0.62, 0.95, drawers), rng.uniform(0.62, 0.95, drawers)
    pen = rng.uniform(0.018, 0.036, drawers)
    steadiness = rng.uniform(0.03, 0.09, drawers)

    # Unsteadiness: every control point of every drawing, the place of each stroke, the turn and size of each drawing.
    points = np.repeat(letters[:, None], drawers, axis=1).astype(np.float64)  # (C, D, K, 4, 2)
    wobble = steadiness[None, :, None, None, None]
    points += rng.normal(0, 1, points.shape) * wobble
    points += rng.normal(0, 0.7, (count, drawers, STROKES, 1, 2)) * wobble
    angle = turn[None, :] + rng.normal(0, 0.06, (count, drawers))
    cos, sin = np.cos(angle), np.sin(angle)
    hand = np.stack([np.stack([cos, -sin + slant * cos], -1), np.stack([sin, cos + slant * sin], -1)], -2)
    hand *= np.stack([wide, tall], -1)[None, :, None, :] * rng.uniform(0.88, 1.08, (count, drawers, 1, 2))
    return np.einsum("cdij,cdkpj->cdkpi", hand, points) + rng.normal(0, 0.07, (count, drawers, 1, 1, 2)), pen


def _bezier(points: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """Cubic Bezier curves: control points (..., 4, 2) to points along the curve (..., samples, 2)."""
    t = np.linspace(0, 1, samples)
    basis = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    return np.asarray(basis @ points)


def _canvas(size: int) -> int:
    """The side to draw at: large enough for a round pen, then averaged down as scanned drawings are."""
    return size if size >= 56 else size * -(-56 // size)


def _ink(
    curves: NDArray[np.float64], visible: NDArray[np.bool_], radius: NDArray[np.float64], side: int
) -> NDArray[np.uint8]:
    """Stamps a round pen along curves (n, P, 2) in [-1, 1], radius (n,) a part of the side; gives (n, side, side)."""
    n = len(curves)
    place = (curves + 1) * (side / 2)
    reach = int(np.ceil(radius.max() * side))
    # One pixel of margin beyond the pen's reach takes everything that falls outside, and is cut off.
    margin = reach + 1
    wide = side + 2 * margin
    middle = np.clip(np.floor(place).astype(np.int32), -1, side)
    sheet = np.zeros(n * wide * wide, dtype=np.uint8)
    base = (
        (np.arange(n, dtype=np.int32) * (wide * wide))[:, None]
        + (middle[..., 1] + margin) * wide
        + middle[..., 0]
        + margin
    )
    off = place - middle - 0.5
    limit = (radius * side)[:, None] ** 2
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            touched = visible & ((dx - off[..., 0]) ** 2 + (dy - off[..., 1]) ** 2 <= limit)
            sheet[base[touched] + dy * wide + dx] = INK
    return sheet.reshape(n, wide, wide)[:, margin : margin + side, margin : margin + side]
