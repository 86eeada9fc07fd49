"""A dead run ends within 300 steps of its death; a slow one lives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import strokes
from model.checkpoint import Checkpoints
from model.health import EVERY, Health
from model.init import initialise
from model.net import SiameseNet
from model.pairs import PairSampler
from model.spec import config
from model.train import FitResult, fit
from tests.unit.siamese import POINT, TINY, dataset

DATA = dataset()
LONG = {**TINY, "epochs": 50, "pairs_per_epoch": 80, "patience": None}
FINE = torch.tensor(0.7)


def network(scheme: str = "he") -> SiameseNet:
    net = SiameseNet(config(POINT, TINY, 0).net)
    initialise(net, scheme, torch.Generator().manual_seed(0))
    return net


def watch(later: bool = False) -> Health:
    first, second, _ = PairSampler(DATA.train, 16).draw(torch.Generator().manual_seed(0))
    return Health(DATA.train.flat[torch.cat([first, second])], later=later)


def fill(net: SiameseNet, value: float) -> None:
    with torch.no_grad():
        net.output.weight.fill_(value)


def test_a_healthy_network_passes() -> None:
    health = watch()
    for step in (100, 200, 300):
        assert health.check(network(), FINE, step) is None
    assert health.tied_at is None


def test_ties_at_two_checks_in_a_row_are_death_and_at_one_are_not() -> None:
    net, health = network(), watch()
    fill(net, 0.0)
    assert health.check(net, FINE, 100) is None
    fill(net, -1.0)
    assert health.check(net, FINE, 200) is None
    fill(net, 0.0)
    assert health.check(net, FINE, 300) is None
    assert health.check(net, FINE, 400) == (
        "collapsed: all similarities of a probe batch were exactly equal at steps 300 and 400"
    )


def test_saturated_similarities_are_tied_though_their_logits_are_not() -> None:
    """Weights of 2.5e8 with a finite loss were seen: finite is not healthy."""
    net, health = network(), watch()
    fill(net, 1e30)
    with torch.no_grad():
        net.output.bias.fill_(1e30)
    assert health.check(net, FINE, 100) is None
    assert "collapsed" in (health.check(net, FINE, 200) or "")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    net = network()
    assert watch().check(net, torch.tensor(value), 100) == "diverged: the loss is not finite (step 100)"
    with torch.no_grad():
        net.layer("conv2").weight[0, 0, 0, 0] = value
        net.fc.bias[0] = value
    assert watch().check(net, FINE, 100) == "diverged: weights of conv2, fc are not finite (step 100)"
    assert watch().finite(net, FINE, 100) is not None


def test_finite_weights_whose_similarities_overflow_are_dead() -> None:
    net = network()
    with torch.no_grad():
        for label in ("conv1", "conv2", "fc"):
            net.layer(label).weight.mul_(1e30)
    assert watch().check(net, FINE, 100) is not None


def test_a_check_that_is_not_waited_for_tells_the_same_one_check_later() -> None:
    """As on CUDA: ties at 200 and 300 are told at 400, what is not finite at the next check, or at the epoch's end."""
    net, health = network(), watch(later=True)
    assert health.check(net, FINE, 100) is None
    fill(net, 0.0)
    assert health.check(net, FINE, 200) is None
    assert health.check(net, FINE, 300) is None
    told = "collapsed: all similarities of a probe batch were exactly equal at steps 200 and 300"
    assert health.check(network(), FINE, 400) == told
    sick = watch(later=True)
    assert sick.check(network(), torch.tensor(torch.nan), 100) is None
    assert sick.finite(network(), FINE, 130) == "diverged: the loss is not finite (step 100)"


def test_a_checkpoint_between_two_checks_holds_what_the_last_one_found() -> None:
    """Also where nobody has looked at it yet; and a death that the checkpoint was first to learn of is still told."""
    net, health = network(), watch(later=True)
    fill(net, 0.0)
    assert health.check(net, FINE, 100) is None
    assert health.tied_at == 100
    assert health.check(net, FINE, 200) is None
    assert health.tied_at == 200
    assert "steps 100 and 200" in (health.finite(net, FINE, 250) or "")


def run(point: dict[str, Any], settings: dict[str, Any], store: Checkpoints | None = None) -> FitResult:
    return fit(config(point, settings, 0), DATA, lambda epoch, metrics: None, store=store)


def test_a_diverging_run_is_infeasible_with_its_reason() -> None:
    result = run({"eta": 1e30, "mu": 0.9, "lambda": 0}, LONG)
    assert result.outcome == "infeasible"
    step = re.search(r"diverged: .* not finite \(step (\d+)\)", result.reason)
    assert step is not None
    assert int(step[1]) <= EVERY


def test_a_run_that_explodes_to_finite_weights_is_infeasible() -> None:
    """L2 with 2 lambda eta beyond 2 flips and grows every weight, and the sigmoidal units saturate."""
    result = run({"eta": {"conv1": 5.0, "conv2": 5.0, "fc": 5.0, "output": 1e-9}, "mu": 0.0, "lambda": 0.01}, LONG)
    assert result.outcome == "infeasible", result
    assert int(re.findall(r"step\w* .*?(\d+)\)?$", result.reason)[0]) <= 300


@pytest.mark.parametrize(("wound", "word"), [("fc.bias", "collapsed"), ("conv1.weight", "diverged")])
def test_a_death_in_mid_run_is_found_within_300_steps_of_its_onset(tmp_path: Path, wound: str, word: str) -> None:
    """A healthy run is stopped at step 137, mortally changed, and resumed."""
    asked = 0

    def at_step_137() -> bool:
        nonlocal asked
        asked += 1
        return asked > 137 + 13 * 2  # each of the 13 epochs before is measured, with two more questions

    settings, store = LONG, Checkpoints(tmp_path)
    fit(config(POINT, settings, 0), DATA, lambda epoch, metrics: None, store=store, interrupt=at_step_137)
    state = store.read_last()
    onset = state.epoch * 10 + state.step
    assert onset == 137
    tensors = dict(state.tensors)
    value = 1e9 if word == "collapsed" else torch.nan
    tensors[f"net.{wound}"] = torch.full_like(tensors[f"net.{wound}"], value)
    store.save_last(replace(state, tensors=tensors))
    result = run(POINT, settings, store)
    assert result.outcome == "infeasible"
    assert word in result.reason
    assert result.epochs * 10 - onset <= 300
    died = int(re.findall(r"(\d+)\)?$", result.reason)[0])
    assert died - onset <= 300


def test_a_death_is_found_at_the_same_step_across_an_interrupt(tmp_path: Path) -> None:
    net_dead = {"eta": {"conv1": 5.0, "conv2": 5.0, "fc": 5.0, "output": 1e-9}, "mu": 0.0, "lambda": 0.01}
    unbroken = run(net_dead, LONG)
    store = Checkpoints(tmp_path)
    for questions in (60, 60, 60):
        left = questions

        def soon() -> bool:
            nonlocal left
            left -= 1
            return left < 0

        stopped = fit(config(net_dead, LONG, 0), DATA, lambda e, m: None, store=store, interrupt=soon)
        if stopped.outcome != "stopped":
            break
    result = run(net_dead, LONG, store)
    assert (result.outcome, result.reason) == (unbroken.outcome, unbroken.reason)


def test_the_paper_s_slow_start_is_not_death() -> None:
    """Its initialisation stays at loss 0.69 for hundreds of steps, in bf16 too: four checks, and all of them passed."""
    data = strokes.generate(28)
    settings = {"net": "mini", "init": "paper", "batch_pairs": 8, "pairs_per_epoch": 1600, "epochs": 2}
    losses: list[float] = []
    recipe = config({"eta": 1e-3, "mu": 0.5, "lambda": 1e-5}, {**settings, "validation_tasks": 50}, 0)
    result = fit(recipe, data, lambda epoch, metrics: losses.append(metrics["loss"]))
    assert result.outcome == "complete", result.reason
    assert losses[1] == pytest.approx(0.693, abs=0.04)
