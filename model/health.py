"""Is this run still alive? A dead one is ended early, with its reason, and told as infeasible.

Dead is: a loss or a weight that is not finite, or a network that answers the very same similarity to every pair of a
probe batch at two checks in a row, `EVERY` steps apart. Checks come every `EVERY` steps, so a death is found at most
2 * `EVERY` steps after its onset, and the device is waited for only then. A slow start is not dead: at loss 0.69 the
answers of a network differ in their last digits, and the probe is computed in fp32 so that they still do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.distortion import clean
from model.net import SiameseNet

EVERY = 100
"""Steps between two checks."""

PROBE_PAIRS = 32


class Health:
    """Watches one run. `probe` is uint8 (2P, S, S): the first images of P pairs, then their second ones.

    `tied_at` is the step of the last check if all similarities were equal there, else None; it belongs into a
    checkpoint, so that a resumed run dies at the same step.
    """

    def __init__(self, probe: Tensor) -> None:
        self.probe = probe
        self.tied_at: int | None = None

    def check(self, net: SiameseNet, loss: Tensor, step: int) -> str | None:
        """At a step counted over the whole run: why the run is dead, or None. `loss` is the sum or mean since last."""
        if reason := self.finite(net, loss, step):
            return reason
        with torch.no_grad():
            similarity = torch.sigmoid(net(clean(self.probe).contiguous(memory_format=torch.channels_last)))
        # NaN compares unequal to everything, so it is asked for by itself.
        tied, broken = torch.stack([(similarity == similarity[0]).all(), ~similarity.isfinite().all()]).tolist()
        if broken:
            return f"diverged: similarities are not finite (step {step})"
        if not tied:
            self.tied_at = None
            return None
        before, self.tied_at = self.tied_at, step
        if before is None:
            return None
        return f"collapsed: all similarities of a probe batch were exactly equal at steps {before} and {step}"

    @staticmethod
    def finite(net: SiameseNet, loss: Tensor, step: int) -> str | None:
        """The cheaper half of `check`, which keeps no memory: why the loss or a weight is not finite, or None."""
        layers = [(label, parameter) for label in net.labels for parameter in net.layer(label).parameters()]
        with torch.no_grad():
            flags = torch.stack([loss.isfinite().all(), *(p.isfinite().all() for _, p in layers)]).tolist()
        if not flags[0]:
            return f"diverged: the loss is not finite (step {step})"
        bad = list(dict.fromkeys(label for (label, _), finite in zip(layers, flags[1:], strict=True) if not finite))
        return f"diverged: weights of {', '.join(bad)} are not finite (step {step})" if bad else None
