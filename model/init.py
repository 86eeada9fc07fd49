"""Initial weights: He's, or the paper's own (Koch et al. 2015, section 3.2, "Weight initialization").

Promise: the weights depend on the generator alone, drawn on the CPU in the order of the labels, so a seed gives the
same network on every device. The paper's start saturates most of the sigmoidal units (its bias of 0.5 does it) and
learns slowly at first; He's is the better default. keras2017 is that of a well-known Keras port of the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.net import SiameseNet


@torch.no_grad()
def initialise(net: SiameseNet, scheme: str, generator: torch.Generator) -> None:
    """Fill every weight and bias of `net` by a scheme. `generator` must be a CPU generator.

    he: weights N(0, 2 / fan_in) before a ReLU and N(0, 1 / fan_in) before anything else, biases 0; the weighted head
    starts with -1 / sqrt(E) for every feature, so that even an untrained network prefers what looks alike. paper:
    convolution weights N(0, 0.01^2), other weights N(0, 0.2^2), all biases N(0.5, 0.01^2). keras2017: all weights
    N(0, 0.01^2), all biases N(0.5, 0.01^2) but conv1's, which are 0.
    """
    if scheme not in ("he", "paper", "keras2017"):
        raise ValueError(f"no initialisation {scheme!r}: there are he, paper and keras2017")
    for label in net.labels:
        layer = net.layer(label)
        assert layer.bias is not None
        conv = isinstance(layer, nn.Conv2d)
        if scheme == "he":
            fan_in = layer.weight[0].numel()
            if label == "output" and net.config.head == "weighted":
                layer.weight.fill_(-1.0 / math.sqrt(fan_in))
            else:
                embedding = label == net.config.connected[-1]
                rectified = label != "output" and (not embedding or net.config.activation == "relu")
                _normal(layer.weight, 0.0, math.sqrt((2.0 if rectified else 1.0) / fan_in), generator)
            layer.bias.zero_()
        else:
            _normal(layer.weight, 0.0, 0.01 if conv or scheme == "keras2017" else 0.2, generator)
            if scheme == "keras2017" and label == net.labels[0]:
                layer.bias.zero_()
            else:
                _normal(layer.bias, 0.5, 0.01, generator)


def _normal(parameter: Tensor | None, mean: float, std: float, generator: torch.Generator) -> None:
    assert parameter is not None
    parameter.copy_(torch.empty(parameter.shape).normal_(mean, std, generator=generator))
