"""Independent training pairs and triplets, drawn by the batch.

Promise: in every batch half of the pairs (the larger half, if the batch is odd) show the same character, drawn by two
different people; the others show two different characters, also by two different people, so that the hand gives nothing
away. Alphabets are drawn uniformly, then characters within them (Koch et al. 2015, section 3.1), so a large alphabet
does not drown a small one. Same and different pairs alternate, so that any prefix of a batch holds both kinds. A
triplet is a pair of each kind with one anchor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import Batch
from model.drawings import DataError, Drawings


class PairSampler:
    """Draws batches of pairs from `drawings`; with `same_alphabet` the different pairs stay within one alphabet.

    Raises DataError where the drawings cannot give such pairs, ValueError for a batch of fewer than two pairs.
    """

    def __init__(self, drawings: Drawings, batch: int, same_alphabet: bool = True) -> None:
        if batch < 2:
            raise ValueError(f"a batch holds at least 2 pairs, one same and one different; got {batch}")
        if drawings.drawers < 2:
            raise DataError("pairs need drawings by at least 2 people")
        self.batch = batch
        self.same_alphabet = same_alphabet
        self.drawers = drawings.drawers
        self.device = drawings.device
        alphabet = drawings.alphabet.cpu()
        sizes = torch.bincount(alphabet, minlength=len(drawings.alphabets))
        order = torch.argsort(alphabet, stable=True)
        starts = torch.cumsum(sizes, 0) - sizes
        usable = (sizes >= (2 if same_alphabet else 1)).nonzero().flatten()
        if len(usable) == 0 or int(sizes.sum()) < 2:
            raise DataError("pairs need at least 2 characters" + (" in one alphabet" if same_alphabet else ""))
        self._order, self._sizes, self._starts = order, sizes[usable], starts[usable]

    def draw(self, generator: torch.Generator, *, equal_shares: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """One batch on the drawings' device: flat indices `first`, `second` (B,) int64, and `same` (B,) float32.

        With `equal_shares` the alphabets take turns instead of being drawn: each gives as many pairs of each kind as
        any other, or one more.
        """
        where = generator.device
        # One call for all the randomness of a batch: alphabet, first and second character, first and second drawer.
        chance = torch.rand(5, self.batch, generator=generator, device=where, dtype=torch.float64)
        same = torch.arange(self.batch, device=where) % 2 == 0
        if equal_shares:
            turn = torch.arange(self.batch, device=where) // 2 % len(self._sizes)
            chance[0] = (turn + 0.5) / len(self._sizes)
        anchor, positive, negative = self._choose(chance)
        return (  # a copy that is waited for would hold the next batch up until the device has done with this one
            anchor.to(self.device, non_blocking=True),
            torch.where(same, positive, negative).to(self.device, non_blocking=True),
            same.to(torch.float32).to(self.device, non_blocking=True),
        )

    def draw_triplets(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """As many triplets, as flat indices: anchor, positive (the same character), negative (another), (B,) each."""
        where = generator.device
        chance = torch.rand(5, self.batch, generator=generator, device=where, dtype=torch.float64)
        anchor, positive, negative = (index.to(self.device, non_blocking=True) for index in self._choose(chance))
        return anchor, positive, negative

    def _choose(self, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From (5, B) uniform numbers: a drawing, another person's of the same character, that one's of another."""
        where = chance.device
        order, sizes, starts = self._order.to(where), self._sizes.to(where), self._starts.to(where)

        alphabet = _below(chance[0], len(sizes))
        size, start = sizes[alphabet], starts[alphabet]
        position = _below(chance[1], size)
        first = order[start + position]
        if self.same_alphabet:
            other = order[start + (position + 1 + _below(chance[2], size - 1)) % size]
        else:
            count = len(order)
            other = order[(start + position + 1 + _below(chance[2], count - 1)) % count]
        hand = _below(chance[3], self.drawers)
        other_hand = (hand + 1 + _below(chance[4], self.drawers - 1)) % self.drawers
        return first * self.drawers + hand, first * self.drawers + other_hand, other * self.drawers + other_hand


class PairBatches:
    """Batches of independent pairs, as a `Source`."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler = sampler
        self._positions = torch.arange(2 * sampler.batch, device=sampler.device)
        self._weight = torch.full((sampler.batch,), 1.0 / sampler.batch, device=sampler.device)

    def draw(self, generator: torch.Generator, step: int = 0) -> Batch:
        first, second, same = self.sampler.draw(generator)
        left, right = self._positions.chunk(2)
        return Batch(torch.cat([first, second]), left, right, same, self._weight, twins=True)


class TripletBatches:
    """Batches of independent triplets, as a `Source`; images are [anchors, positives, negatives]."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler = sampler
        self._triplets = torch.arange(3 * sampler.batch, device=sampler.device).view(3, sampler.batch).T.contiguous()
        self._none = torch.zeros(0, device=sampler.device)

    def draw(self, generator: torch.Generator, step: int = 0) -> Batch:
        images = torch.cat(self.sampler.draw_triplets(generator))
        nothing = self._none.long()
        return Batch(images, nothing, nothing, self._none, self._none, triplets=self._triplets)


def _below(chance: Tensor, bound: Tensor | int) -> Tensor:
    """Integers in [0, bound) from uniform numbers in [0, 1); float64 cannot round up to the bound at these sizes."""
    return (chance * bound).long()
