"""Checkpoints of a run: weights in safetensors, all else in JSON, nothing that could run code when it is read.

A folder holds at most two, `last` (to go on from) and `best` (to keep), each as NAME.safetensors and NAME.json.
Promise: a reader finds the whole old one or the whole new one, whenever the power fails. The JSON is the commit point:
it holds the SHA-256 of its weights, and is renamed into place after them; until then the weights it names stand as
NAME.previous.safetensors. Whatever is damaged is refused with a `CheckpointError` that says what and where.
Invariant: one writer per folder (`Checkpoints.locked`).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from model.spec import Refused, TrainConfig, config

VERSION = 1
Name = Literal["last", "best"]
NAMES: tuple[Name, ...] = ("last", "best")
_LARGEST_JSON = 256 * 2**20


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, of another version, or of another run. One line: which, what, what to do."""


@dataclass(frozen=True)
class State:
    """A run at one step: everything it needs to go on as if it had never stopped.

    `epoch` and `step` (within the epoch) are those that come next; step = steps_per_epoch means trained, not measured.
    """

    config: TrainConfig
    epoch: int
    step: int
    seconds: float
    epoch_seconds: float
    best_epoch: int | None
    best_value: float | None
    tied_at: int | None
    history: tuple[Mapping[str, float], ...]
    """The metrics of each finished epoch."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """net.LAYER.weight, momentum.LAYER.weight, ..., generator, loss_sum."""
    data: str = ""
    """The data set that it was trained on, by name, whatever the config left open; "" where it was not noted."""
    answers: bytes | None = None
    """As in `model.train.FitResult`: which validation tasks the best epoch answered right."""


@dataclass(frozen=True)
class Best:
    """The weights of one epoch with the recipe they were trained by and the metrics they reached."""

    config: TrainConfig
    epoch: int
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor] = field(repr=False)
    """LAYER.weight and LAYER.bias."""
    data: str = ""
    answers: bytes | None = None
    """Both as in `State`."""


class Checkpoints:
    """The checkpoints in one folder, which is made when the first is saved."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def save_last(self, state: State) -> None:
        """Replace `last`. Raises OSError where the disk does not take it; the old one stands then."""
        document = {
            "config": state.config.document(),
            "data": state.data,
            "epoch": state.epoch,
            "step": state.step,
            "seconds": state.seconds,
            "epoch_seconds": state.epoch_seconds,
            "best_epoch": state.best_epoch,
            "best_value": state.best_value,
            "tied_at": state.tied_at,
            "history": [dict(metrics) for metrics in state.history],
            "answers": _text(state.answers),
        }
        self._write("last", document, state.tensors)

    def save_best(self, best: Best) -> None:
        """Replace `best`."""
        about = {"config": best.config.document(), "data": best.data, "answers": _text(best.answers)}
        self._write("best", {**about, "epoch": best.epoch, "metrics": dict(best.metrics)}, best.weights)

    def load_last(self) -> tuple[State | None, str]:
        """The state to go on from, or None and why there is none ("" where nothing was ever saved). Never raises."""
        if not (self.folder / "last.json").exists():
            return None, ""
        try:
            return self.read_last(), ""
        except (CheckpointError, OSError) as fault:
            return None, f"starting over, for the checkpoint cannot be used: {fault}"

    def read_last(self) -> State:
        """The state to go on from. Raises CheckpointError."""
        document, tensors = self._read("last")
        at = self.folder / "last.json"
        best_epoch, best_value = document.get("best_epoch"), document.get("best_value")
        if (best_epoch is None) != (best_value is None):
            raise _damaged(at, "best_epoch and best_value do not go together")
        history = document.get("history")
        if not isinstance(history, list):
            raise _damaged(at, "history is no list")
        return State(
            config=_config(document, at),
            epoch=_count(document, "epoch", at),
            step=_count(document, "step", at),
            seconds=_real(document, "seconds", at),
            epoch_seconds=_real(document, "epoch_seconds", at),
            best_epoch=None if best_epoch is None else _count(document, "best_epoch", at),
            best_value=None if best_value is None else _real(document, "best_value", at),
            tied_at=None if document.get("tied_at") is None else _count(document, "tied_at", at),
            history=tuple(_metrics(metrics, at) for metrics in history),
            tensors=tensors,
            data=_data(document, at),
            answers=_answers(document, at),
        )

    def read_best(self) -> Best:
        """The best epoch's weights. Raises CheckpointError."""
        document, weights = self._read("best")
        at = self.folder / "best.json"
        metrics = _metrics(document.get("metrics"), at)
        epoch, data, answers = _count(document, "epoch", at), _data(document, at), _answers(document, at)
        return Best(_config(document, at), epoch, metrics, weights, data, answers)

    def best_epoch(self) -> int | None:
        """The epoch that `best` is of, from its JSON alone; None where there is none, or none that can be read."""
        try:
            return _count(self._document("best"), "epoch", self.folder / "best.json")
        except (CheckpointError, OSError):
            return None

    def adopt(self, earlier: Path | str) -> str:
        """Copy an earlier attempt's checkpoints in here, to go on from, where this folder has none of its own.

        Returns "" or why something was left behind; a damaged one is, and the run starts over. Never raises for what
        it finds there; raises OSError where this folder cannot be written.
        """
        source = Checkpoints(earlier)
        left: list[str] = []
        for name in NAMES:
            if (self.folder / f"{name}.json").exists() or not (source.folder / f"{name}.json").exists():
                continue
            try:
                document, tensors = source._read(name)
            except (CheckpointError, OSError) as fault:
                left.append(str(fault))
            else:
                self._write(name, document, tensors)
        return "; ".join(left)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process of this machine from training in this folder. Raises CheckpointError if one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = "another run is training in it; wait for it or give this one a folder of its own"
                raise CheckpointError(f"{self.folder}: {what}") from None
            except OSError as fault:
                if fault.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
                    raise  # a network file system without locks is used as it is
            yield
        finally:
            os.close(handle)

    def _write(self, name: Name, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        final, previous = self.folder / f"{name}.safetensors", self.folder / f"{name}.previous.safetensors"
        envelope = {
            "whetstone": "checkpoint",
            "version": VERSION,
            "name": name,
            "weights": final.name,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        body = {key: value for key, value in document.items() if key not in envelope}
        text = json.dumps({**envelope, **body}, allow_nan=False, indent=1)
        _durable(self.folder / f".{name}.safetensors.tmp", weights)
        _durable(self.folder / f".{name}.json.tmp", text.encode())
        # The old JSON's weights stay findable until the new JSON is in place. An interrupted write may have left
        # `final` uncommitted and `previous` committed: then `previous` must not be replaced.
        if final.exists() and not (previous.exists() and self._committed(name) == _sha256(previous)):
            os.replace(final, previous)
        os.replace(self.folder / f".{name}.safetensors.tmp", final)
        _sync(self.folder)
        os.replace(self.folder / f".{name}.json.tmp", self.folder / f"{name}.json")
        _sync(self.folder)
        previous.unlink(missing_ok=True)

    def _committed(self, name: Name) -> str | None:
        try:
            return str(self._document(name)["sha256"])
        except (CheckpointError, OSError):
            return None

    def _document(self, name: Name) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        document = _json(path)
        if document.get("whetstone") != "checkpoint":
            raise _damaged(path, "it is no checkpoint of Whetstone's")
        if document.get("version") != VERSION:
            raise CheckpointError(f"{path} is of another version; this Whetstone reads version {VERSION}")
        if document.get("name") != name or document.get("weights") != f"{name}.safetensors":
            raise _damaged(path, f"it does not name {name}.safetensors as its weights")
        digest = document.get("sha256")
        if not isinstance(digest, str) or len(digest) != 64:
            raise _damaged(path, "it holds no SHA-256 of its weights")
        return document

    def _read(self, name: Name) -> tuple[dict[str, Any], dict[str, Tensor]]:
        document = self._document(name)
        final = self.folder / f"{name}.safetensors"
        for path in (final, self.folder / f"{name}.previous.safetensors"):
            if (data := _bytes(path)) is not None and hashlib.sha256(data).hexdigest() == document["sha256"]:
                try:
                    return document, safetensors.torch.load(data)
                except (safetensors.SafetensorError, ValueError, KeyError) as fault:
                    raise _damaged(path, f"it is no safetensors file ({fault})") from fault
        if not final.exists():
            raise _damaged(final, f"it is missing, though {name}.json names it")
        raise _damaged(final, f"its SHA-256 is not the one in {name}.json")


def open_checkpoint(path: Path | str) -> Best | State:
    """What a person names: a folder (its best, else its last), or one of a checkpoint's two files. CheckpointError."""
    path = Path(path)
    if path.is_dir():
        store = Checkpoints(path)
        if (path / "best.json").exists():
            return store.read_best()
        if (path / "last.json").exists():
            return store.read_last()
        raise CheckpointError(f"{path} holds no checkpoint: neither best.json nor last.json")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a folder with best.json, or that file")
    if path.suffix not in (".json", ".safetensors") or path.stem not in NAMES:
        raise CheckpointError(
            f"{path} is no checkpoint; expected best.json, best.safetensors, last.json, or their folder"
        )
    store = Checkpoints(path.parent)
    return store.read_best() if path.stem == "best" else store.read_last()


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or incomplete: {what}")


def _json(path: Path) -> dict[str, Any]:
    data = _bytes(path, _LARGEST_JSON)
    if data is None:
        raise CheckpointError(f"{path} does not exist")
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise _damaged(path, "it is not whole JSON") from fault
    if not isinstance(document, dict):
        raise _damaged(path, "it is no JSON object")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _bytes(path: Path, limit: int | None = None) -> bytes | None:
    """The file's content, None if there is none. Links are not followed: a checkpoint's files are its folder's own."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as fault:
        if fault.errno == errno.ELOOP:
            raise _damaged(path, "it is a symbolic link") from fault
        raise CheckpointError(f"{path} cannot be read: {fault.strerror}") from fault
    with os.fdopen(handle, "rb") as file:
        try:
            if limit is not None and os.fstat(file.fileno()).st_size > limit:
                raise _damaged(path, "it is far too large")
            return file.read()
        except OSError as fault:
            raise CheckpointError(f"{path} cannot be read: {fault.strerror}") from fault


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _durable(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in this folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _config(document: Mapping[str, Any], path: Path) -> TrainConfig:
    recipe = document.get("config")
    if not isinstance(recipe, dict) or set(recipe) != {"params", "settings", "seed"}:
        raise _damaged(path, "its config must hold params, settings and seed")
    try:
        return config(**recipe)
    except Refused as fault:
        raise _damaged(path, f"its config has faults: {fault}") from fault


def _data(document: Mapping[str, Any], path: Path) -> str:
    name = document.get("data", "")
    if not isinstance(name, str):
        raise _damaged(path, "data is no name")
    return name


def _text(answers: bytes | None) -> str | None:
    return None if answers is None else base64.b64encode(answers).decode()


def _answers(document: Mapping[str, Any], path: Path) -> bytes | None:
    text = document.get("answers")
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as fault:
        raise _damaged(path, "answers are not base64") from fault


def _count(document: Mapping[str, Any], key: str, path: Path) -> int:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise _damaged(path, f"{key} is no count")
    return value


def _real(document: Mapping[str, Any], key: str, path: Path) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise _damaged(path, f"{key} is no number")
    return float(value)


def _metrics(metrics: Any, path: Path) -> dict[str, float]:
    if not isinstance(metrics, dict):
        raise _damaged(path, "metrics are no object")
    return {key: _real(metrics, key, path) for key in metrics}
