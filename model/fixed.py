"""A fixed set of training pairs, as the paper's verification has it: 30,000, 90,000 or 150,000 of them.

Promise: every alphabet gives the same number of pairs (Koch et al. 2015, section 3.1), half of them of one character;
each comes as it is and with `copies` distorted versions (section 3.3: eight), decided once for the whole run, so that
30,000 pairs are 270,000. A pass goes through all of them in an order of its own, and the next pass begins where it
ends, in mid-batch: after n steps the run has seen exactly n batches of that stream. Everything depends on the seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.batch import Batch
from model.distortion import IDENTITY, draw_matrices
from model.drawings import Drawings
from model.pairs import PairSampler


class FixedPairs:
    """`pairs` pairs with `copies` distorted versions each (0: none), by the batch.

    `stream` gives a CPU generator for a purpose; `order`, `pairs` and `distortions` are asked for.
    """

    def __init__(
        self,
        drawings: Drawings,
        pairs: int,
        batch: int,
        *,
        copies: int,
        strength: float = 1.0,
        same_alphabet: bool,
        stream: Callable[[str], torch.Generator],
    ) -> None:
        self.batch, self.copies, self.device = batch, copies, drawings.device
        drawn = PairSampler(drawings, pairs, same_alphabet).draw(stream("pairs"), equal_shares=True)
        self.first, self.second, self.same = (part.cpu() for part in drawn)
        self._distortions = draw_matrices(2 * pairs * copies, stream("distortions"), strength) if copies else None
        self._stream = stream
        self._pass, self._order = -1, torch.zeros(0, dtype=torch.int64)
        self._positions = torch.arange(2 * batch, device=self.device)
        self._weight = torch.full((batch,), 1.0 / batch, device=self.device)

    def __len__(self) -> int:
        """Pairs with their copies."""
        return len(self.first) * (1 + self.copies)

    def draw(self, generator: torch.Generator, step: int) -> Batch:
        """The batch of that step. The generator is not used: the set and its order were decided before."""
        begin = step * self.batch
        which = torch.cat([self._piece(at, begin + self.batch) for at in self._passes(begin)])
        pair, copy = which // (1 + self.copies), which % (1 + self.copies)
        left, right = self._positions.chunk(2)
        return Batch(
            torch.cat([self.first[pair], self.second[pair]]).to(self.device, non_blocking=True),
            left,
            right,
            self.same[pair].to(self.device, non_blocking=True),
            self._weight,
            matrices=self._matrices(pair, copy),
            twins=True,
        )

    def _matrices(self, pair: Tensor, copy: Tensor) -> Tensor | None:
        """(2B, 2, 3), all first images' and then all second ones': the identity for copy 0, else that copy's own."""
        if self._distortions is None:
            return None
        row = (pair * self.copies + (copy - 1).clamp_min(0)) * 2
        own = self._distortions[torch.cat([row, row + 1])]
        return torch.where(copy.repeat(2)[:, None, None] == 0, IDENTITY, own)

    def _passes(self, begin: int) -> list[int]:
        """Where in the endless stream a batch that begins at `begin` takes up a pass: at most so often as it must."""
        cuts = range((begin // len(self) + 1) * len(self), begin + self.batch, len(self))
        return [begin, *cuts]

    def _piece(self, at: int, end: int) -> Tensor:
        number, place = divmod(at, len(self))
        if number != self._pass:
            self._pass, self._order = number, torch.randperm(len(self), generator=self._stream(f"pass {number}"))
        return self._order[place : min(len(self), place + end - at)]
