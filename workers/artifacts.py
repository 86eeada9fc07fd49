"""Where checkpoints are kept: a directory, or any place fsspec has a name for (``s3://bucket/whetstone``).

Names come from the coordinator and never lead out of the root. Into a directory the checkpoints are written as they
are made; for a URL they are written to a scratch folder and copied up by a thread in the background, so that training
never waits for a network, and a reader there finds the whole old one or the whole new one, as in a directory. A
checkpoint counts (`on_kept`) once it is where another worker can find it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from hpo.rest import Backoff

log = logging.getLogger("whetstone.worker")

SUFFIXES = (".safetensors", ".json")
"""All that is ever copied or read."""

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class UnsafeName(ValueError):
    """A name of an artifact that is absolute, climbs, or has characters the coordinator never uses."""


class ArtifactsUnusable(Exception):
    """The artifacts root cannot be written: one line with the reason and the remedy."""

    is_user_error = True


def checked(name: str) -> PurePosixPath:
    """The relative path `name` stands for. Raises `UnsafeName`."""
    segments = name.split("/")
    if len(name) > 1000 or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise UnsafeName("the coordinator named a folder for checkpoints that does not lie below the artifacts root")
    return PurePosixPath(*segments)


class Place(Protocol):
    """The folder of one attempt, as training sees it."""

    path: Path
    """Local folder to write checkpoints to."""

    def fetch(self, name: str) -> Path | None:
        """A local folder with what the earlier attempt `name` left, or None. Raises UnsafeName, OSError."""

    def agree(self, name: str, choice: str) -> str:
        """Make `choice` the one that stands in the JSON file `name` below the root, unless an earlier one does.

        Returns what stands there. Raises UnsafeName, OSError.
        """

    def saved(self, kind: str, epoch: int) -> None:
        """A checkpoint ("last" or "best") of `epoch` whole epochs was just written to `path`."""

    def finish(self, timeout_s: float | None) -> bool:
        """Wait until all that was saved is kept; False if some is not."""

    def close(self) -> None:
        """Free what is only local."""


Kept = Callable[[int], None]


class Artifacts:
    """The artifacts root of one worker process. Raises `ArtifactsUnusable` for a directory that cannot be written, and
    for a URL of a kind that is not installed here; whether a store answers shows with the first checkpoint.
    """

    def __init__(self, root: str | Path, scratch: Path) -> None:
        self.root = str(root)
        self._remote: tuple[Any, str] | None = None
        if _URL.match(self.root):
            self._remote = _remote(self.root)
            self._scratch, self._lock = _own_scratch(scratch)
        else:
            self._local = Path(self.root).expanduser().absolute()
            try:
                self._local.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._local):
                    pass
            except OSError as error:
                raise ArtifactsUnusable(
                    f"cannot write checkpoints to {self._local} ({error.strerror}): set WHETSTONE_ARTIFACTS"
                ) from None

    def open(self, name: str, on_kept: Kept) -> Place:
        """The place of the attempt `name`; `on_kept(epoch)` is called for each checkpoint to resume from.

        Raises `UnsafeName`, and OSError where the folder cannot be made.
        """
        relative = checked(name)
        if self._remote is None:
            return _Directory(self._local, relative, on_kept)
        return _Uploaded(*self._remote, relative, self._scratch / relative, on_kept)


class _Directory:
    """Checkpoints straight in their place."""

    def __init__(self, root: Path, relative: PurePosixPath, on_kept: Kept) -> None:
        self._root = root
        self._on_kept = on_kept
        self.path = self._below(relative)
        self.path.mkdir(parents=True, exist_ok=True)

    def _below(self, relative: PurePosixPath) -> Path:
        path = self._root / relative
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise UnsafeName("a link in the artifacts root leads out of it")
        return path

    def fetch(self, name: str) -> Path | None:
        folder = self._below(checked(name))
        return folder if folder.is_dir() else None

    def agree(self, name: str, choice: str) -> str:
        path = self._below(checked(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        unborn = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
        unborn.write_text(json.dumps(choice))
        try:
            with suppress(FileExistsError):
                os.link(unborn, path)  # whole or not at all, and only one of all workers'
        finally:
            unborn.unlink()
        return _choice(path.read_bytes(), choice)

    def saved(self, kind: str, epoch: int) -> None:
        if kind == "last":
            self._on_kept(epoch)

    def finish(self, timeout_s: float | None) -> bool:
        return True

    def close(self) -> None:
        return None


class _Uploaded:
    """Checkpoints in a scratch folder, copied to the URL behind the training's back, the newest first."""

    def __init__(self, fs: Any, base: str, relative: PurePosixPath, path: Path, on_kept: Kept) -> None:
        self._fs = fs
        self._base = base
        self._target = f"{base}/{relative}"
        self._on_kept = on_kept
        self.path = path
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        self._changed = threading.Condition()
        self._waiting: dict[str, tuple[int, Path]] = {}
        self._busy = False
        self._failing = False
        self._closed = False
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def fetch(self, name: str) -> Path | None:
        source = f"{self._base}/{checked(name)}"
        try:
            found = {PurePosixPath(str(entry)).name for entry in self._fs.ls(source, detail=False)}
        except FileNotFoundError:
            return None
        earlier = self.path / ".earlier"
        earlier.mkdir(exist_ok=True)
        for file in sorted(found):
            if file.endswith(SUFFIXES):
                self._fs.get_file(f"{source}/{file}", str(earlier / file))
        return earlier

    def agree(self, name: str, choice: str) -> str:
        """Workers that begin a study within the same moment may disagree once: not every store has a first writer."""
        path = f"{self._base}/{checked(name)}"
        if not self._fs.exists(path):
            self._fs.pipe_file(path, json.dumps(choice).encode())
        return _choice(self._fs.cat_file(path), choice)

    def saved(self, kind: str, epoch: int) -> None:
        self._count += 1
        frozen = self.path / f".up-{self._count}"
        frozen.mkdir()
        for suffix in SUFFIXES:
            os.link(self.path / f"{kind}{suffix}", frozen / f"{kind}{suffix}")  # the next save replaces the name only
        with self._changed:
            overtaken = self._waiting.pop(kind, None)
            self._waiting[kind] = (epoch, frozen)
            self._changed.notify_all()
        if overtaken:
            shutil.rmtree(overtaken[1], ignore_errors=True)

    def finish(self, timeout_s: float | None) -> bool:
        """Waits no longer than it takes to learn that the other side does not answer."""
        with self._changed:
            self._changed.wait_for(lambda: (not self._waiting and not self._busy) or self._failing, timeout_s)
            return not self._waiting and not self._busy

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(2.0)
        shutil.rmtree(self.path, ignore_errors=True)

    def _run(self) -> None:
        backoff = Backoff(0.5, 30.0)
        tries = 0
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                kind = next(iter(self._waiting))
                epoch, frozen = self._waiting.pop(kind)
                self._busy = True
            try:
                self._upload(kind, frozen)
            except Exception as error:
                tries += 1
                if tries == 1:
                    log.warning("a checkpoint could not be copied to %s (%s): trying again", self._target, _line(error))
                with self._changed:
                    self._failing = tries >= 4
                    if kind not in self._waiting:  # else a newer one replaces it
                        self._waiting[kind] = (epoch, frozen)
                    self._busy = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed, backoff.next())
                continue
            tries, self._failing = 0, False
            backoff.reset()
            shutil.rmtree(frozen, ignore_errors=True)
            if kind == "last":
                self._on_kept(epoch)

    def _upload(self, kind: str, frozen: Path) -> None:
        """Replace a checkpoint so that at every moment its JSON's weights are there, as themselves or as "previous"."""
        weights, previous = f"{self._target}/{kind}.safetensors", f"{self._target}/{kind}.previous.safetensors"
        self._fs.makedirs(self._target, exist_ok=True)
        self._fs.put_file(str(frozen / f"{kind}.safetensors"), previous)
        self._fs.put_file(str(frozen / f"{kind}.json"), f"{self._target}/{kind}.json")
        self._fs.cp_file(previous, weights)
        self._fs.rm_file(previous)


def _remote(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.split("://", 1)[0]
    try:
        fs, base = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ArtifactsUnusable(
            f"WHETSTONE_ARTIFACTS begins with {scheme}://, and what that takes is not installed here ({_line(error)})"
        ) from None
    return fs, str(base).rstrip("/")


def _own_scratch(scratch: Path) -> tuple[Path, Any]:
    """A folder for this process and the lock that holds it; folders of processes that died are removed."""
    scratch.mkdir(parents=True, exist_ok=True)
    for lock in scratch.glob("*.lock"):
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    name = uuid.uuid4().hex  # a pid says nothing where containers share a volume
    unborn = scratch / f"{name}.new"
    held = unborn.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    unborn.rename(scratch / f"{name}.lock")
    return scratch / name, held


def _choice(content: bytes, ours: str) -> str:
    """What stands there, or our own where that is no choice."""
    try:
        found = json.loads(content)
    except ValueError:
        return ours
    return found if isinstance(found, str) else ours


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
