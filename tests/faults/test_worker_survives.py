"""What a worker process keeps through signals, a server that goes away, and a database that does."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.service import Service, service, study

LONG = {"epochs": 400, "pairs_per_epoch": 480, "checkpoint_every_s": 0.05}
"""A trial that would take far longer than any test waits for it."""


def launch(running: Service, **settings: Any) -> int:
    with running.client() as client:
        return int(client.post("/api/v1/studies", json=study(trials=1, **settings))["study"])


def trial(running: Service, number: int) -> dict[str, Any]:
    with running.client() as client:
        items = client.get(f"/api/v1/studies/{number}/trials")["items"]
        return (
            dict(client.get(f"/api/v1/studies/{number}/trials/0"))
            if items
            else {"history": [], "state": "", "curve": []}
        )


def saved(running: Service, number: int) -> int:
    """Epochs in the newest checkpoint that the coordinator knows of."""
    history = trial(running, number)["history"]
    return int(history[-1]["checkpoint_epoch"] or 0) if history else 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_mid_trial_hands_it_back_and_the_next_worker_resumes(
    tmp_path: Path, postgres_url: str, how: signal.Signals
) -> None:
    with service(tmp_path / "home", postgres_url, term_s=30.0) as running:
        number = launch(running, **LONG)
        worker = running.start_worker("w1")
        running.until(lambda: saved(running, number) >= 2, "no checkpoint was reported")
        worker.send_signal(how)
        assert worker.wait(60) == 0
        seen = trial(running, number)
        assert seen["state"] == "queued", "handed back, and not left to run out"
        (attempt,) = seen["history"]
        assert attempt["state"] == "released"
        left_at = attempt["checkpoint_epoch"]
        assert left_at >= 2
        assert left_at == len(seen["curve"]), "every epoch of the checkpoint was reported before"

        running.start_worker("w2")
        running.until(lambda: len(trial(running, number)["curve"]) > left_at + 1, "it did not go on")
        seen = trial(running, number)
        assert seen["history"][1]["resumed_from"] == 1
        assert [point["epoch"] for point in seen["curve"]] == list(range(len(seen["curve"])))
        assert [point["attempt"] for point in seen["curve"]] == sorted(point["attempt"] for point in seen["curve"])
        first = next(point for point in seen["curve"] if point["attempt"] == 2)
        assert first["epoch"] == left_at


def test_a_restart_of_the_api_mid_trial_loses_no_report(tmp_path: Path, postgres_url: str) -> None:
    epochs = 25
    with service(tmp_path / "home", postgres_url, term_s=5.0) as running:
        number = launch(running, epochs=epochs, pairs_per_epoch=320, checkpoint_every_s=5)
        running.start_worker("w1")
        running.until(lambda: len(trial(running, number)["curve"]) >= 3, "nothing was reported")
        running.kill_api()
        time.sleep(5.5)  # longer than the term
        running.start_api()
        running.until(lambda: trial(running, number)["state"] == "complete", "the trial did not finish")
        seen = trial(running, number)
        assert [point["epoch"] for point in seen["curve"]] == list(range(epochs))
        assert [attempt["state"] for attempt in seen["history"]] == ["complete"], "one attempt: the lease was kept"


def test_a_worker_that_is_started_before_the_api_waits_and_then_works(tmp_path: Path, postgres_url: str) -> None:
    with service(tmp_path / "home", postgres_url) as running:
        number = launch(running)
        running.kill_api()
        worker = running.start_worker("early", "--once")
        running.until(lambda: "waiting for the server" in running.log("early"), "it did not say that it waits")
        time.sleep(1.0)
        assert worker.poll() is None
        assert running.log("early").count("waiting for the server") == 1
        running.start_api()
        assert worker.wait(240) == 0, running.log("early")
        assert trial(running, number)["state"] == "complete"


def test_a_stalled_trial_is_released_and_its_worker_ends(tmp_path: Path, postgres_url: str) -> None:
    """A step that takes longer than the coordinator allows, here of a network far too large for its term."""
    with service(tmp_path / "home", postgres_url, term_s=30.0, stall_s=1.0) as running:
        conv = [{"filters": 64, "kernel": 5, "pool": False}, {"filters": 128, "kernel": 5, "pool": False}]
        number = launch(running, net={"input": 105, "conv": conv, "fc": 64}, validation_tasks=2000, way=20)
        worker = running.start_worker("slow")
        assert worker.wait(240) == 4, running.log("slow")
        seen = trial(running, number)
        assert seen["history"][0]["state"] == "stalled"
        assert seen["state"] == "queued"
        assert "made no step" in running.log("slow")
