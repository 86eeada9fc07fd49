"""A Siamese network small enough to train in a unit test, and drawings that it can learn to tell apart."""

from __future__ import annotations

from typing import Any

import torch

from model.drawings import Dataset, Drawings

SIDE = 12
TINY_NET: dict[str, Any] = {
    "input": SIDE,
    "conv": [{"filters": 4, "kernel": 3, "pool": True}, {"filters": 6, "kernel": 2, "pool": "ceil"}],
    "fc": 8,
}
TINY: dict[str, Any] = {
    "net": TINY_NET,
    "batch_pairs": 8,
    "pairs_per_epoch": 30,
    "epochs": 3,
    "momentum_epochs": 2,
    "way": 5,
    "validation_tasks": 40,
    "precision": "fp32",
}
POINT: dict[str, Any] = {"eta": 0.05, "mu": 0.9, "lambda": 1e-4}


def drawings(seed: int, alphabets: int = 3, characters: int = 7, drawers: int = 4, side: int = SIDE) -> Drawings:
    """Characters of a random bitmap each; a drawer moves it by a pixel or so, and smudges it."""
    generator = torch.Generator().manual_seed(seed)
    count = alphabets * characters
    bitmap = torch.rand(count, 1, side, side, generator=generator) < 0.3
    images = bitmap.repeat(1, drawers, 1, 1)
    for drawer in range(drawers):
        images[:, drawer] = images[:, drawer].roll((drawer % 2, drawer // 2), (-2, -1))
    images ^= torch.rand(images.shape, generator=generator) < 0.02
    return Drawings(
        images.to(torch.uint8) * 255,
        torch.arange(count) // characters,
        tuple(f"alphabet{a}" for a in range(alphabets)),
        tuple(f"alphabet{c // characters}/character{c % characters}" for c in range(count)),
    )


def dataset(side: int = SIDE) -> Dataset:
    return Dataset(drawings(1, side=side), drawings(2, side=side), drawings(3, side=side), "strokes", side)
