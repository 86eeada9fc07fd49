"""From a lease to a trained Siamese network: recipe, data, the checkpoint of an earlier attempt, `model.train.fit`.

Whatever happens in a trial comes back as one `Ended`: an exception with its traceback, memory that ran out as
infeasible at the level of chance. Only what is the machine's fault and not the trial's (its data is missing, its disk
is full) is raised, as `MachineUnfit`, because the next trial would meet it too; a folder of images that is there and
cannot be trained on, or data too small for what the study asks of it, is the study's fault. Data stays loaded between
trials; of a trial itself nothing stays in memory.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hpo.protocol import EpochReport, Lease, Verdict
from model.checkpoint import Best, CheckpointError, Checkpoints, State
from model.dataset import load
from model.drawings import DataError, Dataset
from model.memory import out_of_memory
from model.settings import HYPERPARAMETERS
from model.spec import TrainConfig, config
from model.train import Signal, fit
from workers.artifacts import Place, UnsafeName
from workers.device import Device, DeviceUnusable, probe

log = logging.getLogger("whetstone.worker")

KEPT_DATASETS = 2
_SIGNALS = {
    Verdict.GO_ON: Signal.GO_ON,
    Verdict.PRUNE: Signal.PRUNE,
    Verdict.STOP: Signal.STOP,
    Verdict.LOST: Signal.STOP,
}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What is the disk's fault, and would meet every other trial too."""


class MachineUnfit(Exception):
    """This machine cannot train: the trial goes back as it was, and the worker ends."""


@dataclass(frozen=True)
class Ended:
    """How training ended. `value` is the best accuracy in [0, 1]; of an infeasible trial the level of chance."""

    outcome: Literal["complete", "infeasible", "pruned", "failed", "stopped"]
    value: float | None = None
    best_epoch: int | None = None
    reason: str = ""
    traceback: str = ""
    poisoned: bool = False
    """The device or its CUDA context is beyond repair: every later call in this process would fail."""
    tasks: int = 0
    answers: bytes | None = None
    """Which of the validation tasks the best epoch answered rightly, one bit a task."""


class Siamese:
    """Trains leases of the workload "siamese" on one device, one after another."""

    def __init__(self, device: Device, *, data_root: Path | None, home: Path) -> None:
        self._device = device
        self._data_root = data_root
        self._home = home
        self._datasets: OrderedDict[tuple[tuple[str, Any], ...], Dataset] = OrderedDict()

    def train(
        self,
        lease: Lease,
        place: Place,
        report: Callable[[EpochReport], Verdict],
        interrupt: Callable[[], bool],
    ) -> Ended:
        """Train one lease to its end. `interrupt` is asked every step and also tells that a step was made.

        Raises `MachineUnfit`; every other fault is in the answer.
        """
        way = 20
        try:
            recipe = config(lease.params, lease.settings, lease.seed)
            way = recipe.way
            return self._fit(recipe, lease, place, report, interrupt)
        except MachineUnfit:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise MachineUnfit(f"checkpoints cannot be written to {place.path}: {error.strerror}") from error
            if out_of_memory(error):
                reason = f"out of memory on {self._device.name}: {first_line(error)}"
                return Ended("infeasible", 1.0 / way, reason=reason, poisoned=self._poisoned())
            return Ended(
                "failed",
                reason=f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
                poisoned=self._poisoned(),
            )
        finally:
            gc.collect()  # a run that broke off refers to itself: without this its network stays beside the next one
            if self._device.name != "cpu":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

    def _fit(
        self,
        recipe: TrainConfig,
        lease: Lease,
        place: Place,
        report: Callable[[EpochReport], Verdict],
        interrupt: Callable[[], bool],
    ) -> Ended:
        data = self._agreed(lease, place, recipe.wanted)
        store = _Kept(place)

        def on_epoch(epoch: int, metrics: Mapping[str, float]) -> Signal:
            finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
            return _SIGNALS[report(EpochReport(epoch=epoch, value=finite.get("accuracy"), metrics=finite))]

        if lease.resume is not None:
            self._resume(lease, lease.resume, place, store)
            # A worker that was killed may have saved epochs whose reports were still on their way.
            known = -1 if lease.last_epoch is None else lease.last_epoch
            for epoch, metrics in enumerate(store.measured):
                if epoch > known:
                    on_epoch(epoch, metrics)

        try:
            result = fit(recipe, data, on_epoch, device=self._device.name, store=store, interrupt=interrupt)
        except DataError as error:
            if set(lease.params) <= set(HYPERPARAMETERS):
                raise
            # The point sweeps more than rates, the characters of a batch say: another one may get by with the data.
            return Ended("infeasible", 1.0 / recipe.way, reason=str(error))
        value = result.value
        if result.outcome == "infeasible":
            value = 1.0 / recipe.way
        return Ended(
            result.outcome,
            value,
            result.best_epoch,
            result.reason,
            poisoned=result.reason.startswith("out of memory") and self._poisoned(),
            tasks=result.tasks,
            answers=result.answers,
        )

    def _agreed(self, lease: Lease, place: Place, wanted: dict[str, Any]) -> Dataset:
        """The data set of this study. Where it leaves the choice open, the one that its first trial had: values of
        trials on different ones do not compare, so a worker that has not got it leaves (MachineUnfit).
        """
        data = self._dataset(wanted)
        if wanted["source"] != "auto":
            return data
        note = f"studies/{lease.study}/data.json"
        chosen = place.agree(note, data.name)
        if chosen == data.name or chosen not in ("omniglot", "strokes"):
            return data
        log.warning("study %r began on %s (%s): so does this trial", lease.study_name, chosen, note)
        return self._dataset(wanted | {"source": chosen})

    def _dataset(self, wanted: dict[str, Any]) -> Dataset:
        """The data set on our device; the last few stay loaded, unless one more takes their memory."""
        key = tuple(wanted.items())
        if key not in self._datasets:
            while len(self._datasets) >= KEPT_DATASETS:
                self._datasets.popitem(last=False)
            found: Dataset | None = None
            try:
                found = self._load(wanted)
            except Exception as error:
                if not self._datasets or not out_of_memory(error):
                    raise
            if found is None:  # beyond the handler, whose exception holds what was loaded so far
                self._datasets.clear()
                found = self._load(wanted)
            self._datasets[key] = found
        self._datasets.move_to_end(key)
        return self._datasets[key]

    def _load(self, wanted: dict[str, Any]) -> Dataset:
        try:
            found = load(**wanted, data_root=self._data_root, home=self._home, notify=log.warning)
        except DataError as error:
            root = self._data_root
            if wanted["source"] == "folder" and root is not None and (root / wanted["folder"]).is_dir():
                raise  # its images are at fault, and would be on any machine
            raise MachineUnfit(str(error)) from error
        return found.to(self._device.name)

    def _resume(self, lease: Lease, name: str, place: Place, store: _Kept) -> None:
        """Bring the earlier attempt's checkpoints here; what is missing or damaged is left out, and that is said."""
        try:
            earlier = place.fetch(name)
            fault = store.adopt(earlier) if earlier is not None else "there is none"
            if store.announce():
                log.info("trial %d: resuming from the checkpoint of an earlier attempt", lease.trial)
                if not fault:
                    return
        except UnsafeName as error:
            fault = str(error)
        except OSError as error:
            if error.errno in _DISK:
                raise
            fault = first_line(error)
        log.warning(
            "trial %d: %s; what could not be resumed begins anew", lease.trial, fault or "no checkpoint to resume"
        )

    def _poisoned(self) -> bool:
        """Whether the device has stopped working for this process, as it does after most CUDA errors."""
        if self._device.name == "cpu":
            return False
        try:
            probe(self._device)
        except DeviceUnusable:
            return True
        return False


class _Kept(Checkpoints):
    """Checkpoints in an attempt's place, which learns of each."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.path)
        self._place = place
        self.measured: tuple[Mapping[str, float], ...] = ()
        """The metrics of the epochs that an adopted checkpoint holds."""

    def save_last(self, state: State) -> None:
        super().save_last(state)
        self._place.saved("last", state.epoch)

    def save_best(self, best: Best) -> None:
        super().save_best(best)
        self._place.saved("best", best.epoch)

    def announce(self) -> bool:
        """Say that adopted checkpoints are here; False where there is none to go on from."""
        if (best := self.best_epoch()) is not None:
            self._place.saved("best", best)
        try:
            last = self.read_last()
        except CheckpointError:
            return False
        self._place.saved("last", last.epoch)
        self.measured = last.history
        return True


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
