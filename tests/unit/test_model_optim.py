"""eta, mu and lambda act by layer, as section 3.2 of the paper gives them."""

from __future__ import annotations

import pytest
import torch

from model.init import initialise
from model.net import SiameseNet
from model.optim import memory, optimizer, remember, schedule
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


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_rates_on_the_device_make_the_updates_of_torch_s_own_optimizer(kind: str) -> None:
    """Sixty updates over six epochs of schedules and ramps, L2 on weights alone: equal but for rounding."""
    point = {**POINT, "mu": dict(zip(LABELS, (0.9, 0.0, 0.5, 0.99), strict=True))}
    recipe = config(point, {**TINY, "momentum_epochs": 4, "optimizer": kind}, 0)
    nets = [SiameseNet(recipe.net), SiameseNet(recipe.net)]
    for net in nets:
        initialise(net, "he", torch.Generator().manual_seed(0))
    own = optimizer(nets[0], recipe)
    resident = optimizer(nets[1], recipe, resident=True)
    assert type(own) is not type(resident)
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        for optim in (own, resident):
            schedule(optim, recipe, step // 10)
        for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        own.step()
        resident.step()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=3e-6, atol=3e-6, msg=name)
    remembered = [memory(optim, net, recipe) for optim, net in zip((own, resident), nets, strict=True)]
    assert remembered[0].keys() == remembered[1].keys()
    for name, tensor in remembered[0].items():
        if name.startswith("momentum.conv2"):  # its mu is 0 at last: torch's own forgets, and neither uses it
            continue
        torch.testing.assert_close(remembered[1][name], tensor, rtol=3e-6, atol=3e-6, msg=name)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_schedule_and_a_checkpoint_leave_every_tensor_of_the_device_where_it_is(kind: str) -> None:
    """A captured update reads and writes the memory that it was captured with, and no other."""
    recipe = config(POINT | {"mu": 0.9}, {**TINY, "optimizer": kind}, 0)
    net = SiameseNet(recipe.net)
    initialise(net, "he", torch.Generator().manual_seed(0))
    resident = optimizer(net, recipe, resident=True)

    def places() -> list[int]:
        rates = [group[name] for group in resident.param_groups for name in ("lr", "momentum", "weight_decay")]
        return [tensor.data_ptr() for tensor in (*rates, *memory(resident, net, recipe).values())]

    before = places()
    kept = {name: torch.full_like(tensor, 0.25) for name, tensor in memory(resident, net, recipe).items()}
    schedule(resident, recipe, 7)
    remember(resident, net, recipe, kept)
    assert places() == before
    assert resident.param_groups[0]["lr"].item() == pytest.approx(0.1 * 0.99**7)
    assert all((tensor == 0.25).all() for tensor in memory(resident, net, recipe).values())
