"""Training one Siamese network: `fit(config, data, report) -> FitResult`.

Promise: on a CPU the same config, data and number of threads give the same result bit for bit, and so does a run
interrupted at any step and resumed from its checkpoint, reporting each epoch once; a GPU adds in an order of its own,
so there the last digits differ. All randomness of training comes from one generator on the CPU, saved with the weights,
whatever the device; validation tasks depend on `validation_seed` alone. The run never learns who listens to its
reports. Koch et al. 2015, section 3.2; epochs count from 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from model import capture, evaluate, optim
from model.average import Average
from model.checkpoint import Best, Checkpoints, State
from model.drawings import DataError, Dataset, rotated
from model.episode import draw
from model.evaluate import never
from model.health import EVERY, PROBE_PAIRS, Health
from model.init import initialise
from model.memory import out_of_memory
from model.net import SiameseNet
from model.pairs import PairSampler
from model.precision import wants_bf16
from model.recipe import load_recipe
from model.spec import TrainConfig
from model.step import Interrupted
from model.transfer import transfer

__all__ = ["FitResult", "Report", "Signal", "fit", "load_recipe"]

log = logging.getLogger(__name__)
Outcome = Literal["complete", "infeasible", "pruned", "stopped"]

_WRITING_SHARE = 20
"""Between two checkpoints at least this many times what writing the last one took."""
_FREE_TO_CHANGE = frozenset({"epochs", "patience", "max_seconds", "checkpoint_every_s", "precision"})
"""Settings in which a checkpoint may differ from the run that goes on from it."""


class Signal(StrEnum):
    """The listener's answer to a report."""

    GO_ON = "go_on"
    PRUNE = "prune"
    STOP = "stop"


Report = Callable[[int, dict[str, float]], Signal | None]
Progress = Callable[[int, int], None]


def _unseen(epoch: int, step: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    complete: trained to its end, `value` the highest validation accuracy of any epoch. infeasible: dead, or out of
    memory. pruned: told so. stopped: interrupted or told so, and can be resumed. `value` and `best_epoch` are None
    before the first epoch is measured; `epochs` counts those measured; `seconds` is the run's time, all attempts.
    `answers` says of each of the `tasks` validation tasks whether the best epoch was right: bits, the first task in the
    highest bit of the first byte (numpy.packbits); None where that is not known.
    """

    outcome: Outcome
    value: float | None
    best_epoch: int | None
    epochs: int
    reason: str
    seconds: float
    warnings: tuple[str, ...] = ()
    answers: bytes | None = None
    tasks: int = 0


def fit(
    config: TrainConfig,
    data: Dataset,
    report: Report,
    *,
    device: str | torch.device = "cpu",
    store: Checkpoints | None = None,
    interrupt: Callable[[], bool] = never,
    progress: Progress = _unseen,
) -> FitResult:
    """Train to the end of `config`, or until `report` or `interrupt` says otherwise, resuming from `store` if it can.

    `report` gets each epoch's number and its metrics: accuracy (the objective, on all validation tasks), accuracy_320
    (on the paper's number of them), loss (the mean over the epoch; cross-entropy in nats), pairs_per_s (two images are
    a pair), seconds. `interrupt` is asked at least once a step and `progress` told after each, with the epoch and its
    steps so far: both must be cheap. Raises DataError where `data` cannot give the pairs or tasks, ValueError for
    images of another size or colour, CheckpointError where another run trains in the same folder or the convolutions to
    transfer are of another shape, OSError where a checkpoint cannot be written.
    """
    if data.size != config.net.input:
        raise ValueError(f"the network sees {config.net.input} pixels a side, the data set has {data.size}")
    if data.channels != config.net.channels:
        raise ValueError(f"the network sees {config.net.channels} channels, the data set has {data.channels}")
    with store.locked() if store else contextlib.nullcontext():
        run: _Run | None = None
        began = time.monotonic()
        try:
            run = _Run(config, data, report, torch.device(device), store, interrupt, progress)
            run.resume()
            return run.train()
        except _End as end:
            assert run is not None
            return run.result(end.outcome, end.reason)
        except (MemoryError, RuntimeError) as fault:
            if not out_of_memory(fault):
                raise
            reason = f"out of memory on {device}: {str(fault).splitlines()[0][:300]}"
            if run is None:
                return FitResult("infeasible", None, None, 0, reason, time.monotonic() - began)
            return run.result("infeasible", reason)


class _End(Exception):
    """A run ends before its time."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class _Run:
    """One run and where it stands: at `step` of `epoch`, both those that come next."""

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        report: Report,
        device: torch.device,
        store: Checkpoints | None,
        interrupt: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self.config, self.report, self.device, self.store, self.interrupt = config, report, device, store, interrupt
        self.progress = progress
        self.data = data.to(device)
        drawings = rotated(self.data.train) if config.rotations else self.data.train
        if config.loss == "classes" and config.net.classes != len(drawings.characters):
            have = len(drawings.characters)
            raise DataError(
                f"classes is {config.net.classes}, and there are {have} training characters: set it to {have}"
            )
        self.tasks = draw(
            data.validation, config.validation_tasks, config.way, config.validation_seed, shot=config.shot
        )
        self.bf16 = wants_bf16(config.precision, device)
        self.net = SiameseNet(config.net)
        initialise(self.net, config.init, self.stream("weights"))
        self.net.on(device)
        self.average = Average(self.net, config.average)
        self.optim = optim.optimizer(self.net, config)
        self.updates = capture.updates(self.net, self.optim, drawings, config, self.stream, bf16=self.bf16)
        probe = PairSampler(drawings, PROBE_PAIRS, config.same_alphabet)
        first, second, _ = probe.draw(self.stream("probe"))
        self.health = Health(drawings.flat[torch.cat([first, second])])
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.epoch, self.step = 0, 0
        self.best_epoch: int | None = None
        self.best_value: float | None = None
        self.history: list[Mapping[str, float]] = []
        self.warnings: list[str] = []
        self.earlier_seconds, self.epoch_seconds = 0.0, 0.0
        self.began = self.saved_at = time.monotonic()
        self.writing_took = 0.0
        self.answers: bytes | None = None

    def stream(self, purpose: str) -> torch.Generator:
        """A CPU generator of its own for one purpose. Hashed, for torch's takes only the lower 32 bits of a seed."""
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.began

    def train(self) -> FitResult:
        """Epoch after epoch, until one of the reasons to end."""
        while not (reason := self._finished()):
            self._train_epoch()
            self._measure()
        self._save()
        return self.result("complete", reason)

    def result(self, outcome: Outcome, reason: str) -> FitResult:
        return FitResult(
            outcome,
            self.best_value,
            self.best_epoch,
            len(self.history),
            reason,
            self.seconds,
            warnings=tuple(self.warnings),
            answers=self.answers,
            tasks=len(self.tasks),
        )

    def _finished(self) -> str:
        """Why no further epoch is begun, or "". Never in mid-epoch: a resumed run decides as an unbroken one."""
        if self.step:
            return ""
        if self.epoch >= self.config.epochs:
            return f"all {self.epoch} epochs are done"
        if self.best_epoch is not None and self.config.patience is not None:
            since = self.epoch - 1 - self.best_epoch
            if since >= self.config.patience:
                return f"no better for {since} epochs"
        if self.epoch and self._out_of_time():
            return f"max_seconds ({self.config.max_seconds:g}) are over"
        return ""

    def _out_of_time(self) -> bool:
        return self.config.max_seconds is not None and self.seconds >= self.config.max_seconds

    def _train_epoch(self) -> None:
        optim.schedule(self.optim, self.config, self.epoch)
        earlier, began = self.epoch_seconds, time.monotonic()
        while self.step < self.config.steps_per_epoch and not (self.step and self._out_of_time()):
            if self.interrupt():
                self._stop("interrupted")
            total = self.epoch * self.config.steps_per_epoch + self.step
            try:
                self.loss_sum += self.updates.make(total, self.interrupt)
            except Interrupted:
                self._stop("interrupted")
            self.average.follow(total)
            self.step += 1
            self.progress(self.epoch, self.step)
            total += 1
            if total % EVERY == 0 and (dead := self.health.check(self.net, self.loss_sum, total)):
                raise _End("infeasible", dead)
            self.epoch_seconds = earlier + time.monotonic() - began
            self._save_if_due()
        total = self.epoch * self.config.steps_per_epoch + self.step
        if dead := self.health.finite(self.net, self.loss_sum, total):  # before it can be anybody's best epoch
            raise _End("infeasible", dead)
        self.epoch_seconds = earlier + time.monotonic() - began

    def _measure(self) -> None:
        """Evaluate the epoch just trained, keep it if it is the best, and report it."""
        try:
            right = evaluate.answer(
                self.average.net, self.data.validation, self.tasks, bf16=self.bf16, interrupt=self.interrupt
            )
        except evaluate.Interrupted:
            self._stop("interrupted")
        metrics = {
            "accuracy": right.double().mean().item(),
            "accuracy_320": _spread(right, evaluate.PAPER_TASKS).double().mean().item(),
            "loss": self.loss_sum.item() / self.step,
            "pairs_per_s": self.step * self.config.pairs_per_batch / max(self.epoch_seconds, 1e-9),
            "seconds": self.seconds,
        }
        epoch = self.epoch
        if self.best_value is None or metrics["accuracy"] > self.best_value:
            self.best_epoch, self.best_value = epoch, metrics["accuracy"]
            self.answers = np.packbits(right.numpy()).tobytes()
            if self.store:
                weights = self.average.net.state_dict()
                self.store.save_best(Best(self.config, epoch, metrics, weights, self.data.name, self.answers))
        self.history.append(metrics)
        self.epoch, self.step, self.epoch_seconds = epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        signal = self.report(epoch, dict(metrics))
        if signal is Signal.STOP:
            self._stop("told to stop")
        if signal is Signal.PRUNE:
            self._save()
            raise _End("pruned", f"pruned after epoch {epoch}")
        self._save_if_due()

    def _stop(self, reason: str) -> NoReturn:
        self._save()
        raise _End("stopped", reason)

    def _save_if_due(self) -> None:
        every = self.config.checkpoint_every_s
        if every == 0 or time.monotonic() - self.saved_at >= max(every, _WRITING_SHARE * self.writing_took):
            self._save()

    def _save(self) -> None:
        if self.store is None:
            return
        began = time.monotonic()
        tensors: dict[str, Tensor] = {
            "generator": self.updates.generator.get_state(),
            "loss_sum": self.loss_sum,
            **{f"net.{name}": tensor for name, tensor in self.net.state_dict().items()},
            **self.average.memory(),
            **optim.memory(self.optim, self.net, self.config),
        }
        self.store.save_last(
            State(
                config=self.config,
                epoch=self.epoch,
                step=self.step,
                seconds=self.seconds,
                epoch_seconds=self.epoch_seconds,
                best_epoch=self.best_epoch,
                best_value=self.best_value,
                tied_at=self.health.tied_at,
                history=tuple(self.history),
                tensors=tensors,
                data=self.data.name,
                answers=self.answers,
            )
        )
        self.saved_at = time.monotonic()
        self.writing_took = self.saved_at - began

    def resume(self) -> None:
        """Go on from the store's last checkpoint, or begin, with a warning where there is one that cannot be used."""
        state, warning = self.store.load_last() if self.store else (None, "")
        if state is not None:
            warning = self._mismatch(state)
        if warning:
            self._warn(warning)
        if state is None or warning:
            if self.config.transfer is not None:
                transfer(self.config.transfer, self.net)
                self.average = Average(self.net, self.config.average)
            return
        self.net.load_state_dict(_under("net.", state.tensors))
        self.average.remember(_under("average.", state.tensors))
        optim.remember(self.optim, self.net, self.config, state.tensors)
        self.updates.generator.set_state(state.tensors["generator"])
        self.loss_sum.copy_(state.tensors["loss_sum"])
        self.epoch, self.step = state.epoch, state.step
        self.best_epoch, self.best_value = state.best_epoch, state.best_value
        self.health.tied_at = state.tied_at
        self.history, self.answers = list(state.history), state.answers
        self.earlier_seconds, self.epoch_seconds = state.seconds, state.epoch_seconds
        if self.best_epoch is not None and self.store and self.store.best_epoch() is None:
            self._warn(f"the weights of the best epoch so far ({self.best_epoch}) are lost; a later best will be kept")

    def _mismatch(self, state: State) -> str:
        """Why a state that was read cannot be this run's, or ""."""
        other = essence(state.config)
        if other != essence(self.config):
            return "starting over, for the checkpoint is of another run: its hyperparameters, settings or seed differ"
        if state.data not in ("", self.data.name):
            return f"starting over, for the checkpoint was trained on {state.data} and this run has {self.data.name}"
        want = {"generator": self.updates.generator.get_state(), "loss_sum": self.loss_sum}
        want |= {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        want |= self.average.memory()
        remembered = optim.shapes(self.net, self.config)
        extra = set(state.tensors) - set(want) - set(remembered)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in want.items()}
        shapes |= {name: (shape, torch.float32) for name, shape in remembered.items() if name in state.tensors}
        for name, wanted in shapes.items():
            saved = state.tensors.get(name)
            if saved is None or (saved.shape, saved.dtype) != wanted:
                return f"starting over, for the checkpoint's tensor {name} is missing or of another shape"
        if extra or state.step > self.config.steps_per_epoch or state.epoch != len(state.history):
            return "starting over, for the checkpoint contradicts itself"
        return ""

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        log.warning("%s", warning)


def essence(config: TrainConfig) -> dict[str, Any]:
    """What makes a run that run: its recipe without what may change between two starts of it."""
    document = config.document()
    free = _FREE_TO_CHANGE if config.schedule != "cosine" else _FREE_TO_CHANGE - {"epochs"}  # a cosine's rates need it
    document["settings"] = {k: v for k, v in document["settings"].items() if k not in free}
    return document


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _spread(right: Tensor, count: int) -> Tensor:
    """`count` of the answers, evenly over all tasks; all of them where there are fewer."""
    return right if len(right) <= count else right[torch.arange(count) * len(right) // count]
