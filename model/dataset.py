"""The data set a network is trained on: real Omniglot where it is, the built-in stroke characters where it is not.

Promise: the split is the paper's (Koch et al. 2015, section 3.1): the 30 background alphabets by drawers 1 to 12 to
train, 10 evaluation alphabets by drawers 13 to 16 to validate, the 10 of Lake's runs by drawers 17 to 20 to test.
Damaged data is an error, never a reason to train on something else in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import cache, omniglot, strokes
from model.drawings import DataError, Dataset, Drawings
from model.geometry import LARGEST_INPUT

Choice = Literal["auto", "omniglot", "strokes"]

TRAIN_DRAWERS = range(12)
VALIDATION_DRAWERS = range(12, 16)
TEST_DRAWERS = range(16, 20)


def load(
    size: int, *, source: Choice = "auto", data_root: Path | None, home: Path, notify: Callable[[str], None]
) -> Dataset:
    """The data set at `size` x `size` pixels, on the CPU.

    auto takes Omniglot where `data_root` holds any of it; otherwise it says so through `notify`, in one line, and takes
    the stroke characters. Raises DataError where Omniglot was asked for and is not there, or is there and damaged,
    ValueError for a size or a source that does not exist.
    """
    if not 1 <= size <= LARGEST_INPUT:
        raise ValueError(f"images have 1 to {LARGEST_INPUT} pixels a side; got {size}")
    if source == "strokes":
        return strokes.generate(size)
    if source not in ("auto", "omniglot"):
        raise ValueError(f"data is auto, omniglot or strokes; got {source!r}")
    found = omniglot.sources(data_root)
    if not found:
        absent: DataError = omniglot.missing(data_root)
        if source == "omniglot":
            raise absent
        notify(f"{absent}. Using the built-in stroke characters instead")
        return strokes.generate(size)
    packed = cache.load(found, size, home, notify)
    validating = [name for name in omniglot.EVALUATION if name not in omniglot.LAKE]
    return Dataset(
        train=_drawings(packed, "images_background", list(omniglot.BACKGROUND), TRAIN_DRAWERS),
        validation=_drawings(packed, "images_evaluation", validating, VALIDATION_DRAWERS),
        test=_drawings(packed, "images_evaluation", list(omniglot.LAKE), TEST_DRAWERS),
        name="omniglot",
        size=size,
    )


def _drawings(packed: cache.Packed, part: str, alphabets: list[str], drawers: range) -> Drawings:
    """Some alphabets of one part by some drawers; chosen before they are unpacked, so no more memory than they need."""
    counts = omniglot.SPLITS[part]
    ordered = sorted(counts)
    offset = dict(zip(ordered, np.cumsum([0] + [counts[name] for name in ordered]).tolist(), strict=False))
    characters = np.concatenate([np.arange(counts[name]) + offset[name] for name in alphabets])
    rows = characters[:, None] * omniglot.DRAWERS + np.asarray(drawers)
    return Drawings(
        torch.from_numpy(packed.images(part, rows.reshape(-1)).reshape(*rows.shape, packed.size, packed.size)),
        torch.arange(len(alphabets)).repeat_interleave(torch.tensor([counts[name] for name in alphabets])),
        tuple(alphabets),
        tuple(f"{name}/character{c:02}" for name in alphabets for c in range(1, counts[name] + 1)),
    )
