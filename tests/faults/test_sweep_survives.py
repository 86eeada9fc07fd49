"""A sweep outlives its processes: a worker killed in the middle of a trial, and the API killed and started again."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.faults.service import Service, service, study

TRIALS, EPOCHS = 24, 8
TERM_S = 6.0


def victim(running: Service, number: int, worker: str) -> dict[str, Any] | None:
    """The trial that `worker` is in the middle of, once it has left a checkpoint to go on from."""
    with running.client() as client:
        for trial in client.get(f"/api/v1/studies/{number}/trials", params={"state": "leased"})["items"]:
            if trial["worker"] == worker and 1 <= (trial["epoch"] or 0) < EPOCHS // 2:
                detail: dict[str, Any] = client.get(f"/api/v1/studies/{number}/trials/{trial['trial']}")
                if detail["state"] == "leased" and (detail["history"][-1]["checkpoint_epoch"] or 0) >= 1:
                    return detail
    return None


def caught(running: Service, number: int, name: str, worker: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The same with its worker stopped there: it cannot be at its tell, which follows the answer to its last report."""
    if victim(running, number, name) is None:
        return None
    worker.send_signal(signal.SIGSTOP)
    hit = victim(running, number, name)
    if hit is None:
        worker.send_signal(signal.SIGCONT)
    return hit


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_a_worker_and_of_the_api(tmp_path: Path, postgres_url: str) -> None:
    with service(tmp_path / "home", postgres_url, term_s=TERM_S) as running:
        with running.client() as client:
            number = client.post(
                "/api/v1/studies",
                json=study(trials=TRIALS, epochs=EPOCHS, pairs_per_epoch=320, checkpoint_every_s=0.05),
            )["study"]

        def finished() -> int:
            with running.client() as client:
                counts = client.get(f"/api/v1/studies/{number}")["counts"]
            return int(counts["complete"] + counts["infeasible"])

        first, _ = running.start_worker("first"), running.start_worker("second")
        hit = running.until(lambda: caught(running, number, "first", first), "the first worker is not mid-trial")
        first.kill()
        first.wait(60)
        running.start_worker("third")
        running.until(lambda: finished() >= 8, "8 trials did not finish")
        running.kill_api()
        time.sleep(TERM_S)
        running.start_api()
        running.until(lambda: finished() >= TRIALS, f"{TRIALS} trials did not finish")

        with running.client() as client:
            end = client.get(f"/api/v1/studies/{number}")
            trials = list(client.pages(f"/api/v1/studies/{number}/trials"))
            details = [client.get(f"/api/v1/studies/{number}/trials/{trial['trial']}") for trial in trials]
        assert end["state"] == "finished"
        assert sorted(trial["trial"] for trial in trials) == list(range(TRIALS)), "no number twice, none left out"
        assert end["budget"]["trials_used"] == TRIALS

        for detail in details:
            by_attempt = [(attempt["attempt"], attempt["state"]) for attempt in detail["history"]]
            if detail["trial"] != hit["trial"]:
                assert by_attempt == [(1, detail["state"])], "a restart of the API takes no trial from anybody"
            if detail["state"] == "complete":
                assert [point["epoch"] for point in detail["curve"]] == list(range(EPOCHS))

        killed = details[[detail["trial"] for detail in details].index(hit["trial"])]
        lost, resumed = killed["history"]
        assert (lost["state"], lost["worker"]) == ("lost", "first")
        assert resumed["resumed_from"] == 1
        assert resumed["state"] == killed["state"]
        if killed["state"] == "complete":
            again = [point["epoch"] for point in killed["curve"] if point["attempt"] == 2]
            assert again[0] >= 1, "it went on from the checkpoint"
            assert again == list(range(again[0], EPOCHS))

    stock = optuna.load_study(
        study_name="tiny", storage=postgres_url.replace("postgresql://", "postgresql+psycopg2://")
    )
    assert sorted(trial.number for trial in stock.trials) == list(range(TRIALS))
    assert all(trial.state.is_finished() for trial in stock.trials)
