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
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from model import evaluate
from model.checkpoint import Best, Checkpoints, State
from model.distortion import clean, distort
from model.drawings import Dataset
from model.episode import draw
from model.evaluate import never
from model.health import EVERY, PROBE_PAIRS, Health
from model.init import initialise
from model.net import SiameseNet
from model.optim import optimizer, schedule
from model.pairs import PairSampler
from model.precision import autocast, wants_bf16
from model.recipe import load_recipe
from model.spec import TrainConfig

__all__ = ["FitResult", "Report", "Signal", "fit", "load_recipe"]

log = logging.getLogger(__name__)
Outcome = Literal["complete", "infeasible", "pruned", "stopped"]

_PIECE_FLOPS = {"cpu": 1.5e11, "cuda": 5e13}
"""A batch is worked off in pieces of at most this much, so that an interrupt waits seconds on a slow core, and a large
batch of large images fits into memory."""
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


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    complete: trained to its end, `value` the highest validation accuracy of any epoch. infeasible: dead, or out of
    memory. pruned: told so. stopped: interrupted or told so, and can be resumed. `value` and `best_epoch` are None
    before the first epoch is measured; `epochs` counts those measured; `seconds` is the run's time, all attempts.
    """

    outcome: Outcome
    value: float | None
    best_epoch: int | None
    epochs: int
    reason: str
    seconds: float
    warnings: tuple[str, ...] = ()


def fit(
    config: TrainConfig,
    data: Dataset,
    report: Report,
    *,
    device: str | torch.device = "cpu",
    store: Checkpoints | None = None,
    interrupt: Callable[[], bool] = never,
) -> FitResult:
    """Train to the end of `config`, or until `report` or `interrupt` says otherwise, resuming from `store` if it can.

    `report` gets each epoch's number and its metrics: accuracy (the objective, on all validation tasks), accuracy_320
    (on the paper's number of them), loss (mean cross-entropy in nats), pairs_per_s, seconds. `interrupt` is asked at
    least once a step and must be cheap. Raises DataError where `data` cannot give the pairs or tasks, ValueError for
    images of another size, CheckpointError where another run trains in the same folder, OSError where a checkpoint
    cannot be written.
    """
    if data.size != config.net.input:
        raise ValueError(f"the network sees {config.net.input} pixels a side, the data set has {data.size}")
    with store.locked() if store else contextlib.nullcontext():
        run: _Run | None = None
        began = time.monotonic()
        try:
            run = _Run(config, data, report, torch.device(device), store, interrupt)
            run.resume()
            return run.train()
        except _End as end:
            assert run is not None
            return run.result(end.outcome, end.reason)
        except (MemoryError, RuntimeError) as fault:
            if not _out_of_memory(fault):
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
    ) -> None:
        self.config, self.report, self.device, self.store, self.interrupt = config, report, device, store, interrupt
        self.data = data.to(device)
        self.tasks = draw(data.validation, config.validation_tasks, config.way, config.validation_seed)
        self.sampler = PairSampler(self.data.train, config.batch_pairs, config.same_alphabet)
        self.bf16 = wants_bf16(config.precision, device)
        self.net = SiameseNet(config.net)
        initialise(self.net, config.init, _stream(config.seed, "weights"))
        self.net.on(device)
        self.sgd = optimizer(self.net, config)
        self.generator = _stream(config.seed, "training")
        probe = PairSampler(self.data.train, PROBE_PAIRS, config.same_alphabet)
        first, second, _ = probe.draw(_stream(config.seed, "probe"))
        self.health = Health(self.data.train.flat[torch.cat([first, second])])
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.epoch, self.step = 0, 0
        self.best_epoch: int | None = None
        self.best_value: float | None = None
        self.history: list[Mapping[str, float]] = []
        self.warnings: list[str] = []
        self.earlier_seconds, self.epoch_seconds = 0.0, 0.0
        self.began = self.saved_at = time.monotonic()
        self.writing_took = 0.0
        work = 6 * config.net.flops * config.batch_pairs  # two images a pair, and backward twice as dear as forward
        self.pieces = min(config.batch_pairs, math.ceil(work / _PIECE_FLOPS.get(device.type, math.inf)))

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
        epochs = len(self.history)
        return FitResult(
            outcome, self.best_value, self.best_epoch, epochs, reason, self.seconds, warnings=tuple(self.warnings)
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
        schedule(self.sgd, self.config, self.epoch)
        earlier, began = self.epoch_seconds, time.monotonic()
        while self.step < self.config.steps_per_epoch and not (self.step and self._out_of_time()):
            if self.interrupt():
                self._stop("interrupted")
            self._train_step()
            self.step += 1
            total = self.epoch * self.config.steps_per_epoch + self.step
            if total % EVERY == 0 and (dead := self.health.check(self.net, self.loss_sum, total)):
                raise _End("infeasible", dead)
            self.epoch_seconds = earlier + time.monotonic() - began
            self._save_if_due()
        total = self.epoch * self.config.steps_per_epoch + self.step
        if dead := self.health.finite(self.net, self.loss_sum, total):  # before it can be anybody's best epoch
            raise _End("infeasible", dead)
        self.epoch_seconds = earlier + time.monotonic() - began

    def _train_step(self) -> None:
        """One update by the mean loss of a batch. Interrupted between two pieces, it leaves no trace."""
        before = self.generator.get_state() if self.pieces > 1 else None
        first, second, same = self.sampler.draw(self.generator)  # (B,), (B,), (B,)
        images = self.data.train.flat[torch.cat([first, second])]  # (2B, S, S) uint8
        pixels = distort(images, self.generator) if self.config.distort else clean(images)  # (2B, 1, S, S)
        self.sgd.zero_grad(set_to_none=True)
        pairs = self.config.batch_pairs
        total = torch.zeros_like(self.loss_sum)
        size = math.ceil(pairs / self.pieces)
        for begin in range(0, pairs, size):
            if begin and self.interrupt():
                assert before is not None
                self.generator.set_state(before)
                self._stop("interrupted")
            end = min(begin + size, pairs)
            part = torch.cat([pixels[begin:end], pixels[pairs + begin : pairs + end]]) if self.pieces > 1 else pixels
            with autocast(self.device, self.bf16):
                logits = self.net(part.contiguous(memory_format=torch.channels_last))  # (b,)
            loss = F.binary_cross_entropy_with_logits(logits, same[begin:end], reduction="sum") / pairs
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.sgd.step()
        self.loss_sum += total

    def _measure(self) -> None:
        """Evaluate the epoch just trained, keep it if it is the best, and report it."""
        try:
            right = evaluate.answer(
                self.net, self.data.validation, self.tasks, bf16=self.bf16, interrupt=self.interrupt
            )
        except evaluate.Interrupted:
            self._stop("interrupted")
        metrics = {
            "accuracy": right.double().mean().item(),
            "accuracy_320": _spread(right, evaluate.PAPER_TASKS).double().mean().item(),
            "loss": self.loss_sum.item() / self.step,
            "pairs_per_s": self.step * self.config.batch_pairs / max(self.epoch_seconds, 1e-9),
            "seconds": self.seconds,
        }
        epoch = self.epoch
        if self.best_value is None or metrics["accuracy"] > self.best_value:
            self.best_epoch, self.best_value = epoch, metrics["accuracy"]
            if self.store:
                self.store.save_best(Best(self.config, epoch, metrics, self.net.state_dict(), self.data.name))
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
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state(), "loss_sum": self.loss_sum}
        for name, parameter in self.net.named_parameters():
            tensors[f"net.{name}"] = parameter
            if (momentum := self.sgd.state[parameter].get("momentum_buffer")) is not None:
                tensors[f"momentum.{name}"] = momentum
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
            )
        )
        self.saved_at = time.monotonic()
        self.writing_took = self.saved_at - began

    def resume(self) -> None:
        """Go on from the store's last checkpoint, or begin, with a warning where there is one that cannot be used."""
        if self.store is None:
            return
        state, warning = self.store.load_last()
        if state is not None:
            warning = self._mismatch(state)
        if warning:
            self._warn(warning)
        if state is None or warning:
            return
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(state.tensors[f"net.{name}"])
                if (saved := state.tensors.get(f"momentum.{name}")) is not None:
                    self.sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(saved)
        self.generator.set_state(state.tensors["generator"])
        self.loss_sum.copy_(state.tensors["loss_sum"])
        self.epoch, self.step = state.epoch, state.step
        self.best_epoch, self.best_value = state.best_epoch, state.best_value
        self.health.tied_at = state.tied_at
        self.history = list(state.history)
        self.earlier_seconds, self.epoch_seconds = state.seconds, state.epoch_seconds
        if self.best_epoch is not None and self.store.best_epoch() is None:
            self._warn(f"the weights of the best epoch so far ({self.best_epoch}) are lost; a later best will be kept")

    def _mismatch(self, state: State) -> str:
        """Why a state that was read cannot be this run's, or ""."""
        other = essence(state.config)
        if other != essence(self.config):
            return "starting over, for the checkpoint is of another run: its hyperparameters, settings or seed differ"
        if state.data not in ("", self.data.name):
            return f"starting over, for the checkpoint was trained on {state.data} and this run has {self.data.name}"
        want: dict[str, Any] = {"generator": self.generator.get_state(), "loss_sum": self.loss_sum}
        want |= {f"net.{name}": parameter for name, parameter in self.net.named_parameters()}
        momenta = {f"momentum.{name}": parameter for name, parameter in self.net.named_parameters()}
        extra = set(state.tensors) - set(want) - set(momenta)
        want |= {name: parameter for name, parameter in momenta.items() if name in state.tensors}
        for name, tensor in want.items():
            saved = state.tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
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
    document["settings"] = {k: v for k, v in document["settings"].items() if k not in _FREE_TO_CHANGE}
    return document


def _stream(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for one purpose. Hashed, for torch's takes only the lower 32 bits of a seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _spread(right: Tensor, count: int) -> Tensor:
    """`count` of the answers, evenly over all tasks; all of them where there are fewer."""
    return right if len(right) <= count else right[torch.arange(count) * len(right) // count]


def _out_of_memory(fault: BaseException) -> bool:
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(fault)
    return "DefaultCPUAllocator" in text or "out of memory" in text
