"""A folder of images of one's own as a data set: ``WHETSTONE_DATA/<folder>/alphabet/character/drawing.png``.

Promise: a folder that cannot be trained on is refused in one line that names the file or folder and what to do; what is
left out is said through `notify`, never dropped in silence. Nothing here writes, and nothing outside of WHETSTONE_DATA
is read. The order is that of the names, so the same files give the same data set on every machine.

Images become squares of the size asked for: shrunk by area averaging, what a rectangle lacks filled with background.
Under dark ink the background is white, under light ink black; transparent parts show it, and it is 0 in the result.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.drawings import DataError, Dataset, Drawings
from model.resize import into_square

Ink = Literal["dark", "light"]
Alphabets = Mapping[str, Mapping[str, tuple[Path, ...]]]
"""The drawings of each character of each alphabet, all in the order of their names."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"}
LAYOUT = "alphabet/character/drawing.png"
PARTS = ("train", "validation", "test")

LARGEST_SIDE = 10_000
LARGEST_PIXELS = 50_000_000
LARGEST_FILE = 1 << 28
MOST_ENTRIES = 1_000_000
MOST_BYTES = 1 << 33
"""Of the data set in memory."""

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


def check(folder: str, ink: str = "dark") -> None:
    """Raises ValueError for what cannot be the name of a folder below WHETSTONE_DATA, or is no ink. Reads nothing."""
    if ink not in ("dark", "light"):
        raise ValueError(f"ink is dark (on light paper) or light (on a dark ground); got {ink!r}")
    if not folder:
        raise ValueError("data: folder needs `folder`, the name of a folder of images below WHETSTONE_DATA")
    path = PurePosixPath(folder)
    # A backslash or a drive would leave the root where the system is another.
    plain = folder.isprintable() and "\\" not in folder and ":" not in folder
    if not plain or path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"`folder` is a plain relative name below WHETSTONE_DATA, such as my-letters; got {folder!r}")


def load(
    data_root: Path | None,
    folder: str,
    size: int,
    *,
    channels: int = 1,
    ink: Ink = "dark",
    notify: Callable[[str], None],
) -> Dataset:
    """The images below `folder` at `size` x `size` pixels; `ink` dark turns them round, so that 255 is ink.

    Where there are train/ and validation/ (and perhaps test/) these are the parts, with alphabets in each. Otherwise
    the alphabets are split by name, about 60/20/20 and at least one in each part; of one or two alphabets the
    characters are split so. All characters of a part have as many drawings as that with the fewest, the first by name.

    Raises ValueError for a name or an ink that `check` refuses, DataError where the folder is not there, leads out of
    `data_root`, has not this layout, a character with fewer than 2 drawings, an unreadable image, or too much.
    """
    check(folder, ink)
    folder = str(PurePosixPath(folder))
    tree = _Tree(data_root, folder)
    parts = _parts(tree, notify)
    if tree.ignored:
        notify(f"{tree.shown}: {len(tree.ignored)} ignored, not {LAYOUT}: {_some(tree.ignored)}")
    used = _even(tree, parts, notify)
    needed = size * size * channels * sum(len(files) for part in used.values() for files in _characters(part).values())
    if needed > MOST_BYTES:
        allowed = f"at most {MOST_BYTES >> 30} GiB are allowed: use smaller images, fewer drawings or channels"
        raise DataError(f"{tree.shown} takes {needed / (1 << 30):.1f} GiB at {size} x {size} pixels; {allowed}")
    faults: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a decoder puts up with is fine, and sizes are checked here
        train, validation, test = (_drawings(used[part], size, channels, ink, faults) for part in PARTS)
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}: replace or remove what cannot be read")
    return Dataset(train, validation, test, f"folder:{folder}", size)


class _Tree:
    """Reads folders below the data root, sorted by name; remembers what it passed over."""

    def __init__(self, data_root: Path | None, folder: str) -> None:
        if data_root is None:
            raise DataError(f"WHETSTONE_DATA is not set; set it to the folder that holds {folder}/")
        self.root = os.path.realpath(data_root)
        self.top = Path(data_root, folder)
        self.shown = _printable(str(self.top))
        self.ignored: list[str] = []
        self._entries = 0
        if not os.path.isdir(self.top):
            raise DataError(f"{self.shown} is not a folder; put the images there as {folder}/{LAYOUT}")
        self._inside(str(self.top))

    def read(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the images in `folder`; hidden files pass in silence, others are `ignored`."""
        folders, images = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._entries += 1
                    if self._entries > MOST_ENTRIES:
                        raise DataError(f"{self.shown} holds more than {MOST_ENTRIES:,} files; use fewer drawings")
                    if entry.name.startswith(".") or entry.name.lower() in _LITTER:
                        continue
                    if entry.is_symlink():
                        self._inside(entry.path)
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif entry.is_file() and Path(entry.name).suffix.lower() in FORMATS:
                        images.append(Path(entry.path))
                    else:
                        self.ignore(Path(entry.path))
        except OSError as fault:
            raise DataError(f"{_printable(str(folder))} cannot be read: {fault.strerror or fault}") from fault
        return sorted(folders), sorted(images)

    def ignore(self, *paths: Path) -> None:
        self.ignored += [_printable(str(path.relative_to(self.top))) for path in paths]

    def _inside(self, path: str) -> None:
        try:
            target = os.path.realpath(path, strict=True)
        except OSError as fault:
            raise DataError(f"{_printable(path)} is a link that leads nowhere ({fault.strerror or fault})") from fault
        if os.path.commonpath([self.root, target]) != self.root:
            raise DataError(f"{_printable(path)} is a link that leads out of WHETSTONE_DATA: put a copy in its place")


def _parts(tree: _Tree, notify: Callable[[str], None]) -> dict[str, Alphabets]:
    """The alphabets of train, validation and test, as the folder says or split by name."""
    folders, images = tree.read(tree.top)
    tree.ignore(*images)
    given = {path.name: path for path in folders if path.name in PARTS}
    if "train" in given and "validation" in given:
        tree.ignore(*(path for path in folders if path.name not in given))
        return {part: _alphabets(tree, tree.read(given[part])) if part in given else {} for part in PARTS}
    if "train" in given or "validation" in given:
        there, lacking = ("train", "validation") if "train" in given else ("validation", "train")
        raise DataError(
            f"{tree.shown} has {there}/ and no {lacking}/: add it, or put all alphabets into {tree.shown} to split them"
        )
    alphabets = _alphabets(tree, (folders, []))
    if not alphabets:
        raise DataError(f"{tree.shown} holds no drawings as {LAYOUT}")
    if len(alphabets) >= 3:
        return {part: {name: alphabets[name] for name in names} for part, names in _split(list(alphabets), 1).items()}
    small = [f"{name} has {len(characters)}" for name, characters in alphabets.items() if len(characters) < 6]
    if small:
        raise DataError(
            f"{tree.shown} has too little to split into training, validation and test: it takes 3 alphabets, or 6 "
            f"characters in each of fewer ({', '.join(small)}), or folders train/ and validation/ of alphabets"
        )
    splits = {name: _split(list(characters), 2) for name, characters in alphabets.items()}
    counts = [str(sum(len(split[part]) for split in splits.values())) for part in PARTS]
    notify(
        f"{tree.shown}: fewer than 3 alphabets, so the characters of each are split: {counts[0]} to train, "
        f"{counts[1]} to validate, {counts[2]} to test"
    )
    return {
        part: {name: {c: alphabets[name][c] for c in split[part]} for name, split in splits.items()} for part in PARTS
    }


def _split(names: list[str], least: int) -> dict[str, list[str]]:
    """About 60/20/20 in order, at least so many in each."""
    held = max(least, round(len(names) / 5))
    middle, last = len(names) - 2 * held, len(names) - held
    return {"train": names[:middle], "validation": names[middle:last], "test": names[last:]}


def _alphabets(tree: _Tree, found: tuple[list[Path], list[Path]]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """The alphabets among these folders; images beside them belong nowhere."""
    folders, stray = found
    tree.ignore(*stray)
    alphabets: dict[str, dict[str, tuple[Path, ...]]] = {}
    for folder in folders:
        characters, images = tree.read(folder)
        if images and not characters:
            raise DataError(
                f"{_printable(str(folder))} holds images and no characters; the layout is {LAYOUT}: characters without "
                "an alphabet go into one folder more, which is their alphabet"
            )
        tree.ignore(*(images if characters else [folder]))
        for character in characters:
            deeper, drawings = tree.read(character)
            tree.ignore(*deeper)
            if len(drawings) < 2:
                number = "1 drawing" if drawings else "no drawings"
                raise DataError(
                    f"{_printable(str(character))} has {number}; a character needs at least 2: add one, or remove it"
                )
            alphabets.setdefault(folder.name, {})[character.name] = tuple(drawings)
    return alphabets


def _characters(alphabets: Alphabets) -> dict[str, tuple[Path, ...]]:
    """All characters of a part, as ``alphabet/character``."""
    return {f"{name}/{c}": files for name, characters in alphabets.items() for c, files in characters.items()}


def _even(tree: _Tree, parts: Mapping[str, Alphabets], notify: Callable[[str], None]) -> dict[str, Alphabets]:
    """The parts with equally many drawings of each character; checks that each part can give pairs."""
    fewest = {}
    lost = total = 0
    for part, alphabets in parts.items():
        if part != "test" and not any(len(characters) > 1 for characters in alphabets.values()):
            raise DataError(
                f"{tree.shown}: no alphabet of the {part} part has 2 characters, which pairs of different characters "
                "of one alphabet need: put characters that belong together into one alphabet's folder"
            )
        lone = [name for name, characters in alphabets.items() if len(characters) == 1]
        if lone:
            notify(f"{tree.shown}: one character only, so no pairs of its own, has {_some(lone)} ({part})")
        counts = [len(files) for files in _characters(alphabets).values()]
        fewest[part] = min(counts, default=2)
        total += sum(counts)
        lost += sum(counts) - fewest[part] * len(counts)
    if lost:
        least = ", ".join(f"{part} {count}" for part, count in fewest.items() if parts[part])
        notify(f"{tree.shown}: {lost} of {total} drawings left out, for each character to have as many ({least})")
    return {
        part: {
            name: {c: files[: fewest[part]] for c, files in characters.items()}
            for name, characters in alphabets.items()
        }
        for part, alphabets in parts.items()
    }


def _drawings(alphabets: Alphabets, size: int, channels: int, ink: Ink, faults: list[str]) -> Drawings:
    """Reads a part; adds to `faults` what cannot be read."""
    characters = _characters(alphabets)
    drawers = len(next(iter(characters.values()), (0, 0)))
    images = np.zeros((len(characters) * drawers, channels, size, size), dtype=np.uint8)
    for row, path in enumerate(path for files in characters.values() for path in files):
        try:
            images[row] = into_square(_pixels(_decode(path), channels, ink), size)
        except _Unreadable as fault:
            faults.append(f"{_printable(str(path))} {fault}")
    shape = (len(characters), drawers, *((channels,) if channels > 1 else ()), size, size)
    alphabet = [i for i, name in enumerate(alphabets) for _ in alphabets[name]]
    return Drawings(
        torch.from_numpy(images).view(shape),
        torch.tensor(alphabet, dtype=torch.int64),
        tuple(_printable(name) for name in alphabets),
        tuple(_printable(name) for name in characters),
    )


class _Unreadable(Exception):
    """Why one file gives no image."""


def _decode(path: Path) -> Image.Image:
    """The image, upright; the first one of an animation."""
    try:
        length = path.stat().st_size
        if not 0 < length <= LARGEST_FILE:
            raise _Unreadable(f"has {length} bytes" if length else "is empty")
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if max(image.size) > LARGEST_SIDE or image.width * image.height > LARGEST_PIXELS:
                pixels = f"is {image.width} x {image.height} pixels"
                raise _Unreadable(f"{pixels}; at most {LARGEST_PIXELS:,} are read, and {LARGEST_SIDE:,} a side")
            ImageOps.exif_transpose(image, in_place=True)  # reads the pixels, too
            return image
    except (_Unreadable, MemoryError):
        raise
    except Exception as fault:  # a decoder that is fed with garbage raises whatever it stumbles over
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise _Unreadable(f"is not a readable image ({_printable(reason)})") from fault


def _pixels(image: Image.Image, channels: int, ink: Ink) -> NDArray[np.uint8]:
    """(channels, height, width) uint8, ink bright."""
    if image.mode.startswith("I"):  # 16 bits a pixel
        values = (np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        image = Image.fromarray(values)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white" if ink == "dark" else "black")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return np.subtract(255, pixels, dtype=np.uint8) if ink == "dark" else np.array(pixels)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _printable(text: str) -> str:
    """A name as it can be shown on a line and kept in a file, whatever bytes it is made of."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
