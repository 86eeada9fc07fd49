"""The average follows the weights by its formula, comes back from a checkpoint, and is what is judged and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import evaluate
from model.average import Average
from model.checkpoint import Checkpoints
from model.episode import draw
from model.init import initialise
from model.net import SiameseNet
from model.spec import config
from model.train import fit
from tests.unit.siamese import POINT, TINY, dataset

DATA = dataset()


def network(seed: int = 0, **settings: object) -> SiameseNet:
    net = SiameseNet(config(POINT, {**TINY, **settings}, 0).net)
    initialise(net, "he", torch.Generator().manual_seed(seed))
    return net


def test_it_is_the_exponential_average_with_a_share_that_grows_from_a_tenth() -> None:
    net = network(norm="batch")
    average = Average(net, 0.5)
    assert average.net is not net
    expected = {name: tensor.double() for name, tensor in net.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        average.follow(step)
        share = min(0.5, (1 + step) / (10 + step))
        for name, tensor in net.state_dict().items():
            expected[name] = share * expected[name] + (1 - share) * tensor.double()
    assert share == 0.5
    for name, tensor in average.net.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_share_it_is_the_network_itself() -> None:
    net = network()
    average = Average(net, 0.0)
    average.follow(0)
    assert average.net is net
    assert average.memory() == {}


def test_it_comes_back_from_a_checkpoint_and_goes_on() -> None:
    net = network(norm="batch")
    one, other = Average(net, 0.9), Average(network(1, norm="batch"), 0.9)
    with torch.no_grad():
        net.fc.weight.add_(1)
    one.follow(5)
    kept = {name.removeprefix("average."): tensor.clone() for name, tensor in one.memory().items()}
    assert all(name.startswith("average.") for name in one.memory())
    other = Average(net, 0.9)
    other.remember(kept)
    for average in (one, other):
        average.follow(6)
    for name, tensor in one.net.state_dict().items():
        assert torch.equal(tensor, other.net.state_dict()[name]), name


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_what_is_reported_kept_and_loaded_is_the_average(tmp_path: Path, norm: str) -> None:
    recipe = config(POINT, {**TINY, "average": 0.9, "norm": norm, "validation_tasks": 200}, 0)
    heard: list[float] = []
    result = fit(recipe, DATA, lambda _, metrics: heard.append(metrics["accuracy"]), store=Checkpoints(tmp_path))
    tasks = draw(DATA.validation, 200, recipe.way, recipe.validation_seed)
    best, last = Checkpoints(tmp_path).read_best(), Checkpoints(tmp_path).read_last()
    for path, accuracy in ((tmp_path / "best.json", result.value), (tmp_path / "last.json", heard[-1])):
        net = evaluate.load(path).net
        assert evaluate.one_shot(net, DATA.validation, tasks).accuracy == accuracy
    assert torch.equal(evaluate.load(tmp_path / "last.json").net.fc.weight, last.tensors["average.fc.weight"])
    assert not torch.equal(last.tensors["average.fc.weight"], last.tensors["net.fc.weight"])
    if norm == "batch":
        assert best.weights["conv1_norm.running_mean"].any()
        assert not torch.equal(
            last.tensors["average.conv1_norm.running_var"], last.tensors["net.conv1_norm.running_var"]
        )
