"""The paper's search over layers, through the real coordinator: what runs out of pixels is never leased."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa

from cli import presets
from hpo.coordinator import Coordinator
from hpo.errors import Invalid
from model.spec import SiameseWorkload, config
from tests.integration.leases_harness import claim, must_claim, stock, tell

PRESET = "koch2015-architecture"
RATES = {"eta": 0.01, "mu": 0.9, "lambda": 0.0}
KERNELS = ("conv1", "conv2", "conv3", "conv4")


def desk_with(engine: sa.Engine, **changes: Any) -> tuple[Coordinator, int]:
    desk = Coordinator(engine, {"siamese": SiameseWorkload()}, term_s=30.0, heartbeat_s=10.0, stall_s=300.0)
    document = presets.load_all()[PRESET] | {"seed": 3, "sampler": "random"} | changes
    return desk, desk.create_study(document).study


def pixels_left(params: Mapping[str, Any]) -> int:
    """The side of what the paper's four convolutions leave of 105 pixels, reckoned by hand; below 1: nothing."""
    side = 105
    for label in KERNELS:
        side = side - params["kernel"][label] + 1
        if label != "conv4":
            side = side // 2 if side > 0 else 0
    return side


@pytest.mark.parametrize("sampler", ["random", {"name": "tpe", "n_startup_trials": 5}])
def test_every_leased_architecture_can_be_trained(engine: sa.Engine, sampler: Any) -> None:
    """Nine random points in ten run out of pixels; TPE is told that deep stacks of large kernels are the best."""
    desk, _ = desk_with(engine, sampler=sampler, points=[], budget={"trials": 60})
    settings = presets.load_all()[PRESET]["settings"]
    for _ in range(60):
        lease = must_claim(desk)
        assert pixels_left(lease.params) >= 1, lease.params["kernel"]
        config(lease.params, lease.settings | settings, lease.seed)  # raises where it cannot be trained
        tell(desk, lease, sum(lease.params["kernel"].values()) / 80)
    assert claim(desk) is None


def test_the_search_begins_with_the_papers_layers(engine: sa.Engine) -> None:
    desk, _ = desk_with(engine)
    lease = must_claim(desk)
    net = config(lease.params, lease.settings, 0).net
    assert net.parameters == 38_951_745
    assert len(lease.params["eta"]) == 6, "the rates are the sampler's"


def test_an_impossible_point_of_ones_own_is_refused(engine: sa.Engine) -> None:
    desk, study = desk_with(engine)
    point = {"filters": 64, "kernel": 20, "fc": 4096, **RATES}
    with pytest.raises(Invalid) as refused:
        desk.add_trial(study, {"params": point})
    assert "runs out of pixels" in str(refused.value.faults[0])


@pytest.mark.parametrize("how", ["open", "whole"])
def test_an_impossible_point_that_is_queued_all_the_same_ends_without_a_worker(engine: sa.Engine, how: str) -> None:
    """By a person who leaves the rest open, or past us, by stock Optuna: no worker ever sees it."""
    desk, study = desk_with(engine, points=[])
    kernel = dict.fromkeys(KERNELS, 20)
    if how == "open":
        desk.add_trial(study, {"params": {"kernel": kernel}})
    else:
        space = presets.load_all()[PRESET]["space"]
        values = {"filters": 64, "kernel": 20, "fc": 4096, **RATES}
        flat = {
            name: values[entry["name"]]
            for entry in space
            for name in [f"{entry['name']}[{label}]" for label in entry.get("labels", [])] or [entry["name"]]
        }
        stock(engine, PRESET).enqueue_trial(flat)
    lease = must_claim(desk)
    assert lease.trial == 1
    assert pixels_left(lease.params) >= 1
    dead = desk.get_trial(study, 0)
    assert dead.state == "failed"
    assert "runs out of pixels" in dead.reason
    assert not dead.history, "no worker had it"
