"""One update of the weights: a batch drawn, gathered, distorted, embedded, compared, and the step made.

Promise: an update happens whole or leaves no trace, weights, optimizer and generator as they were, when the interrupt
comes in the middle of it; it never waits for the device. What a batch is, is decided on the CPU whatever the device,
and goes there from pinned memory; the drawings are there already. A batch too large for one piece is embedded in
several, so that an interrupt waits seconds on a slow core; independent pairs also need the memory of one piece only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.batch import Batch, Source
from model.distortion import clean, draw_bends, draw_matrices, warp
from model.drawings import Drawings
from model.fixed import FixedPairs
from model.loss import loss
from model.net import SiameseNet
from model.pairs import PairBatches, PairSampler, TripletBatches
from model.precision import autocast
from model.pxk import CharacterBatches
from model.spec import TrainConfig

_PIECE_FLOPS = {"cpu": 1.5e11, "cpu bf16": 1.5e12, "cuda": 5e13}
"""A batch is worked off in pieces of at most this much: some seconds of a slow core that has nothing better."""


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
            drawings,
            config.fixed_pairs,
            config.batch_pairs,
            copies=copies,
            strength=config.strength,
            same_alphabet=same,
            stream=stream,
        )
    sampler = PairSampler(drawings, config.batch_pairs, config.same_alphabet)
    return TripletBatches(sampler) if config.loss == "triplet" else PairBatches(sampler)


def pieces(config: TrainConfig, device: torch.device, *, bf16: bool) -> int:
    """In how many pieces a batch is worked off on a device of this kind."""
    kind = "cpu bf16" if device.type == "cpu" and bf16 else device.type
    work = 6 * config.net.flops * config.pairs_per_batch  # two images a pair, and backward twice as dear as forward
    return max(1, min(config.pairs_per_batch, math.ceil(work / _PIECE_FLOPS.get(kind, math.inf))))


class Slots:
    """Room on a device for batches of one shape, `batch`, which `fill` overwrites with another one's numbers."""

    _KINDS = (("images", "first", "second", "triplets"), ("same", "weight", "matrices", "bends"))
    """Integers and fractions: one transfer each."""

    def __init__(self, like: Batch, device: torch.device) -> None:
        self._rooms: list[Tensor] = []
        views: dict[str, Tensor] = {}
        for names in self._KINDS:
            shown = {name: tensor for name in names if (tensor := getattr(like, name)) is not None}
            sizes = [tensor.numel() for tensor in shown.values()]
            room = torch.zeros(sum(sizes), dtype=next(iter(shown.values())).dtype, device=device)
            for (name, tensor), part in zip(shown.items(), torch.split(room, sizes), strict=True):
                views[name] = part.view(tensor.shape)
            self._rooms.append(room)
        self.batch = replace(like, **views)  # type: ignore[arg-type]

    def fill(self, batch: Batch) -> None:
        """Take over a batch on the CPU, after whatever the device still does with the one before."""
        for names, room in zip(self._KINDS, self._rooms, strict=True):
            parts = []
            for name in names:
                tensor, own = getattr(batch, name), getattr(self.batch, name)
                assert (tensor is None) == (own is None), name
                if tensor is not None:
                    assert tensor.shape == own.shape, (name, tensor.shape, own.shape)
                    parts.append(tensor.flatten())
            # From pageable memory a copy may wait for the device. Pinned memory is fresh each time: torch gives it out
            # again only when the copy from it is done.
            packed = torch.empty(room.shape, dtype=room.dtype, pin_memory=room.is_cuda)
            room.copy_(torch.cat(parts, out=packed), non_blocking=True)


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
        self.device = drawings.device
        self.source = source(config, _described(drawings), stream)
        self.generator = stream("training")
        self.pieces = pieces(config, self.device, bf16=bf16)

    def make(self, step: int, interrupt: Callable[[], bool]) -> Tensor:
        """The update of that step, counted over the whole run; gives its loss, float64, until the next one is made.

        Raises Interrupted.
        """
        before = None
        if self.pieces > 1:
            before = self.generator.get_state(), [buffer.clone() for buffer in self.net.buffers()]
        try:
            total = self._differentiate(self._placed(self._draw(step)), interrupt)
        except Interrupted:
            assert before is not None
            self.generator.set_state(before[0])
            for buffer, value in zip(self.net.buffers(), before[1], strict=True):
                buffer.copy_(value)
            raise
        self.optim.step()
        return total

    def _draw(self, step: int) -> Batch:
        """The batch of that step with its distortions, on the CPU."""
        batch = self.source.draw(self.generator, step)
        if batch.matrices is None and self.config.distort:
            batch = replace(batch, matrices=draw_matrices(len(batch), self.generator, self.config.strength))
            if self.config.elastic:
                batch = replace(batch, bends=draw_bends(len(batch), self.generator, self.config.elastic))
        return batch

    def _placed(self, batch: Batch) -> Batch:
        """The same batch on the device."""
        if self.device.type == "cpu":
            return batch
        slots = Slots(batch, self.device)
        slots.fill(batch)
        return slots.batch

    def _differentiate(self, batch: Batch, interrupt: Callable[[], bool]) -> Tensor:
        """Set the weights' gradients to those of a batch's loss; gives the loss."""
        self.optim.zero_grad(set_to_none=True)
        images = self.drawings.flat[batch.images]  # (n, S, S) uint8
        pixels = (
            clean(images) if batch.matrices is None else warp(images, batch.matrices, batch.bends)
        )  # (n, channels, S, S)
        total = torch.zeros((), dtype=torch.float64, device=pixels.device)
        for number, (part, places) in enumerate(batch.parts(self.pieces)):
            if number and interrupt():
                raise Interrupted
            total += self._add(part, pixels if part is batch else pixels[places], interrupt)
        return total

    def _add(self, batch: Batch, pixels: Tensor, interrupt: Callable[[], bool]) -> Tensor:
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


def _described(drawings: Drawings) -> Drawings:
    """All of the drawings but what they look like, on the CPU, for a source of batches."""
    if drawings.device.type == "cpu":
        return drawings
    blank = torch.zeros((), dtype=torch.uint8).expand(drawings.images.shape)  # one byte, however many they are
    return replace(drawings, images=blank, alphabet=drawings.alphabet.cpu())
