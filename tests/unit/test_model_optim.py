"""eta, mu and lambda act by layer, as section 3.2 of the paper gives them."""

from __future__ import annotations

import pytest
import torch

from model.init import initialise
from model.net import SiameseNet
from model.optim import optimizer, schedule
from model.spec import TrainConfig, config
from tests.unit.siamese import TINY

LABELS = ("conv1", "conv2", "fc", "output")
POINT = {
    "eta": dict(zip(LABELS, (0.1, 0.2, 0.3, 0.4), strict=True)),
    "mu": dict(zip(LABELS, (0.9, 0.0, 0.5, 1.0), strict=True)),
    "lambda": dict(zip(LABELS, (0.01, 0.02, 0.03, 0.04), strict=True)),
}


def setup(**settings: object) -> tuple[TrainConfig, SiameseNet, torch.optim.SGD]:
    recipe = config(POINT, {**TINY, "momentum_epochs": 4, **settings}, 0)
    net = SiameseNet(recipe.net)
    initialise(net, "he", torch.Generator().manual_seed(0))
    return recipe, net, optimizer(net, recipe)


def test_every_layer_has_its_own_rate_momentum_and_decay() -> None:
    recipe, net, sgd = setup()
    schedule(sgd, recipe, 4)
    by_parameter = {id(p): group for group in sgd.param_groups for p in group["params"]}
    assert len(by_parameter) == len(list(net.parameters()))
    for label in LABELS:
        weight, bias = by_parameter[id(net.layer(label).weight)], by_parameter[id(net.layer(label).bias)]
        for group in (weight, bias):
            assert group["lr"] == pytest.approx(POINT["eta"][label] * 0.99**4)
            assert group["momentum"] == POINT["mu"][label]
        assert weight["weight_decay"] == pytest.approx(2 * POINT["lambda"][label])
        assert bias["weight_decay"] == 0.0


def test_momentum_ramps_from_a_half_and_falls_where_mu_is_smaller() -> None:
    recipe, _, sgd = setup()
    seen: dict[str, list[float]] = {label: [] for label in LABELS}
    for epoch in range(6):
        schedule(sgd, recipe, epoch)
        for group in sgd.param_groups[::2]:
            seen[group["label"]].append(group["momentum"])
    assert seen["conv1"] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])
    assert seen["conv2"] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0, 0.0])
    assert seen["fc"] == [0.5] * 6
    assert seen["output"] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])


def test_without_a_ramp_momentum_is_mu_from_the_first_step() -> None:
    _, _, sgd = setup(momentum_epochs=0)
    assert [group["momentum"] for group in sgd.param_groups[::2]] == [0.9, 0.0, 0.5, 1.0]


def test_the_rate_decays_by_a_hundredth_each_epoch() -> None:
    recipe, _, sgd = setup()
    for epoch in (0, 1, 50):
        schedule(sgd, recipe, epoch)
        assert sgd.param_groups[0]["lr"] == pytest.approx(0.1 * 0.99**epoch, rel=1e-12)


def test_an_update_is_the_paper_s_formula() -> None:
    """dw(t) = -eta (g + 2 lambda w) + mu dw(t-1), and without lambda for a bias; three steps of it."""
    recipe, net, sgd = setup(momentum_epochs=0)
    generator = torch.Generator().manual_seed(1)
    expected = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    change = {name: torch.zeros_like(value) for name, value in expected.items()}
    rates = {layer.label: layer for layer in recipe.layers}
    for _ in range(3):
        for name, parameter in net.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            layer = rates[name.split(".")[0]]
            decay = 2 * layer.lam * expected[name] if name.endswith("weight") else 0.0
            change[name] = -layer.eta * (parameter.grad.double() + decay) + layer.mu * change[name]
            expected[name] = expected[name] + change[name]
        sgd.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
