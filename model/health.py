"""Is this run still alive? A dead one is ended early, with its reason, and told as infeasible.

Dead is: a loss or a weight that is not finite, or a network that answers the very same similarity to every pair of a
probe batch at two checks in a row, `EVERY` steps apart. Checks come every `EVERY` steps, so a death is found at most
2 * `EVERY` steps after its onset. A CUDA device is not waited for: what a check found there is looked at when the next
one comes, `EVERY` steps later, or at the epoch's end. A slow start is not dead: at loss 0.69 the answers of a network
differ in their last digits, and the probe is computed in fp32 so that they still do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.distortion import clean
from model.net import SiameseNet

EVERY = 100
"""Steps between two checks."""

PROBE_PAIRS = 32


class Health:
    """Watches one run. `probe` is uint8 (2P, S, S): the first images of P pairs, then their second ones.

    `later`: a check's findings are looked at when the next comes, as a rule on CUDA.
    """

    def __init__(self, probe: Tensor, *, later: bool | None = None) -> None:
        self.probe = probe
        self.later = probe.is_cuda if later is None else later
        self._tied_at: int | None = None
        self._pending: _Flags | None = None
        self._dead: str | None = None

    @property
    def tied_at(self) -> int | None:
        """The step of the last check if all similarities were equal there, else None.

        It belongs into a checkpoint, so that a resumed run dies at the same step. Asking waits for the device.
        """
        self._settle()
        return self._tied_at

    @tied_at.setter
    def tied_at(self, step: int | None) -> None:
        self._pending, self._dead, self._tied_at = None, None, step

    def check(self, net: SiameseNet, loss: Tensor, step: int) -> str | None:
        """At a step counted over the whole run: why the run is dead, or None. `loss` is the sum or mean since last."""
        if self.later and (dead := self._settle()):
            return dead
        with torch.no_grad():
            similarity = net(clean(self.probe).contiguous(memory_format=torch.channels_last))
            if net.config.head == "weighted":  # a probability; distances have no bounds
                similarity = similarity.sigmoid()
            # NaN compares unequal to everything, so it is asked for by itself.
            probed = [~(similarity == similarity[0]).all(), similarity.isfinite().all()]
        self._pending = _Flags.ask(net, loss, step, probed)
        return None if self.later else self._settle()

    def finite(self, net: SiameseNet, loss: Tensor, step: int) -> str | None:
        """At an epoch's end: what the last check found, and why the loss or a weight is not finite, or None."""
        return self._settle() or _Flags.ask(net, loss, step, []).fault()

    def _settle(self) -> str | None:
        """Look at what the last check found, if nobody has: why the run is dead, or None."""
        flags, self._pending = self._pending, None
        if flags is not None and not (dead := flags.fault()):
            before, self._tied_at = self._tied_at, None if flags.untied else flags.step
            if before is not None and not flags.untied:
                at = f"steps {before} and {flags.step}"
                dead = f"collapsed: all similarities of a probe batch were exactly equal at {at}"
        if flags is not None:
            self._dead = dead
        return self._dead


@dataclass
class _Flags:
    """What was asked of the device at one step; reading it waits for it."""

    step: int
    labels: list[str]
    """Of each weight or bias."""
    found: Tensor
    """bool: the loss finite, then each weight, then those of the probe, similarities untied and finite."""
    ready: torch.cuda.Event | None

    @classmethod
    def ask(cls, net: SiameseNet, loss: Tensor, step: int, probed: list[Tensor]) -> _Flags:
        layers = [(label, parameter) for label in net.labels for parameter in net.layer(label).parameters()]
        with torch.no_grad():
            found = torch.stack([loss.isfinite().all(), *(p.isfinite().all() for _, p in layers), *probed])
        ready = None
        if found.is_cuda:
            host = torch.empty(found.shape, dtype=torch.bool, pin_memory=True)
            host.copy_(found, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(found.device))
            found = host
        return cls(step, [label for label, _ in layers], found, ready)

    def fault(self) -> str | None:
        """What is not finite, by name, or None."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, *rest = self.found.tolist()
        weights, probed = rest[: len(self.labels)], rest[len(self.labels) :]
        if not loss:
            return f"diverged: the loss is not finite (step {self.step})"
        if bad := list(dict.fromkeys(label for label, finite in zip(self.labels, weights, strict=True) if not finite)):
            return f"diverged: weights of {', '.join(bad)} are not finite (step {self.step})"
        if probed and not probed[1]:
            return f"diverged: similarities are not finite (step {self.step})"
        return None

    @property
    def untied(self) -> bool:
        """Whether the similarities of the probe differ; read after `fault`."""
        return bool(self.found[len(self.labels) + 1])
