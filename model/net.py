"""The network of Koch, Zemel and Salakhutdinov, "Siamese Neural Networks for One-shot Image Recognition" (2015).

Two twins with the same weights look at one image each and answer how alike the two are. A twin (section 3.1, figure 4)
is a stack of convolutions with stride 1, each followed by a ReLU and most by 2 x 2 max pooling, and one fully connected
layer of sigmoidal units. The paper's head weighs the L1 distance between the two feature vectors,
p = sigmoid(sum_j alpha_j |h1_j - h2_j| + bias), and learns alpha with everything else by cross-entropy (section 3.2).
Its siblings have more fully connected layers, other units, colour, or no head: the distance itself compares. Weights
are per layer: conv1 .. convN, fc (fc1 .. fcM), output, the labels by which eta, mu and lambda are given.

Three things differ from a textbook version, and none of them changes what is computed. Both twins go through the
convolutions as one batch. Pooling comes before the ReLU: the maximum commutes with it, and there is a quarter left to
rectify. The head returns logits, in fp32 even under bf16 autocast: the sigmoid belongs to the loss, and two
similarities that differ must not round to a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import ConvBlock
from model.geometry import MINI, NETS, PAPER, Conv, NetConfig

__all__ = ["MINI", "NETS", "PAPER", "Conv", "NetConfig", "SiameseNet"]

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class SiameseNet(nn.Module):
    """The network of a `NetConfig`, weights uninitialised until `model.init` has filled them.

    Images are float (B, channels, S, S) in [0, 1], 1 = ink, S = `config.input`. Raises ValueError for an impossible
    geometry.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        if fault := config.fault():
            raise ValueError(fault)
        self.config = config
        self.labels = config.labels
        channels = (config.channels, *(layer.filters for layer in config.conv))
        for label, before, layer in zip(config.convolutions, channels, config.conv, strict=False):
            self.add_module(label, _empty(nn.Conv2d, before, layer.filters, layer.kernel))
            if config.norm == "batch":
                self.add_module(f"{label}_norm", nn.BatchNorm2d(layer.filters))
        for label, (before, after) in zip(config.connected, pairwise((config.features, *config.fc)), strict=True):
            self.add_module(label, _empty(nn.Linear, before, after))
        if config.head != "none":
            self.add_module("output", _empty(nn.Linear, config.embedding, config.outputs))

    def on(self, device: torch.device | str) -> SiameseNet:
        """Move the network to `device`, its convolutions laid out as they run fastest there; returns itself."""
        return self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    @property
    def device(self) -> torch.device:
        return self.layer(self.labels[0]).weight.device

    def layer(self, label: str) -> nn.Conv2d | nn.Linear:
        """The layer that holds the weights of `label`."""
        module = self.get_submodule(label)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return module

    def others(self, label: str) -> list[nn.Parameter]:
        """What a layer has beside its weight, and L2 leaves alone: its bias, its normalisation's scale and shift."""
        layer = self.layer(label)
        assert layer.bias is not None
        norm = self._norm(label)
        return [layer.bias] if norm is None else [layer.bias, norm.weight, norm.bias]  # type: ignore[list-item]

    def embed(self, images: Tensor, training: torch.Generator | None = None) -> Tensor:
        """Embeddings: (B, channels, S, S) -> (B, E) fp32.

        A generator means training: `config.dropout` takes part, and batches are normalised by their own statistics.
        """
        x = images
        fast = x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        for label, layer in zip(self.config.convolutions, self.config.conv, strict=True):
            module, norm = self.layer(label), self._norm(label)
            if fast:
                x = ConvBlock.apply(x, module.weight, module.bias, layer.pool)  # type: ignore[no-untyped-call]
            else:
                x = module(x)  # (B, filters, s, s)
                if layer.pool != "none":
                    x = F.max_pool2d(x, 2, ceil_mode=layer.pool == "ceil")
                x = F.relu(x)
            if norm is not None:
                x = norm.train(training is not None)(x)
        x = x.flatten(1)  # (B, features)
        *hidden, last = self.config.connected
        for label in hidden:
            x = F.relu(self.layer(label)(x))
            if training is not None and self.config.dropout:
                x = x * _kept(x, self.config.dropout, training)
        x = _ACTIVATIONS[self.config.activation](self.layer(last)(x).float())  # (B, E)
        return F.normalize(x, dim=1, eps=1e-6) if self.config.normalise else x

    def _norm(self, label: str) -> nn.BatchNorm2d | None:
        if self.config.norm == "none" or label not in self.config.convolutions:
            return None
        module = self.get_submodule(f"{label}_norm")
        assert isinstance(module, nn.BatchNorm2d)
        return module

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Similarities (...) of embeddings (..., E), which broadcast: a larger one is more alike.

        With the weighted head they are the logits of "the same character", else distances with a minus sign.
        """
        with torch.autocast(first.device.type, enabled=False):
            if self.config.head != "weighted":
                return -self.distance(first, second)
            apart = first - second
            if apart.requires_grad:
                apart = apart.abs() if self.config.distance == "l1" else apart.square()
            else:
                apart = apart.abs_() if self.config.distance == "l1" else apart.square_()
            logits: Tensor = self.layer("output")(apart).squeeze(-1)
        return logits

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (...) of embeddings (..., E): L1, Euclidean, its square, or 1 - cosine."""
        if self.config.distance == "cosine":
            if not self.config.normalise:
                first, second = F.normalize(first, dim=-1, eps=1e-6), F.normalize(second, dim=-1, eps=1e-6)
            return 1.0 - (first * second).sum(-1)
        if self.config.distance == "l1":
            return (first - second).abs().sum(-1)
        if self.config.distance == "squared":
            return (first - second).square().sum(-1)
        # The slope of a root is infinite at nothing, where two drawings have the same embedding.
        return ((first - second).square().sum(-1) + 1e-12).sqrt()

    def classify(self, embeddings: Tensor) -> Tensor:
        """Logits (B, classes) of the training characters, with a head that classifies."""
        assert self.config.head == "classes"
        with torch.autocast(embeddings.device.type, enabled=False):
            logits: Tensor = self.layer("output")(embeddings)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Similarities (B,) of B pairs, given as (2B, channels, S, S): all first images, then all second ones."""
        first, second = self.embed(images).chunk(2)
        return self.compare(first, second)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


def _kept(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Inverted dropout: zero for a share of the units, drawn on the generator's device, the rest scaled up."""
    chance = torch.rand(x.shape, generator=generator, device=generator.device)
    return ((chance >= share).to(x.dtype) / (1.0 - share)).to(x.device, non_blocking=True)


def _empty(kind: type[Layer], *sizes: int) -> Layer:
    """A layer whose weights are not drawn: torch's own initialisation would use, and move, the global generator."""
    return nn.utils.skip_init(kind, *sizes)  # type: ignore[no-untyped-call,no-any-return]
