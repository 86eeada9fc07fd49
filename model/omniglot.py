"""Omniglot as it lies on disk: finding it, reading it, and refusing what is damaged.

Promise: what is read has exactly Omniglot's alphabets, characters and drawings, 105 x 105 pixels each, whether it comes
from the zips of torchvision's layout or from the folders unpacked beside them; checksums do not matter, counts do.
Anything else is a `DataError` that names the file, what was expected, and the remedy. Nothing here writes.

Lake, Salakhutdinov and Tenenbaum (2015), "Human-level concept learning through probabilistic program induction".
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.drawings import DataError, Drawings
from model.resize import unpack

FOLDER = "omniglot-py"
SIDE = 105
DRAWERS = 20
REMEDY = "run `whetstone data fetch`, or set WHETSTONE_DATA to a folder that holds omniglot-py/"

# fmt: off
BACKGROUND: Mapping[str, int] = {
    "Alphabet_of_the_Magi": 20, "Anglo-Saxon_Futhorc": 29, "Arcadian": 26, "Armenian": 41, "Asomtavruli_(Georgian)": 40,
    "Balinese": 24, "Bengali": 46, "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14, "Braille": 26,
    "Burmese_(Myanmar)": 34, "Cyrillic": 33, "Early_Aramaic": 22, "Futurama": 26, "Grantha": 43, "Greek": 24,
    "Gujarati": 48, "Hebrew": 22, "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16, "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47, "Korean": 40, "Latin": 26, "Malay_(Jawi_-_Arabic)": 40, "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33, "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14, "Sanskrit": 42, "Syriac_(Estrangelo)": 23, "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION: Mapping[str, int] = {
    "Angelic": 20, "Atemayar_Qelisayer": 26, "Atlantean": 26, "Aurek-Besh": 26, "Avesta": 26, "Ge_ez": 26,
    "Glagolitic": 45, "Gurmukhi": 45, "Kannada": 41, "Keble": 26, "Malayalam": 47, "Manipuri": 40, "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45, "Oriya": 46, "Sylheti": 28, "Syriac_(Serto)": 23, "Tengwar": 25,
    "Tibetan": 42, "ULOG": 26,
}
LAKE: tuple[str, ...] = (
    "Atlantean", "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada", "Malayalam", "Manipuri",
    "Old_Church_Slavonic_(Cyrillic)", "Tengwar", "Tibetan",
)
"""The evaluation alphabets of Lake's 20 runs: the paper's test alphabets. The other ten are for validation."""
# fmt: on
SPLITS: Mapping[str, Mapping[str, int]] = {"images_background": BACKGROUND, "images_evaluation": EVALUATION}
RUNS, WAY = 20, 20

_LARGEST_PNG = 1 << 16
"""Bytes. Upstream's drawings take about 300; a member that claims more than this is no drawing."""
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What `zipfile` raises for a file that is no whole zip, is encrypted, or is packed in a way it does not know."""


@dataclass(frozen=True)
class Source:
    """Where a part (images_background, images_evaluation or all_runs) lies: a zip, or a folder unpacked from it."""

    name: str
    path: Path

    @property
    def packed(self) -> bool:
        return self.path.suffix == ".zip"

    def signature(self) -> str:
        """Changes when the content may have: a zip's SHA-256; for a folder the names, sizes and times of its files."""
        try:
            if self.packed:
                with open(self.path, "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha256()
            for name, entry in _walk(self.path):
                stat = entry.stat()
                digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            return digest.hexdigest()
        except OSError as fault:
            raise _unreadable(self.path, fault) from fault

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every file, as its name below the part's own folder (``Latin/character01/0709_01.png``) and its bytes."""
        try:
            if self.packed:
                with zipfile.ZipFile(self.path) as archive:
                    prefix = f"{self.name}/"
                    for member in archive.infolist():
                        if not _content(member.filename):
                            continue
                        if member.file_size > _LARGEST_PNG:
                            claim = f"{member.filename!a} has {member.file_size} bytes; a drawing has a few hundred"
                            raise wrong(self.path, claim)
                        yield member.filename.removeprefix(prefix), archive.read(member)
            else:
                for name, entry in _walk(self.path):
                    with open(entry.path, "rb") as file:
                        yield name, file.read(_LARGEST_PNG + 1)
        except _ZIP_FAULTS as fault:
            raise wrong(self.path, f"damaged ({fault}); expected a whole zip file") from fault
        except OSError as fault:
            raise _unreadable(self.path, fault) from fault


def find(data_root: Path | None, name: str) -> Source | None:
    """The zip of that part where there is one, else its unpacked folder, else None."""
    if data_root is None:
        return None
    folder = data_root / FOLDER
    packed, unpacked = folder / f"{name}.zip", folder / name
    if packed.is_file():
        return Source(name, packed)
    return Source(name, unpacked) if unpacked.is_dir() else None


def sources(data_root: Path | None) -> tuple[Source, ...]:
    """Both parts; an empty tuple where neither is there. Raises DataError where only one is."""
    found = [find(data_root, name) for name in SPLITS]
    if not any(found):
        return ()
    for name, source in zip(SPLITS, found, strict=True):
        if source is None:
            raise missing(data_root, name)
    return tuple(source for source in found if source is not None)


def missing(data_root: Path | None, name: str = "images_background") -> DataError:
    """The fault to raise, or to put in one line, where a part is not there."""
    if data_root is None:
        return DataError(f"no Omniglot: WHETSTONE_DATA is not set; {REMEDY}")
    if data_root.name == FOLDER and (data_root / f"{name}.zip").exists():
        return DataError(
            f"no Omniglot: WHETSTONE_DATA points at {data_root}; it must be the folder that holds {FOLDER}/"
        )
    expected = data_root / FOLDER / f"{name}.zip"
    return DataError(f"no Omniglot: {expected} is not there, nor the folder {name}/ unpacked from it; {REMEDY}")


def read(source: Source, alphabets: Mapping[str, int] | None = None) -> NDArray[np.uint8]:
    """Reads and checks one part: (characters * 20, 1379) uint8, 105 * 105 bits a row, 1 = ink, ordered by name.

    Raises DataError where the alphabets, the number of characters of one, the 20 drawings of a character or the size of
    an image are not as `alphabets` (Omniglot's own by default) has them.
    """
    expected = SPLITS[source.name] if alphabets is None else alphabets
    rows: dict[tuple[str, int, int], NDArray[np.uint8]] = {}
    for name, content in source.files():
        if not name.endswith(".png"):
            continue
        match = _DRAWING.fullmatch(name)
        if match is None:
            raise wrong(source.path, f"{name!a} is not named <alphabet>/character<NN>/<NNNN>_<DD>.png")
        key = (match[1], int(match[2]), int(match[3]))
        if key in rows:
            raise wrong(source.path, f"drawing {key[2]:02} of {name!a} is there twice")
        rows[key] = _bits(source.path, name, content)
    _check(source.path, expected, rows.keys())
    return np.stack([rows[key] for key in sorted(rows)])


def read_lake_runs(data_root: Path | None, size: int) -> tuple[Drawings, Tensor]:
    """Lake's runs: 400 characters x (training image, test item), and answers (20, 20) int64: each run's item's class.

    Character ``20 r + k`` is class k of run r; its second drawing is the item that `answers` says shows that class.
    """
    source = find(data_root, "all_runs")
    if source is None:
        where = (
            "WHETSTONE_DATA is not set" if data_root is None else f"{data_root / FOLDER / 'all_runs.zip'} is not there"
        )
        raise DataError(f"no one-shot runs of Lake's: {where}; {REMEDY}")
    files = dict(source.files())
    names = [
        f"run{r:02}/{part}{i:02}.png"
        for r in range(1, RUNS + 1)
        for part in ("training/class", "test/item")
        for i in range(1, WAY + 1)
    ]
    absent = [
        name for name in [*names, *(f"run{r:02}/class_labels.txt" for r in range(1, RUNS + 1))] if name not in files
    ]
    if absent:
        raise wrong(source.path, f"{len(absent)} of its 820 files are missing, {absent[0]} among them")
    answers = np.stack([_labels(source.path, r, files[f"run{r:02}/class_labels.txt"]) for r in range(1, RUNS + 1)])
    packed = np.stack([_bits(source.path, name, files[name]) for name in names])
    images = torch.from_numpy(unpack(packed, SIDE, size)).view(RUNS, 2, WAY, size, size)
    # items[r, k]: the item that shows class k, the inverse of answers[r].
    items = torch.from_numpy(np.argsort(answers, axis=1))
    shown = torch.stack([images[r, 1][items[r]] for r in range(RUNS)])
    both = torch.stack([images[:, 0], shown], dim=2).flatten(0, 1)  # (400, 2, S, S)
    runs = tuple(f"run{r:02}" for r in range(1, RUNS + 1))
    return (
        Drawings(
            both.contiguous(),
            torch.arange(RUNS).repeat_interleave(WAY),
            runs,
            tuple(f"{run}/class{k:02}" for run in runs for k in range(1, WAY + 1)),
        ),
        torch.from_numpy(answers),
    )


_DRAWING = re.compile(r"([^/]+)/character(\d{2})/\d{4}_(\d{2})\.png")


def _labels(path: Path, run: int, content: bytes) -> NDArray[np.int64]:
    """(20,) the class, from 0, that each item shows; a bijection."""
    pattern = rf"run{run:02}/test/item(\d\d)\.png run{run:02}/training/class(\d\d)\.png"
    pairs = re.findall(pattern, content.decode("ascii", "replace"))
    answers = {int(item): int(shown) for item, shown in pairs}
    full = set(range(1, WAY + 1))
    if len(pairs) != WAY or set(answers) != full or set(answers.values()) != full:
        raise wrong(path, f"run{run:02}/class_labels.txt does not give each of 20 items a class of its own")
    return np.array([answers[i] - 1 for i in range(1, WAY + 1)], dtype=np.int64)


def _bits(path: Path, name: str, content: bytes) -> NDArray[np.uint8]:
    """One drawing as packed bits, 1 = ink."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                size = f"{image.size[0]} x {image.size[1]}"
                raise wrong(path, f"{name!a} is {size} pixels; expected {SIDE} x {SIDE}")
            grey = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as fault:
        raise wrong(path, f"{name!a} is not a readable PNG image ({fault})") from fault
    return np.packbits(grey.reshape(-1) < 128)


def _check(path: Path, expected: Mapping[str, int], found: Iterable[tuple[str, int, int]]) -> None:
    drawers: dict[str, dict[int, set[int]]] = {}
    for alphabet, character, drawer in found:
        drawers.setdefault(alphabet, {}).setdefault(character, set()).add(drawer)
    whole = f"expected {len(expected)} alphabets, {sum(expected.values())} characters x {DRAWERS} drawings"
    lacking = [name for name in expected if name not in drawers]
    if lacking:
        raise wrong(path, f"no alphabet {', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}; {whole}")
    foreign = [name for name in drawers if name not in expected]
    if foreign:
        raise wrong(path, f"an alphabet {foreign[0]!a} that Omniglot has not; {whole}")
    for alphabet, characters in expected.items():
        if set(drawers[alphabet]) != set(range(1, characters + 1)):
            numbers = f"{len(drawers[alphabet])} characters; expected {characters}, numbered from 01"
            raise wrong(path, f"{alphabet} has {numbers}")
        for character, hands in drawers[alphabet].items():
            if hands != set(range(1, DRAWERS + 1)):
                numbers = f"{len(hands)} drawings; expected {DRAWERS}, numbered from 01"
                raise wrong(path, f"{alphabet}/character{character:02} has {numbers}")


def wrong(path: Path, what: str) -> DataError:
    """The fault to raise where a file is there and not as it must be."""
    return DataError(
        f"{path}: {what}. Run `whetstone data fetch` to get it again, or set WHETSTONE_DATA to a whole copy"
    )


def _unreadable(path: Path, fault: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {fault.strerror or fault}. Check it and its permissions, or {REMEDY}")


def _content(name: str) -> bool:
    """Whether a file is data: drawings and labels are; folders and what file managers leave behind are not."""
    last = name.rsplit("/", 1)[-1]
    return name.endswith((".png", ".txt")) and not name.startswith("__MACOSX/") and not last.startswith(".")


def _walk(folder: Path, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files of a folder, sorted by name, as far as they are data."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name = below + entry.name
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{name}/")
        elif _content(name):
            yield name, entry
