"""The updates: the paper's momentum SGD, or Adam, with a rate, a momentum and an L2 strength by layer.

    dw(t) = -eta_j * (gradient + 2 lambda_j w) + mu_j dw(t-1)        (Koch et al. 2015, section 3.2)

Promise: each layer is its own parameter group, L2 acts on weights and never on biases, and in an epoch the rates
depend on the epoch's number alone, so a resumed run uses the same ones. torch keeps dw(t-1) / eta, so what momentum
carries from one epoch into the next decays with eta: by 1%, for the few steps that it lasts. Adam (Kingma and Ba 2015)
takes mu for beta1 and adds L2 to the gradient, as its first ports did.

On a CUDA device the rates are tensors there: a CUDA graph of an update reads them anew each time, so that one graph
serves all epochs. Both kinds of optimizer compute the same and remember the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.net import SiameseNet
from model.spec import LayerRates, TrainConfig

_BETA2, _EPSILON = 0.999, 1e-8
_KEYS = {"sgd": {"momentum_buffer": "momentum"}, "adam": {"exp_avg": "mean", "exp_avg_sq": "square", "step": "count"}}
"""What an optimizer remembers of a parameter, and the names of it in a checkpoint."""


def optimizer(net: SiameseNet, config: TrainConfig, *, resident: bool | None = None) -> torch.optim.Optimizer:
    """Two groups a layer, {"label": ..., weights with weight_decay 2 lambda_j | biases with none}.

    `resident`: the rates as tensors on the network's device; as a rule where that is CUDA.
    """
    groups = []
    for rates in config.layers:
        weight = net.layer(rates.label).weight
        groups.append({"params": [weight], "label": rates.label, "weight_decay": rates.weight_decay})
        groups.append({"params": net.others(rates.label), "label": rates.label, "weight_decay": 0.0})
    optim: torch.optim.Optimizer
    if net.device.type == "cuda" if resident is None else resident:
        optim = (ResidentSGD if config.optimizer == "sgd" else ResidentAdam)(groups)
    else:
        optim = (torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam)(groups, lr=0.0, fused=True)
    schedule(optim, config, 0)
    return optim


def schedule(optim: torch.optim.Optimizer, config: TrainConfig, epoch: int) -> None:
    """Set every group's rate and momentum for an epoch, counted from 0."""
    rates = {layer.label: layer for layer in config.layers}
    for group in optim.param_groups:
        layer = rates[group["label"]]
        eta, mu = learning_rate(layer, config, epoch), momentum(layer, config, epoch)
        if isinstance(optim, _Resident):
            group["lr"].fill_(eta)
            group["momentum"].fill_(mu)
        elif config.optimizer == "sgd":
            group["lr"], group["momentum"] = eta, mu
        else:
            group["lr"], group["betas"] = eta, (mu, _BETA2)


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
    """What the optimizer remembers, for a checkpoint: {"momentum.conv1.weight": ...}; before the first step nothing,
    or zeros.
    """
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
                state = optim.state[parameter]
                if key not in state:
                    # As fused Adam wants it, the count lies on the device too.
                    state[key] = torch.empty_like(parameter if name != "count" else saved, device=parameter.device)
                state[key].copy_(saved)  # in its place: a captured update knows no other


class _Resident(torch.optim.Optimizer):
    """An optimizer that never asks the device for a number, and whose tensors stay where they are from the start.

    Each group's lr, momentum and weight_decay are scalars on the device.
    """

    precision = torch.float32
    """Of lr and momentum."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0})
        for group in self.param_groups:
            device = group["params"][0].device
            group["decays"] = group["weight_decay"] != 0.0
            for name, dtype in (("lr", self.precision), ("momentum", self.precision), ("weight_decay", torch.float32)):
                group[name] = torch.tensor(float(group[name]), dtype=dtype, device=device)
            for parameter in group["params"]:
                self.state[parameter].update(self._begin(parameter))

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is remembered of a parameter before the first step."""
        raise NotImplementedError

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. The gradients are used up by it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                if group["decays"]:
                    gradient.addcmul_(parameter, group["weight_decay"])
                self._update(parameter, gradient, group, self.state[parameter])


class ResidentSGD(_Resident):
    """`torch.optim.SGD`. A momentum that was exactly 0 has remembered the last gradient all the same."""

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Tensor]) -> None:
        change = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        parameter.addcmul_(change, group["lr"], value=-1.0)


class ResidentAdam(_Resident):
    """`torch.optim.Adam`, its beta1 given as momentum. What is left of 1 after a beta is reckoned in float64."""

    precision = torch.float64

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": count}

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Tensor]) -> None:
        mean, square, beta1 = state["exp_avg"], state["exp_avg_sq"], group["momentum"]
        count = state["step"].add_(1.0).double()
        mean.lerp_(gradient, (1.0 - beta1).float())
        square.mul_(_BETA2).addcmul_(gradient, gradient, value=1.0 - _BETA2)
        unbiased = square.sqrt().div_((1.0 - _BETA2**count).sqrt().float()).add_(_EPSILON)
        rate = (group["lr"] / (1.0 - beta1**count)).float()
        parameter.addcmul_(mean / unbiased, rate, value=-1.0)
