"""The network computes what the paper says, whichever way it is computed."""

from __future__ import annotations

from dataclasses import replace

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


SIBLINGS = {
    "colour": replace(CONFIG, channels=3),
    "two layers": replace(CONFIG, fc=(10, 7), dropout=0.5),
    "normalised batches": replace(CONFIG, norm="batch"),
    "classifier": replace(CONFIG, head="classes", classes=5),
    "no head": replace(CONFIG, head="none", distance="l2", activation="none", normalise=True),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_has_the_layers_and_parameters_that_its_geometry_says(name: str) -> None:
    config = SIBLINGS[name]
    net = seeded(config)
    assert sum(parameter.numel() for parameter in net.parameters()) == config.parameters
    assert {name.split(".")[0].removesuffix("_norm") for name, _ in net.named_parameters()} == set(config.labels)
    x = torch.rand(4, config.channels, SIDE, SIDE)
    assert net.embed(x).shape == (4, config.embedding)
    assert net(x).shape == (2,)


def test_batches_are_normalised_after_the_pooling_and_the_relu() -> None:
    net, x = seeded(replace(CONFIG, norm="batch")), images(6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))

    def formula(x: torch.Tensor) -> torch.Tensor:
        for label, layer in zip(net.config.convolutions, net.config.conv, strict=True):
            x = F.conv2d(x, net.layer(label).weight, net.layer(label).bias)
            if layer.pool != "none":
                x = F.max_pool2d(x, 2, ceil_mode=layer.pool == "ceil")
            x = F.relu(x)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            norm = net.get_submodule(f"{label}_norm")
            scale, shift = (p.view(1, -1, 1, 1) for p in (norm.weight, norm.bias))
            x = (x - mean) / (variance + norm.eps).sqrt() * scale + shift
        return torch.sigmoid(F.linear(x.flatten(1), net.fc.weight, net.fc.bias))

    torch.testing.assert_close(net.embed(x, torch.Generator()), formula(x))


@pytest.mark.parametrize("distance", ["l1", "l2", "squared", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
def test_what_is_more_alike_has_the_larger_similarity_whatever_the_distance(distance: str, normalise: bool) -> None:
    wide = (Conv(16, 3, "floor"), Conv(16, 3))
    net = seeded(replace(CONFIG, conv=wide, head="none", distance=distance, normalise=normalise, activation="none"))
    x = images(3)
    h = net.embed(torch.cat([x[:1], x[:1] * 0.9 + x[1:2] * 0.1, x[2:]]))
    if normalise:
        torch.testing.assert_close(h.norm(dim=1), torch.ones(3))
    near, far = net.compare(h[0], h[1]), net.compare(h[0], h[2])
    assert near.shape == ()
    assert net.compare(h[0], h[0]) > near > far
    rows = net.compare(h[:, None], h[None, :])
    assert rows.shape == (3, 3)
    torch.testing.assert_close(rows, rows.T)
    assert rows[0, 1] == near


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    net = seeded(replace(CONFIG, fc=(2000, 8), dropout=0.25, activation="none"))
    x = images(4)
    seen: list[torch.Tensor] = []
    net.get_submodule("fc2").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net.embed(x)
    net.embed(x, torch.Generator().manual_seed(0))
    plain, dropped = seen
    alive = plain > 0
    assert (dropped[alive] == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    kept = alive & (dropped > 0)
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_he_s_weights_are_wider_before_a_relu_also_that_of_the_embedding(activation: str) -> None:
    net = seeded(replace(CONFIG, fc=(300, 200), activation=activation, head="none"))
    wanted = 2.0 if activation == "relu" else 1.0
    assert net.layer("fc1").weight.std().item() * net.config.features**0.5 == pytest.approx(2.0**0.5, rel=0.1)
    assert net.layer("fc2").weight.std().item() * 300**0.5 == pytest.approx(wanted**0.5, rel=0.1)


def test_the_keras_port_s_start_is_its_own() -> None:
    net = seeded(NETS["mini"], "keras2017")
    for label in net.labels:
        layer = net.layer(label)
        assert layer.bias is not None
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert layer.bias.mean().item() == pytest.approx(0.0 if label == "conv1" else 0.5, abs=0.03)
    assert not net.layer("conv1").bias.any()
