"""A random forest for regression, after Breiman (2001), for a few hundred rows: it stands in for an expensive function.

Promise: the same rows and seed give the same forest on every machine, and it predicts nothing outside of the range of
the values it was fitted to. Each tree sees a bootstrap sample of the rows, and each split a random part of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAF = -1


@dataclass(frozen=True)
class Forest:
    """Trees as arrays of (trees, nodes). A node's `column` is LEAF, or values at most its `bound` go `left`."""

    column: NDArray[np.intp]
    bound: Floats
    left: NDArray[np.intp]
    """The right child's place is one more."""
    mean: Floats

    def predict(self, rows: Floats) -> Floats:
        """The mean over trees, for rows (n, columns)."""
        trees = np.arange(len(self.column))[:, None]
        at = np.zeros((len(self.column), len(rows)), dtype=np.intp)
        while True:
            column = self.column[trees, at]
            inner = column != LEAF
            if not inner.any():
                mean: Floats = self.mean[trees, at].mean(axis=0)
                return mean
            right = rows[np.arange(len(rows)), np.maximum(column, 0)] > self.bound[trees, at]
            at = np.where(inner, self.left[trees, at] + right, at)


def fit(rows: Floats, values: Floats, *, trees: int = 200, smallest: int = 2, columns: int, seed: int = 0) -> Forest:
    """Grow a forest on rows (n, columns) and values (n,).

    Args:
        rows, values: what is known.
        trees: how many.
        smallest: rows that a leaf has at least.
        columns: how many of them, drawn anew, each split may choose from.
        seed: of bootstrap samples and columns.
    """
    rng = np.random.default_rng(seed)
    grown = [_grow(rows, values, rng.integers(len(rows), size=len(rows)), smallest, columns, rng) for _ in range(trees)]
    most = max(len(tree) for tree in grown)
    table = np.zeros((trees, most, 4))
    for place, tree in enumerate(grown):
        table[place, : len(tree)] = tree
    return Forest(table[..., 0].astype(np.intp), table[..., 1], table[..., 2].astype(np.intp), table[..., 3])


def _grow(
    rows: Floats, values: Floats, sample: NDArray[np.intp], smallest: int, columns: int, rng: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """One tree: (column, bound, left, mean) of each node, the root first."""
    nodes: list[tuple[float, float, float, float]] = [(LEAF, 0.0, 0.0, 0.0)]
    open_ = [(0, sample)]
    while open_:
        place, held = open_.pop()
        chosen = rng.permutation(rows.shape[1])[:columns]
        split = _split(rows[held][:, chosen], values[held], smallest)
        if split is None:
            nodes[place] = (LEAF, 0.0, 0.0, float(values[held].mean()))
            continue
        column, bound = int(chosen[split[0]]), split[1]
        nodes[place] = (column, bound, len(nodes), 0.0)
        right = rows[held, column] > bound
        open_ += [(len(nodes), held[~right]), (len(nodes) + 1, held[right])]
        nodes += [(LEAF, 0.0, 0.0, 0.0)] * 2
    return nodes


def _split(rows: Floats, values: Floats, smallest: int) -> tuple[int, float] | None:
    """The column and the bound that leave the least variance in both halves; None where nothing is to be gained."""
    count = len(values)
    if count < 2 * smallest or np.ptp(values) == 0:
        return None
    order = np.argsort(rows, axis=0, kind="stable")
    lined = np.take_along_axis(rows, order, axis=0)
    summed = np.cumsum(values[order], axis=0)  # (n, columns)
    size = np.arange(1, count)[:, None]
    gain = summed[:-1] ** 2 / size + (summed[-1] - summed[:-1]) ** 2 / (count - size)
    gain[(lined[1:] <= lined[:-1]) | (size < smallest) | (size > count - smallest)] = -np.inf
    place, column = np.unravel_index(int(np.argmax(gain)), gain.shape)
    if not np.isfinite(gain[place, column]):
        return None
    return int(column), float((lined[place, column] + lined[place + 1, column]) / 2)
