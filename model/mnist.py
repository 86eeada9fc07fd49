"""MNIST's digits as it lies on disk, as a data set of ten characters and as a test of classification.

Promise: what is read has exactly MNIST's counts and shapes, from the files of torchvision's layout (MNIST/raw), packed
or unpacked; anything else is a `DataError` that names the file and the remedy. Nothing here writes.
Invariant: an image takes part in at most one of the three parts, in the order of its file.

LeCun, Bottou, Bengio and Haffner (1998), "Gradient-based learning applied to document recognition".
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.drawings import DataError, Dataset, Drawings
from model.resize import resize

FOLDER = "MNIST/raw"
SIDE = 28
DIGITS = 10
REMEDY = f"run `whetstone data fetch`, or set WHETSTONE_DATA to a folder that holds {FOLDER}/"


@dataclass(frozen=True)
class Counts:
    """Images in the training and the test file, and how many of each digit the three parts take of them."""

    train_file: int = 60_000
    test_file: int = 10_000
    train: int = 5_000
    validation: int = 400
    test: int = 892


FULL = Counts()


def load(data_root: Path | None, size: int, counts: Counts = FULL) -> Dataset:
    """One alphabet, MNIST, of ten characters with equally many drawings each, at `size` x `size` pixels.

    In file order, train is the first 5,000 of each digit of the training file, validation its next 400, test the first
    892 of each of the test file: as many as the rarest digit, 5, allows. The surplus, 6,000 and 1,080 images, is left
    out. Raises DataError where a file is missing or damaged.
    """
    train, test = _Part(data_root, "train", counts.train_file), _Part(data_root, "t10k", counts.test_file)
    rows = train.rows(counts.train + counts.validation)
    return Dataset(
        train=train.drawings(rows[:, : counts.train], size),
        validation=train.drawings(rows[:, counts.train :], size),
        test=test.drawings(test.rows(counts.test), size),
        name="mnist",
        size=size,
    )


def test_images(data_root: Path | None, size: int, counts: Counts = FULL) -> tuple[Tensor, Tensor]:  # noqa: PT028
    """The whole test file in its order: images (10000, S, S) uint8, 255 = ink, and their digits (10000,) int64.

    Raises DataError where a file is missing or damaged.
    """
    part = _Part(data_root, "t10k", counts.test_file)
    return torch.from_numpy(np.array(resize(part.images, size))), torch.from_numpy(part.labels.astype(np.int64))


class _Part:
    """The images (count, 28, 28) and labels (count,) of one part, train or t10k."""

    def __init__(self, data_root: Path | None, part: str, count: int) -> None:
        self.images, _ = _read(data_root, f"{part}-images-idx3-ubyte", (count, SIDE, SIDE))
        self.labels, self._path = _read(data_root, f"{part}-labels-idx1-ubyte", (count,))
        if self.labels.max() >= DIGITS:
            raise _damaged(self._path, f"holds the label {self.labels.max()}; digits end at 9")

    def rows(self, each: int) -> NDArray[np.int64]:
        """(10, each): where the first images of each digit stand in the file."""
        rows = [np.flatnonzero(self.labels == digit)[:each] for digit in range(DIGITS)]
        for digit, found in enumerate(rows):
            if len(found) < each:
                number = f"names {len(found)} images of the digit {digit}"
                raise _damaged(self._path, f"{number}; expected at least {each}")
        return np.stack(rows)

    def drawings(self, rows: NDArray[np.int64], size: int) -> Drawings:
        chosen = resize(self.images[rows.reshape(-1)], size).reshape(*rows.shape, size, size)
        names = tuple(f"MNIST/{digit}" for digit in range(DIGITS))
        return Drawings(torch.from_numpy(chosen), torch.zeros(DIGITS, dtype=torch.int64), ("MNIST",), names)


def _read(data_root: Path | None, name: str, shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Path]:
    """One file, packed or else unpacked, whichever is whole; the fault of the first where neither is."""
    if data_root is None:
        raise DataError(f"no MNIST: WHETSTONE_DATA is not set; {REMEDY}")
    plain = data_root / FOLDER / name
    packed = plain.with_name(f"{name}.gz")
    found = [path for path in (packed, plain) if path.exists()]
    if not found:
        raise DataError(f"no MNIST: {packed} is not there, nor {name} unpacked from it; {REMEDY}")
    faults = []
    for path in found:
        try:
            return _idx(path, shape), path
        except DataError as fault:
            faults.append(fault)
    raise faults[0]


def _idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A file of bytes in the idx format: two zeros, 8, the number of dimensions, their lengths, the content."""
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(size + 1)  # no more, whatever it would unpack to
    except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
        raise _damaged(path, f"is damaged ({fault})") from fault
    except OSError as fault:
        raise DataError(
            f"{path} cannot be read: {fault.strerror or fault}. Check its permissions, or {REMEDY}"
        ) from fault
    expected = " x ".join(map(str, shape))
    if content[:4] != header[:4]:
        raise _damaged(path, f"does not begin as an idx file of {len(shape)} dimensions of bytes does")
    if content[: len(header)] != header:
        lengths = [int.from_bytes(content[i : i + 4], "big") for i in range(4, len(header), 4)]
        raise _damaged(path, f"holds {' x '.join(map(str, lengths))}; expected {expected}")
    if len(content) != size:
        raise _damaged(path, f"is {'cut short' if len(content) < size else 'too long'}; expected {expected} bytes")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Remove it and run `whetstone data fetch`, or set WHETSTONE_DATA to a whole copy")
