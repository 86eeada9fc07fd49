"""A data set with Omniglot's names and counts whose drawings carry their own number, for tests without the real one."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model import omniglot

SIDE = omniglot.SIDE


def png(number: int, side: int = SIDE) -> bytes:
    """A 1-bit PNG: 16 columns of ink and paper spell `number` in the upper half; the lower half is paper."""
    ink = np.zeros((side, side), dtype=bool)
    for bit in range(16):
        ink[: side // 2, 6 * bit + 4 : 6 * bit + 8] = number >> bit & 1
    rows = np.packbits(~ink, axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 1)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def number_of(image: np.ndarray) -> int:
    """The number that an image of 105 pixels, 255 = ink, spells."""
    return sum(1 << bit for bit in range(16) if image[10, 6 * bit + 5] == 255)


SMALL: Mapping[str, Mapping[str, int]] = {
    "images_background": {"Greek": 24, "Latin": 26},
    "images_evaluation": {"Angelic": 20, "Tengwar": 25},
}
"""Counts of a small data set, for tests that put them in the place of `omniglot.SPLITS`."""


def number(counts: Mapping[str, int], alphabet: str, character: int, drawer: int) -> int:
    """What the drawing spells: its place in the part with these counts, ordered by name, counted from 0."""
    before = sum(counts[name] for name in counts if name < alphabet)
    return (before + character - 1) * omniglot.DRAWERS + drawer - 1


def names(part: str, counts: Mapping[str, int]) -> list[tuple[str, str, int, int]]:
    """(file, alphabet, character, drawer) of every drawing."""
    return [
        (f"{part}/{alphabet}/character{c:02}/{c:04}_{d:02}.png", alphabet, c, d)
        for alphabet, characters in counts.items()
        for c in range(1, characters + 1)
        for d in range(1, omniglot.DRAWERS + 1)
    ]


@functools.cache
def packed(part: str, small: bool = False) -> bytes:
    """The zip of images_background or images_evaluation."""
    counts = (SMALL if small else omniglot.SPLITS)[part]
    return zipped({name: png(number(counts, *which)) for name, *which in names(part, counts)})


@functools.cache
def packed_runs() -> bytes:
    """all_runs.zip: in run r, class k spells 1000 r + k, and the item that shows it 1000 r + 100 + k."""
    files: dict[str, bytes] = {}
    for r in range(1, 21):
        labels = []
        for i in range(1, 21):
            shown = (7 * i + r) % 20 + 1
            files[f"run{r:02}/training/class{i:02}.png"] = png(1000 * r + i)
            files[f"run{r:02}/test/item{i:02}.png"] = png(1000 * r + 100 + shown)
            labels.append(f"run{r:02}/test/item{i:02}.png run{r:02}/training/class{shown:02}.png\n")
        files[f"run{r:02}/class_labels.txt"] = "".join(labels).encode()
    return zipped(files)


def zipped(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def root(folder: Path, *, small: bool = False) -> Path:
    """A data root at `folder`, packed."""
    (folder / omniglot.FOLDER).mkdir(parents=True)
    for part in SMALL:
        (folder / omniglot.FOLDER / f"{part}.zip").write_bytes(packed(part, small))
    (folder / omniglot.FOLDER / "all_runs.zip").write_bytes(packed_runs())
    return folder


def small(folder: Path, files: Mapping[str, bytes]) -> omniglot.Source:
    """A zip of images_background with just these files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "images_background.zip"
    path.write_bytes(zipped(files))
    return omniglot.Source("images_background", path)
