"""The network computes what the paper says, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.geometry import NETS, Conv, NetConfig
from model.init import initialise
from model.net import SiameseNet
from tests.unit.siamese import SIDE

CONFIG = NetConfig(SIDE, (Conv(4, 3, "floor"), Conv(6, 3, "ceil"), Conv(5, 2)), (8,))


def seeded(config: NetConfig = CONFIG, scheme: str = "he", seed: int = 0) -> SiameseNet:
    net = SiameseNet(config)
    initialise(net, scheme, torch.Generator().manual_seed(seed))
    return net


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_network_has_as_many_parameters_as_its_geometry_says(name: str) -> None:
    config = NETS[name]
    with torch.device("meta"):
        net = SiameseNet(config)
    assert sum(parameter.numel() for parameter in net.parameters()) == config.parameters
    assert net.layer("fc").weight.shape == (config.embedding, config.features)


def test_it_computes_the_paper_s_formula() -> None:
    """ReLU and then pooling, each twin by itself, p = sigmoid(sum_j alpha_j |h1_j - h2_j| + bias)."""
    net, x = seeded(), images(6)

    def twin(x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(F.conv2d(x, net.layer("conv1").weight, net.layer("conv1").bias)), 2)
        x = F.max_pool2d(F.relu(F.conv2d(x, net.layer("conv2").weight, net.layer("conv2").bias)), 2, ceil_mode=True)
        x = F.relu(F.conv2d(x, net.layer("conv3").weight, net.layer("conv3").bias))
        return torch.sigmoid(F.linear(x.flatten(1), net.fc.weight, net.fc.bias))

    distance = (twin(x[:3]) - twin(x[3:])).abs()
    expected = distance @ net.output.weight[0] + net.output.bias
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net.on("cpu")(x), expected)


def test_neither_twin_is_the_first() -> None:
    net, x = seeded(), images(6)
    torch.testing.assert_close(net(x), net(torch.cat([x[3:], x[:3]])))


def test_features_and_logits_stay_fp32_under_bf16() -> None:
    net, x = seeded(), images(6)
    with torch.autocast("cpu", torch.bfloat16):
        h = net.embed(x)
        logits = net(x)
    assert h.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, net(x), atol=0.05, rtol=0.05)


def test_an_impossible_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match="conv1 runs out of pixels"):
        SiameseNet(NetConfig(8, (Conv(4, 9),), (8,)))


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = seeded(), seeded(), seeded(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.fc.weight, other.fc.weight)


def test_the_paper_s_initialisation_has_its_means_and_deviations() -> None:
    net = seeded(NETS["mini"], "paper")
    for label in net.labels:
        layer = net.layer(label)
        wanted = 0.01 if label.startswith("conv") else 0.2
        assert layer.weight.mean().item() == pytest.approx(0.0, abs=4 * wanted / layer.weight.numel() ** 0.5)
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.15)
        assert layer.bias is not None
        assert layer.bias.mean().item() == pytest.approx(0.5, abs=0.04)
    biases = torch.cat([p for name, p in net.named_parameters() if name.endswith("bias")])
    assert biases.std().item() == pytest.approx(0.01, rel=0.15)


def test_he_s_initialisation_keeps_the_size_of_a_signal() -> None:
    net = seeded(NETS["mini"])
    x = F.relu(torch.randn(16, 32, 12, 12, generator=torch.Generator().manual_seed(0)))
    y = F.relu(net.layer("conv2")(x))
    assert y.square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.3)
    assert net.layer("conv2").bias is not None
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_an_untrained_network_of_he_s_takes_likeness_for_likeness() -> None:
    """A larger distance means a smaller logit from the start: every head weight is negative."""
    net, x = seeded(), images(2)
    assert (net.output.weight < 0).all()
    assert net(torch.cat([x[:1], x[:1]])).item() == 0.0
    assert net(x).item() < 0.0


def test_an_unknown_initialisation_is_refused() -> None:
    with pytest.raises(ValueError, match="xavier"):
        initialise(SiameseNet(CONFIG), "xavier", torch.Generator())
