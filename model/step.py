"""One update of the weights: a batch drawn, gathered, distorted, embedded, compared, and the step made.

Promise: an update happens whole or leaves no trace, weights, optimizer and generator as they were, when the interrupt
comes in the middle of it; it never waits for the device. A batch too large for one piece is embedded in several, so
that an interrupt waits seconds on a slow core; independent pairs also need the memory of one piece only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.batch import Batch, Source
from model.distortion import clean, draw_matrices, warp
from model.drawings import Drawings
from model.fixed import FixedPairs
from model.loss import loss
from model.net import SiameseNet
from model.pairs import PairBatches, PairSampler, TripletBatches
from model.precision import autocast
from model.pxk import CharacterBatches
from model.spec import TrainConfig

_PIECE_FLOPS = {"cpu": 1.5e11, "cuda": 5e13}
"""A batch is worked off in pieces of at most this much."""


class Interrupted(Exception):
    """The update was asked to stop before it was made."""


def source(config: TrainConfig, drawings: Drawings, stream: Callable[[str], torch.Generator]) -> Source:
    """Where the batches of a run come from. Raises DataError where the drawings cannot give them."""
    if config.batches == "pxk":
        return CharacterBatches(
            drawings,
            characters=config.characters,
            per_character=config.drawings,
            alphabets=config.alphabets,
            negatives=config.negatives,
            same_alphabet=config.same_alphabet,
        )
    if config.fixed_pairs is not None:
        copies = config.distorted_copies if config.distort else 0
        same = config.same_alphabet
        return FixedPairs(
            drawings, config.fixed_pairs, config.batch_pairs, copies=copies, same_alphabet=same, stream=stream
        )
    sampler = PairSampler(drawings, config.batch_pairs, config.same_alphabet)
    return TripletBatches(sampler) if config.loss == "triplet" else PairBatches(sampler)


class Updates:
    """Makes the updates of one run."""

    def __init__(
        self,
        net: SiameseNet,
        optim: torch.optim.Optimizer,
        drawings: Drawings,
        config: TrainConfig,
        stream: Callable[[str], torch.Generator],
        *,
        bf16: bool,
    ) -> None:
        self.net, self.optim, self.drawings, self.config, self.bf16 = net, optim, drawings, config, bf16
        self.source = source(config, drawings, stream)
        self.generator = stream("training")
        work = 6 * config.net.flops * config.pairs_per_batch  # two images a pair, and backward twice as dear as forward
        pieces = math.ceil(work / _PIECE_FLOPS.get(drawings.device.type, math.inf))
        self.pieces = min(config.pairs_per_batch, pieces)

    def make(self, step: int, interrupt: Callable[[], bool]) -> Tensor:
        """The update of that step, counted over the whole run; gives its loss, float64. Raises Interrupted."""
        before = None
        if self.pieces > 1:
            before = self.generator.get_state(), [buffer.clone() for buffer in self.net.buffers()]
        try:
            batch, pixels = self._input(step)
            self.optim.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float64, device=pixels.device)
            for number, (part, places) in enumerate(batch.parts(self.pieces)):
                if number and interrupt():
                    raise Interrupted
                total += self._differentiate(part, pixels if part is batch else pixels[places], interrupt)
        except Interrupted:
            assert before is not None
            self.generator.set_state(before[0])
            for buffer, value in zip(self.net.buffers(), before[1], strict=True):
                buffer.copy_(value)
            raise
        self.optim.step()
        return total

    def _input(self, step: int) -> tuple[Batch, Tensor]:
        """A batch, and its images as the network sees them: (n, channels, S, S) float32."""
        batch = self.source.draw(self.generator, step)
        images = self.drawings.flat[batch.images]  # (n, S, S) uint8
        matrices = batch.matrices
        if matrices is None and self.config.distort:
            matrices = draw_matrices(len(batch), self.generator)
        return batch, clean(images) if matrices is None else warp(images, matrices)

    def _differentiate(self, batch: Batch, pixels: Tensor, interrupt: Callable[[], bool]) -> Tensor:
        """Add the gradients of a batch's loss to the weights'; gives the loss."""
        pieces = 1 if batch.twins else min(self.pieces, len(batch))
        if pieces == 1:
            value = loss(self.net, self._embed(pixels), batch, self.config, self.drawings.drawers)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
        # Everything is compared with everything: embed piece by piece, differentiate the loss by the embeddings, then
        # go on from there to the weights piece by piece.
        embedded: list[Tensor] = []
        for piece in pixels.chunk(pieces):
            if embedded and interrupt():
                raise Interrupted
            embedded.append(self._embed(piece))
        leaves = torch.cat([e.detach() for e in embedded]).requires_grad_()
        value = loss(self.net, leaves, batch, self.config, self.drawings.drawers)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaves.grad is not None
        slopes = torch.split(leaves.grad, [len(piece) for piece in embedded])
        for piece, slope in zip(embedded, slopes, strict=True):
            if interrupt():
                raise Interrupted
            piece.backward(slope)  # type: ignore[no-untyped-call]
        return value.detach()

    def _embed(self, pixels: Tensor) -> Tensor:
        with autocast(pixels.device, self.bf16):
            return self.net.embed(pixels.contiguous(memory_format=torch.channels_last), self.generator)
