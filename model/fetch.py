"""`whetstone data fetch` and `info`: what of the data is there, and getting what is not.

Promise: what is there and whole is left alone, also where its checksum is not upstream's, as long as its counts are
right; what is missing or damaged is fetched from upstream, verified, and laid out as torchvision lays it out. Addresses
and checksums are torchvision's own, but those of Lake's runs. Only `fetch` ever writes under the root.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model import cache, omniglot, vision
from model.download import Progress, download, md5_of, sync_folder
from model.drawings import DataError

LAKE_MD5 = "e8996daecdf12afeeb4a53a179f06b19"


@dataclass(frozen=True)
class Item:
    """A file to have under the root: `path` is relative to it, `urls` in the order in which they are tried."""

    name: str
    path: str
    urls: tuple[str, ...]
    md5: str


@dataclass(frozen=True)
class Status:
    """How one item stands: `note` says what it was recognised by, or what is wrong with it."""

    item: Item
    path: Path
    state: Literal["there", "missing", "damaged", "fetched"]
    note: str
    size: int | None = None
    """Bytes of the file; None for a folder and for what is not there."""


def catalogue() -> tuple[Item, ...]:
    """Everything that Whetstone uses: Omniglot's two parts, Lake's runs, and MNIST's four files."""
    upstream = vision.datasets()
    prefix = upstream.Omniglot.download_url_prefix
    items = [
        Item(f"Omniglot {name}", f"{omniglot.FOLDER}/{name}.zip", (f"{prefix}/{name}.zip",), md5)
        for name, md5 in upstream.Omniglot.zips_md5.items()
    ]
    runs = f"{prefix}/one-shot-classification/all_runs.zip"
    items.append(Item("Lake's one-shot runs", f"{omniglot.FOLDER}/all_runs.zip", (runs,), LAKE_MD5))
    for name, md5 in upstream.MNIST.resources:
        urls = tuple(mirror + name for mirror in upstream.MNIST.mirrors)
        items.append(Item(f"MNIST {name.partition('.')[0]}", f"MNIST/raw/{name}", urls, md5))
    return tuple(items)


def info(root: Path | None, home: Path, items: Sequence[Item] | None = None) -> dict[str, Any]:
    """What is there, ready for JSON; writes nothing. Counts every drawing, so it takes seconds.

    root, sets: a row for each item (name, state, detail, path, bytes), cached: for each size packed under `home`,
    whether it is whole and belongs to the data that is there.
    """
    listed = catalogue() if items is None else items
    rows = [status(root, item) for item in listed] if root is not None else []
    try:
        cached = cache.state(omniglot.sources(root), home)
    except DataError:
        cached = cache.state((), home)
    return {
        "root": None if root is None else str(root),
        "sets": [
            {"name": row.item.name, "state": row.state, "detail": row.note, "path": str(row.path), "bytes": row.size}
            for row in rows
        ],
        "cached": {str(size): current for size, current in cached.items()},
    }


def status(root: Path, item: Item) -> Status:
    """Whether one item is there and whole: by its checksum, else by its content."""
    path = root / item.path
    try:
        if path.is_file() and md5_of(path) == item.md5:
            return Status(item, path, "there", "upstream's own file", path.stat().st_size)
    except OSError as fault:
        return Status(item, path, "damaged", f"{path} cannot be read: {fault.strerror or fault}")
    if not item.path.startswith(f"{omniglot.FOLDER}/"):
        unpacked = path.with_suffix("")
        if _whole_idx(unpacked):
            return Status(item, unpacked, "there", "unpacked, of the right length", unpacked.stat().st_size)
        if path.is_file():
            return Status(item, path, "damaged", f"{path}: its MD5 is not {item.md5}")
        return Status(item, path, "missing", f"{path} is not there")
    name = Path(item.path).stem
    source = omniglot.find(root, name)
    if source is None:
        return Status(item, path, "missing", f"{path} is not there")
    try:
        if name in omniglot.SPLITS:
            counted = omniglot.read(source)
            note = f"counted: {len(counted) // omniglot.DRAWERS} characters x {omniglot.DRAWERS} drawings"
        else:
            omniglot.read_lake_runs(root, omniglot.SIDE)
            note = f"counted: {omniglot.RUNS} runs of {omniglot.WAY} tasks"
    except DataError as fault:
        return Status(item, source.path, "damaged", str(fault))
    return Status(item, source.path, "there", note, source.path.stat().st_size if source.packed else None)


def fetch(
    root: Path,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda line: None,
    items: Sequence[Item] | None = None,
    tries: int = 3,
    pause_s: float = 1.0,
) -> tuple[Status, ...]:
    """Brings everything into `root` that is not there whole; one line through `notify` for each file.

    Without a `progress` of the caller's own, `notify` gets a line for each quarter of a file too. With a `home`,
    Omniglot is packed there afterwards. Raises DataError, in one line, where a file can neither be found nor fetched,
    where `root` cannot be written, and where another fetch is at work in it. What was fetched before the fault stays,
    and the next call goes on from there.
    """
    listed = catalogue() if items is None else items
    before = [status(root, item) for item in listed]
    for found in before:
        if found.state == "there":
            notify(f"{found.item.name}: already there ({found.note})")
    after = before
    if any(found.state != "there" for found in before):
        with _alone(root):
            after = [
                found
                if found.state == "there"
                else _get(root, found, progress or _quarters(notify), notify, tries=tries, pause_s=pause_s)
                for found in before
            ]
    sources = omniglot.sources(root) if home is not None else ()
    if home is not None and sources:
        cache.load(sources, omniglot.SIDE, home, notify)
    return tuple(after)


def _get(
    root: Path, found: Status, progress: Progress, notify: Callable[[str], None], *, tries: int, pause_s: float
) -> Status:
    item, path = found.item, root / found.item.path
    if found.state == "damaged":
        notify(f"{item.name}: damaged, fetching it again ({found.note})")
    download(item.urls, path, item.md5, progress, tries=tries, pause_s=pause_s)
    if path.suffix == ".gz":
        _gunzip(path)
    notify(f"{item.name}: fetched into {path}")
    return Status(item, path, "fetched", "checksum verified", path.stat().st_size)


def _quarters(notify: Callable[[str], None]) -> Progress:
    """Progress in lines: the beginning of a file, and each quarter of it that is there."""
    said: dict[str, int] = {}

    def progress(name: str, done: int, total: int | None) -> None:
        quarter = 4 * done // total if total else 0
        if said.get(name, -1) < quarter < 4:
            said[name] = quarter
            size = f" of {total / 1e6:.1f} MB" if total else ""
            notify(f"{name}: {25 * quarter}%{size}")

    return progress


def _whole_idx(path: Path) -> bool:
    """Whether a file of MNIST's format is as long as its header says: magic, a length for each dimension, bytes."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08":
                return False
            lengths = [int.from_bytes(file.read(4), "big") for _ in range(magic[3])]
            return path.stat().st_size == 4 + 4 * len(lengths) + math.prod(lengths)
    except OSError:
        return False


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Only one fetch at a time writes under `root`."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root, os.O_RDONLY)
    except OSError as fault:
        raise DataError(f"{root} cannot be written: {fault.strerror or fault}") from fault
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(f"another fetch is writing under {root}; wait for it to end") from fault
            # Some network file systems lock no folders. Two fetches there could spoil each other's bytes, which the
            # checksum would show; nothing wrong can be installed.
        yield
    finally:
        os.close(handle)


def _gunzip(path: Path) -> None:
    """Unpacks an MNIST file beside itself, as torchvision does when it downloads one: whole or not at all."""
    target = path.with_suffix("")
    try:
        handle, name = tempfile.mkstemp(prefix=f"{target.name}-", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file, gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, path.stat().st_mode & 0o777)
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(target.parent)
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{target} cannot be unpacked from {path.name}: {fault}") from fault
