"""The data set a network is trained on: by default real Omniglot where it is, the built-in stroke characters else.

Promise: Omniglot's split is the paper's (Koch et al. 2015, section 3.1): the 30 background alphabets by drawers 1 to
12 to train, 10 evaluation alphabets by drawers 13 to 16 to validate, the 10 of Lake's runs by drawers 17 to 20 to test.
Damaged data is an error, never a reason to train on something else in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import cache, mnist, omniglot, strokes
from model import folder as folders
from model.drawings import DataError, Dataset, Drawings
from model.geometry import LARGEST_INPUT

Choice = Literal["auto", "omniglot", "strokes", "mnist", "folder"]

TRAIN_DRAWERS = range(12)
VALIDATION_DRAWERS = range(12, 16)
TEST_DRAWERS = range(16, 20)


def load(
    size: int,
    *,
    source: Choice = "auto",
    data_root: Path | None,
    home: Path,
    notify: Callable[[str], None],
    channels: int = 1,
    folder: str = "",
    ink: folders.Ink = "dark",
) -> Dataset:
    """The data set at `size` x `size` pixels in 1 or 3 `channels`, on the CPU.

    auto takes Omniglot where `data_root` holds any of it; otherwise it says so through `notify`, in one line, and takes
    the stroke characters. `folder`, a name below `data_root`, and `ink` are those of model.folder, read for the source
    folder alone. Raises DataError where what was asked for is not there, or is there and damaged, ValueError for a
    size, a source, a number of channels, a folder's name or an ink that does not exist.
    """
    if not 1 <= size <= LARGEST_INPUT:
        raise ValueError(f"images have 1 to {LARGEST_INPUT} pixels a side; got {size}")
    if channels not in (1, 3):
        raise ValueError(f"images have 1 channel (grey) or 3 (colour); got {channels}")
    if source == "folder":
        return folders.load(data_root, folder, size, channels=channels, ink=ink, notify=notify)
    grey = mnist.load(data_root, size) if source == "mnist" else _characters(size, source, data_root, home, notify)
    return grey.coloured() if channels == 3 else grey


def _characters(
    size: int, source: Choice, data_root: Path | None, home: Path, notify: Callable[[str], None]
) -> Dataset:
    """Omniglot or the stroke characters, in grey."""
    if source == "strokes":
        return strokes.generate(size)
    if source not in ("auto", "omniglot"):
        raise ValueError(f"data is auto, omniglot, strokes, mnist or folder; got {source!r}")
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
