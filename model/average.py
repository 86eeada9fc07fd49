"""A running average of a network's weights, which is judged and kept in the place of the weights themselves.

Promise: after step t it is the exponential average with the given share of the past, that share smaller at first (never
above (1 + t) / (10 + t)), so that the start is forgotten; what batches were normalised by is averaged with it. Polyak
and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from model.net import SiameseNet


class Average:
    """The average of `net`, as a network of its own: `net` itself where `share` is 0."""

    def __init__(self, net: SiameseNet, share: float) -> None:
        self.share = share
        self.net = copy.deepcopy(net) if share else net
        self._mine, self._theirs = _values(self.net), _values(net)

    def follow(self, step: int) -> None:
        """Take in the weights as they are after update number `step`, counted from 0."""
        if self.share:
            share = min(self.share, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(self._mine, self._theirs, 1.0 - share)

    def memory(self) -> dict[str, Tensor]:
        """For a checkpoint: {"average.conv1.weight": ...}; empty where nothing is averaged."""
        return {f"average.{name}": t for name, t in self.net.state_dict().items()} if self.share else {}

    def remember(self, kept: dict[str, Tensor]) -> None:
        """The inverse of `memory`."""
        if self.share:
            self.net.load_state_dict(kept)


def _values(net: SiameseNet) -> list[Tensor]:
    return [t.detach() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
