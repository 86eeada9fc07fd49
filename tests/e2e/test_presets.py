"""The paper's own sweep, for real: its network, its space and its sampler, through API and worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import presets
from tests.faults.service import Service, service


@pytest.fixture
def running(tmp_path: Path, postgres_url: str) -> Iterator[Service]:
    with service(tmp_path, postgres_url) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["koch2015"])
def test_one_trial_of_the_papers_sweep_runs_through_api_and_worker(running: Service, name: str) -> None:
    data = "omniglot" if os.environ.get("WHETSTONE_DATA") else "strokes"
    settings = {"epochs": 1, "pairs_per_epoch": 256, "validation_tasks": 320, "data": data}
    with running.client() as client:
        made = client.post("/api/v1/studies", json={"preset": name, "settings": settings, "budget": {"trials": 1}})
        assert made["sampler"] == "gp"
        worker = running.start_worker("paper", WHETSTONE_DATA=os.environ.get("WHETSTONE_DATA", ""))
        path = f"/api/v1/studies/{made['study']}"
        running.until(lambda: client.get(path)["state"] == "finished", "the trial did not finish")
        trial = client.get(f"{path}/trials/0")
    labels = ["conv1", "conv2", "conv3", "conv4", "fc", "output"]
    for vector in presets.load_all()[name]["space"]:
        values = trial["params"][vector["name"]]
        assert list(values) == labels
        assert all(vector["low"] <= value <= vector["high"] for value in values.values())
    assert trial["state"] in ("complete", "infeasible"), trial["reason"]
    assert len(trial["curve"]) == 1 or trial["state"] == "infeasible"
    assert worker.poll() is None
