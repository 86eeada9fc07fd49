"""Updates as one CUDA graph: the kernels of a whole update are recorded once and launched together ever after.

Promise: the same updates as `Updates` makes, from the same batches. Each batch, decided on the CPU, is laid into the
same memory of the device and the graph replayed: gather, distort, embed, compare, differentiate, step. The schedules
write eta and mu into scalars there (`model.optim`), so one graph serves all epochs. What the rehearsal before the
recording changes is put back. Where an update cannot be recorded it is made kernel by kernel, and a line says why:
units dropped at random are drawn on the CPU in mid-update, and a batch in pieces may be interrupted between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.drawings import Drawings
from model.evaluate import never
from model.net import SiameseNet
from model.spec import TrainConfig
from model.step import Slots, Updates, pieces

log = logging.getLogger(__name__)

Replay = Callable[[], None]
Record = Callable[[Callable[[], None], Sequence[Tensor]], Replay]
"""From an update and the tensors that it changes beside its own: what makes the update again, on what its input holds
then. Recording changes nothing."""

_REHEARSALS = 3
"""Before the recording, as PyTorch's notes on CUDA graphs ask: libraries choose their algorithms in them."""


def updates(
    net: SiameseNet,
    optim: torch.optim.Optimizer,
    drawings: Drawings,
    config: TrainConfig,
    stream: Callable[[str], torch.Generator],
    *,
    bf16: bool,
) -> Updates:
    """The fastest updates that the device allows. Raises DataError as `Updates` does."""
    kind: Callable[..., Updates] = Updates
    if drawings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one shape: what is fastest for it is looked up once
        if not (why := obstacle(config, drawings.device)):
            kind = Captured
        else:
            log.info("no CUDA graph: %s", why)
    return kind(net, optim, drawings, config, stream, bf16=bf16)


def obstacle(config: TrainConfig, device: torch.device) -> str:
    """Why updates by this recipe cannot be recorded on the device, or ""."""
    if config.net.dropout:
        return "dropout is drawn on the CPU in mid-update"
    if (count := pieces(config, device, bf16=True)) > 1:
        return f"a batch is worked off in {count} pieces"
    return ""


class Captured(Updates):
    """Makes the updates of one run by replaying what `record` made of the first."""

    def __init__(self, *args: Any, record: Record | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self._record = record or on_cuda
        self._slots: Slots | None = None
        self._replay: Replay | None = None
        self.refused = False
        self._total = torch.zeros((), dtype=torch.float64, device=self.device)

    def make(self, step: int, interrupt: Callable[[], bool]) -> Tensor:
        if self.refused:
            return super().make(step, interrupt)
        batch = self._draw(step)
        if self._replay is None and not self._recorded(batch):
            total = self._differentiate(self._placed(batch), never)
            self.optim.step()
            return total
        assert self._slots is not None
        assert self._replay is not None
        self._slots.fill(batch)
        self._replay()
        return self._total

    def _recorded(self, batch: Batch) -> bool:
        """Record the update on this batch, or give that up for good."""
        remembered = [value for state in self.optim.state.values() for value in state.values()]
        changed = [*self.net.parameters(), *self.net.buffers(), *remembered]
        try:
            self._slots = Slots(batch, self.device)
            self._slots.fill(batch)
            self._replay = self._record(self._update, changed)
        except RuntimeError as fault:  # a lack of memory too: what the update needs by itself may be there
            lines = str(fault).splitlines() or [type(fault).__name__]
            log.warning("no CUDA graph, so updates are slower: %s", lines[0][:300])
            self._slots, self.refused = None, True
        if self.refused:  # outside of the handler: the fault holds the frames, and they the memory
            self.optim.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return not self.refused

    def _update(self) -> None:
        """The whole update on what the slots hold; its loss goes to `_total`."""
        assert self._slots is not None
        total = self._differentiate(self._slots.batch, never)
        self.optim.step()
        self._total.copy_(total)


def on_cuda(update: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
    """Record `update` as a CUDA graph. Raises RuntimeError where that is not possible."""
    device = changed[0].device
    # The stream is set here although it is the current one: a recording that fails leaves its own behind.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            rehearse(update, changed)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads of the process do with CUDA meanwhile does not spoil it.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            update()
    replay: Replay = graph.replay
    return replay


def rehearse(update: Callable[[], None], changed: Sequence[Tensor]) -> None:
    """Make the update a few times, and leave no trace of it in `changed`, nor gradients."""
    before = [tensor.detach().clone() for tensor in changed]
    try:
        for _ in range(_REHEARSALS):
            update()
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
                tensor.grad = None
