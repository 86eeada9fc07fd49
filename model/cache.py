"""Omniglot packed into one compact file per size, so that it loads in well under a second.

At 105 pixels a drawing is 1 bit per pixel (45 MB for all of Omniglot); other sizes are grey bytes. Promise: what `load`
gives is what the source files hold now: a cache that was cut short, in which one bit flipped, or whose sources changed
is built again, never used. Files appear whole or not at all (written aside, flushed to the disk, renamed), so two
processes may build at once and a power cut leaves nothing to clean up by hand. A home that cannot be written costs
time, not the run.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model import omniglot
from model.omniglot import SIDE, Source
from model.resize import unpack

_FORMAT = "1"
"""Goes up whenever the same source files would give other bytes."""
_ABANDONED_S = 3600.0


@dataclass(frozen=True, eq=False)
class Packed:
    """Omniglot at one size: for each part the rows of its drawings, ordered by alphabet, character and drawer.

    At 105 pixels a row is 1379 bytes of bits, otherwise `size` x `size` grey bytes.
    """

    parts: Mapping[str, NDArray[np.uint8]]
    size: int

    def images(self, part: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The drawings `rows` of one part: (n, size, size) uint8, 255 = ink."""
        chosen = self.parts[part][rows]
        return unpack(chosen, SIDE, SIDE) if self.size == SIDE else chosen


def load(sources: Sequence[Source], size: int, home: Path, notify: Callable[[str], None]) -> Packed:
    """Omniglot at `size`: from the cache under `home` where it is whole and current, else from `sources`, then cached.

    Raises DataError where the sources themselves are damaged. `notify` gets one line when the packing, which takes some
    seconds, begins, and one when the cache cannot be written.
    """
    signature = _signature(sources)
    kept = _read(_path(home, size), signature)
    if kept is not None:
        return Packed(kept, size)
    bits = _read(_path(home, SIDE), signature)
    if bits is None:
        notify(f"Packing Omniglot once into {home / 'cache'} (some seconds)")
        bits = {source.name: omniglot.read(source) for source in sources}
        _write(_path(home, SIDE), bits, signature, notify)
    if size == SIDE:
        return Packed(bits, size)
    grey = {name: unpack(rows, SIDE, size) for name, rows in bits.items()}
    _write(_path(home, size), grey, signature, notify)
    return Packed(grey, size)


def state(sources: Sequence[Source], home: Path) -> dict[int, bool]:
    """The sizes that are cached under `home`, and whether each is whole and of these sources."""
    signature = _signature(sources) if sources else ""
    sizes = [int(path.stem.removeprefix("omniglot-")) for path in (home / "cache").glob("omniglot-[0-9]*.safetensors")]
    return {size: _read(_path(home, size), signature) is not None for size in sorted(sizes)}


def _path(home: Path, size: int) -> Path:
    return home / "cache" / f"omniglot-{size}.safetensors"


def _signature(sources: Sequence[Source]) -> str:
    return " ".join([_FORMAT, *(f"{source.name}={source.signature()}" for source in sources)])


def _digest(parts: Mapping[str, NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(parts[name]).data)
    return digest.hexdigest()


def _read(path: Path, signature: str) -> dict[str, NDArray[np.uint8]] | None:
    """The parts in that file, or None where it is absent, of other sources, or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("signature") != signature:
                return None
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (OSError, SafetensorError):
        return None
    return parts if _digest(parts) == metadata.get("sha256") else None


def _write(path: Path, parts: Mapping[str, NDArray[np.uint8]], signature: str, notify: Callable[[str], None]) -> None:
    content = save(dict(parts), {"signature": signature, "sha256": _digest(parts)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        notify(
            f"Cannot keep the packed data in {path} ({fault.strerror or fault}): this run goes on, the next packs anew"
        )


def _sweep(folder: Path) -> None:
    """Removes what a process left that was killed while it wrote. A young file may be a neighbour's at work."""
    for path in folder.glob("omniglot-*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
