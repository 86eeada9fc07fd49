"""The network of Koch, Zemel and Salakhutdinov, "Siamese Neural Networks for One-shot Image Recognition" (2015).

Two twins with the same weights look at one image each and answer how likely it is that both show the same character.
A twin (section 3.1, figure 4) is a stack of convolutions with stride 1, each followed by a ReLU and most by 2 x 2 max
pooling, and one fully connected layer of sigmoidal units. The head weighs the L1 distance between the two feature
vectors, p = sigmoid(sum_j alpha_j |h1_j - h2_j| + bias), and learns alpha with everything else by cross-entropy
(section 3.2). Weights are per layer: conv1 .. convN, fc, output, the labels by which eta, mu and lambda are given.

Three things differ from a textbook version, and none of them changes what is computed. Both twins go through the
convolutions as one batch. Pooling comes before the ReLU: the maximum commutes with it, and there is a quarter left to
rectify. The head returns logits, in fp32 even under bf16 autocast: the sigmoid belongs to the loss, and two
similarities that differ must not round to a tie.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.geometry import MINI, NETS, PAPER, Conv, NetConfig

__all__ = ["MINI", "NETS", "PAPER", "Conv", "NetConfig", "SiameseNet"]

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class SiameseNet(nn.Module):
    """The network of a `NetConfig`, weights uninitialised until `model.init` has filled them.

    Images are float (B, 1, S, S) in [0, 1], 1 = ink, S = `config.input`. Raises ValueError for an impossible geometry.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        if fault := config.fault():
            raise ValueError(fault)
        self.config = config
        self.labels = config.labels
        channels = (1, *(layer.filters for layer in config.conv))
        for label, before, layer in zip(config.labels, channels, config.conv, strict=False):
            self.add_module(label, _empty(nn.Conv2d, before, layer.filters, layer.kernel))
        self.fc = _empty(nn.Linear, config.features, config.fc)
        self.output = _empty(nn.Linear, config.fc, 1)

    def on(self, device: torch.device | str) -> SiameseNet:
        """Move the network to `device`, its convolutions laid out as they run fastest there; returns itself."""
        return self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def layer(self, label: str) -> nn.Conv2d | nn.Linear:
        """The layer that holds the weights of `label`."""
        module = self.get_submodule(label)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return module

    def embed(self, images: Tensor) -> Tensor:
        """Features of a twin: (B, 1, S, S) -> (B, fc) fp32, each in [0, 1]."""
        x = images
        for label, layer in zip(self.labels, self.config.conv, strict=False):
            x = self.layer(label)(x)  # (B, filters, s, s)
            if layer.pool != "none":
                x = F.max_pool2d(x, 2, ceil_mode=layer.pool == "ceil")
            x = F.relu(x)
        x = self.fc(x.flatten(1))  # (B, fc)
        return torch.sigmoid(x.float())

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits of "the same character" for feature vectors (..., fc), which broadcast: a larger one is more alike."""
        with torch.autocast(first.device.type, enabled=False):
            logits: Tensor = self.output((first - second).abs()).squeeze(-1)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,) of B pairs, given as (2B, 1, S, S): all first images, then all second ones."""
        first, second = self.embed(images).chunk(2)
        return self.compare(first, second)


def _empty(kind: type[Layer], *sizes: int) -> Layer:
    """A layer whose weights are not drawn: torch's own initialisation would use, and move, the global generator."""
    return nn.utils.skip_init(kind, *sizes)  # type: ignore[no-untyped-call,no-any-return]
