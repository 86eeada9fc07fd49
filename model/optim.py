"""The updates: the paper's momentum SGD, or Adam, with a rate, a momentum and an L2 strength by layer.

    dw(t) = -eta_j * (gradient + 2 lambda_j w) + mu_j dw(t-1)        (Koch et al. 2015, section 3.2)

Promise: each layer is its own parameter group, L2 acts on weights and never on biases, and in an epoch the rates
depend on the epoch's number alone, so a resumed run uses the same ones. torch keeps dw(t-1) / eta, so what momentum
carries from one epoch into the next decays with eta: by 1%, for the few steps that it lasts. Adam (Kingma and Ba 2015)
takes mu for beta1 and adds L2 to the gradient, as its first ports did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.net import SiameseNet
from model.spec import LayerRates, TrainConfig

_KEYS = {"sgd": {"momentum_buffer": "momentum"}, "adam": {"exp_avg": "mean", "exp_avg_sq": "square", "step": "count"}}
"""What an optimizer remembers of a parameter, and the names of it in a checkpoint."""


def optimizer(net: SiameseNet, config: TrainConfig) -> torch.optim.Optimizer:
    """Two groups a layer, {"label": ..., weights with weight_decay 2 lambda_j | biases with none}."""
    groups = []
    for rates in config.layers:
        weight = net.layer(rates.label).weight
        groups.append({"params": [weight], "label": rates.label, "weight_decay": rates.weight_decay})
        groups.append({"params": net.others(rates.label), "label": rates.label, "weight_decay": 0.0})
    made = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
    optim: torch.optim.Optimizer = made(groups, lr=0.0, fused=True)
    schedule(optim, config, 0)
    return optim


def schedule(optim: torch.optim.Optimizer, config: TrainConfig, epoch: int) -> None:
    """Set every group's rate and momentum for an epoch, counted from 0."""
    rates = {layer.label: layer for layer in config.layers}
    for group in optim.param_groups:
        layer = rates[group["label"]]
        group["lr"] = learning_rate(layer, config, epoch)
        if config.optimizer == "sgd":
            group["momentum"] = momentum(layer, config, epoch)
        else:
            group["betas"] = (momentum(layer, config, epoch), 0.999)


def learning_rate(layer: LayerRates, config: TrainConfig, epoch: int) -> float:
    """eta_j, multiplied by `decay` after each epoch, eta_j(T) = 0.99 eta_j(T-1); or a half cosine over `epochs`."""
    if config.schedule == "cosine":
        return layer.eta * (1.0 + math.cos(math.pi * min(1.0, epoch / config.epochs))) / 2.0
    return layer.eta * config.decay**epoch


def momentum(layer: LayerRates, config: TrainConfig, epoch: int) -> float:
    """From `momentum_start` linearly to mu_j over `momentum_epochs` epochs; it falls where mu_j is the smaller."""
    if epoch >= config.momentum_epochs:
        return layer.mu
    return config.momentum_start + (layer.mu - config.momentum_start) * epoch / config.momentum_epochs


def memory(optim: torch.optim.Optimizer, net: SiameseNet, config: TrainConfig) -> dict[str, Tensor]:
    """What the optimizer remembers, for a checkpoint: {"momentum.conv1.weight": ...}; empty before the first step."""
    return {
        f"{name}.{of}": kept
        for of, parameter in net.named_parameters()
        for key, name in _KEYS[config.optimizer].items()
        if (kept := optim.state[parameter].get(key)) is not None
    }


def shapes(net: SiameseNet, config: TrainConfig) -> dict[str, torch.Size]:
    """The names and shapes of what `memory` can hold."""
    return {
        f"{name}.{of}": torch.Size() if name == "count" else parameter.shape
        for of, parameter in net.named_parameters()
        for name in _KEYS[config.optimizer].values()
    }


def remember(optim: torch.optim.Optimizer, net: SiameseNet, config: TrainConfig, kept: Mapping[str, Tensor]) -> None:
    """The inverse of `memory`: take over what of a checkpoint's tensors is the optimizer's."""
    for of, parameter in net.named_parameters():
        for key, name in _KEYS[config.optimizer].items():
            if (saved := kept.get(f"{name}.{of}")) is not None:
                like = parameter if name != "count" else saved.to(parameter.device)
                optim.state[parameter][key] = torch.empty_like(like).copy_(saved)
