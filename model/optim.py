"""The paper's update (Koch et al. 2015, section 3.2): momentum SGD with a rate, a momentum and an L2 strength by layer.

    dw(t) = -eta_j * (gradient + 2 lambda_j w) + mu_j dw(t-1)

Promise: each layer is its own parameter group, L2 acts on weights and never on biases, and in an epoch the rates
depend on the epoch's number alone, so a resumed run uses the same ones. torch keeps dw(t-1) / eta, so what momentum
carries from one epoch into the next decays with eta: by 1%, for the few steps that it lasts.
"""

from __future__ import annotations

import torch

from model.net import SiameseNet
from model.spec import LayerRates, TrainConfig


def optimizer(net: SiameseNet, config: TrainConfig) -> torch.optim.SGD:
    """SGD with two groups a layer, {"label": ..., weights with weight_decay 2 lambda_j | biases with none}."""
    groups = []
    for rates in config.layers:
        layer = net.layer(rates.label)
        assert layer.bias is not None
        groups.append({"params": [layer.weight], "label": rates.label, "weight_decay": rates.weight_decay})
        groups.append({"params": [layer.bias], "label": rates.label, "weight_decay": 0.0})
    sgd = torch.optim.SGD(groups, lr=0.0, fused=True)
    schedule(sgd, config, 0)
    return sgd


def schedule(sgd: torch.optim.SGD, config: TrainConfig, epoch: int) -> None:
    """Set every group's rate and momentum for an epoch, counted from 0."""
    rates = {layer.label: layer for layer in config.layers}
    for group in sgd.param_groups:
        layer = rates[group["label"]]
        group["lr"], group["momentum"] = learning_rate(layer, config, epoch), momentum(layer, config, epoch)


def learning_rate(layer: LayerRates, config: TrainConfig, epoch: int) -> float:
    """eta_j, multiplied by `decay` after each epoch: eta_j(T) = 0.99 eta_j(T-1)."""
    return layer.eta * config.decay**epoch


def momentum(layer: LayerRates, config: TrainConfig, epoch: int) -> float:
    """From `momentum_start` linearly to mu_j over `momentum_epochs` epochs; it falls where mu_j is the smaller."""
    if epoch >= config.momentum_epochs:
        return layer.mu
    return config.momentum_start + (layer.mu - config.momentum_start) * epoch / config.momentum_epochs
