"""A training batch: which drawings to embed, and what to compare with what.

Promise: a batch speaks in positions into its own images, so that every image is embedded once however many pairs it
stands in. The weights of its pairs add up to 1. Batches of independent pairs can be worked off in parts; triplets, and
batches where everything is compared with everything, come whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """n images and Q pairs or T triplets of them.

    images    (n,) int64, flat indices into the training drawings
    first     (Q,) int64, positions into `images`
    second    (Q,) int64
    same      (Q,) float32, 1 where both show one character
    weight    (Q,) float32
    triplets  (T, 3) int64 positions: anchor, positive, negative; None in a batch of pairs
    matrices  (n, 2, 3) float32, each image's distortion where it was decided before; None: to be drawn
    bends     (n, 2, 4, 4) float32, each image's elastic distortion; None: there is none
    positives how many of the pairs, the first ones, are of one character, in a P x K batch
    twins     images are [all first, all second], and pair i is (i, n / 2 + i)
    """

    images: Tensor
    first: Tensor
    second: Tensor
    same: Tensor
    weight: Tensor
    triplets: Tensor | None = None
    matrices: Tensor | None = None
    bends: Tensor | None = None
    positives: int = 0
    twins: bool = False

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def parts(self, count: int) -> Iterator[tuple[Batch, Tensor]]:
        """At most `count` batches that share no image, with the places of their images in this one.

        Their losses add up to this batch's. One that cannot be divided comes whole.
        """
        pairs = len(self.same)
        if not self.twins or count < 2:
            yield self, torch.arange(len(self), device=self.images.device)
            return
        size = -(-pairs // count)
        for begin in range(0, pairs, size):
            end = min(begin + size, pairs)
            here = torch.arange(begin, end, device=self.images.device)
            places = torch.cat([here, here + pairs])
            own = torch.arange(end - begin, device=here.device)
            yield (
                replace(
                    self,
                    images=self.images[places],
                    first=own,
                    second=own + (end - begin),
                    same=self.same[begin:end],
                    weight=self.weight[begin:end],
                    matrices=None if self.matrices is None else self.matrices[places],
                    bends=None if self.bends is None else self.bends[places],
                ),
                places,
            )


class Source(Protocol):
    """Where batches come from. `step` counts from 0 over the whole run; randomness is the generator's alone."""

    def draw(self, generator: torch.Generator, step: int) -> Batch: ...
