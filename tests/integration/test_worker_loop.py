"""A worker against the real coordinator, API and PostgreSQL: one trial after another, nothing lost between them."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Engine

from hpo.coordinator import Coordinator
from hpo.rest import Client
from model.checkpoint import Checkpoints
from model.spec import SiameseWorkload
from tests.faults.service import study
from tests.integration.api_server import SECRETS, make_app, served
from workers.run import Worker, run
from workers.stop import Stop, Stopped


def made(engine: Engine) -> Any:
    app = make_app(engine)
    app.state.coordinator = Coordinator(
        engine, {"siamese": SiameseWorkload()}, term_s=60.0, heartbeat_s=1.0, stall_s=600.0
    )
    return app


def work(url: str, home: Path, trials: int, name: str = "w1") -> None:
    """Be a worker, trial by trial, in a thread of this process."""
    for _ in range(trials):
        code = run(
            url,
            SECRETS["worker"],
            name=name,
            device="cpu",
            home=home,
            artifacts=home / "artifacts",
            threads=1,
            once=True,
        )
        assert code == 0


def at(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def test_a_study_is_worked_off_with_every_epoch_and_the_best_checkpoint_kept(engine: Engine, tmp_path: Path) -> None:
    with served(made(engine)) as (url, _), Client(url, SECRETS["admin"]) as client:
        number = client.post("/api/v1/studies", json=study(trials=3, data="strokes"))["study"]
        work(url, tmp_path, 3)
        seen = client.get(f"/api/v1/studies/{number}")
        assert seen["state"] == "finished"
        assert seen["counts"]["complete"] == 3
        for trial in range(3):
            detail = client.get(f"/api/v1/studies/{number}/trials/{trial}")
            (attempt,) = detail["history"]
            assert [point["epoch"] for point in detail["curve"]] == [0, 1, 2, 3]
            assert detail["value"] == max(point["value"] for point in detail["curve"])
            assert attempt["worker"] == "w1"
            assert attempt["device"] == "cpu"
            best = Checkpoints(tmp_path / "artifacts" / detail["checkpoint"]).read_best()
            assert best.metrics["accuracy"] == detail["value"]
        (worker,) = client.get("/api/v1/workers")
        assert worker["trials_done"] == 3
        assert worker["memory_bytes"] > 10**8


def test_missing_data_hands_the_trial_back_as_it_was(engine: Engine, tmp_path: Path) -> None:
    with served(made(engine)) as (url, _), Client(url, SECRETS["admin"]) as client:
        number = client.post("/api/v1/studies", json=study(trials=1, data="omniglot"))["study"]
        code = run(url, SECRETS["worker"], device="cpu", home=tmp_path, artifacts=tmp_path / "artifacts", once=True)
        assert code == 1
        (trial,) = client.get(f"/api/v1/studies/{number}/trials")["items"]
        assert trial["state"] == "queued"
        assert client.get(f"/api/v1/studies/{number}/trials/0")["history"][0]["state"] == "released"


def test_a_study_stopped_by_a_person_ends_its_running_trial(engine: Engine, tmp_path: Path) -> None:
    with served(made(engine)) as (url, _), Client(url, SECRETS["admin"]) as client:
        number = client.post("/api/v1/studies", json=study(trials=1, epochs=100_000))["study"]
        thread = threading.Thread(target=work, args=(url, tmp_path, 1))
        thread.start()
        while not (items := client.get(f"/api/v1/studies/{number}/trials")["items"]) or not items[0]["epoch"]:
            assert thread.is_alive()
        client.patch(f"/api/v1/studies/{number}", json={"state": "stopped"})
        thread.join(120)
        assert not thread.is_alive()
        assert client.get(f"/api/v1/studies/{number}/trials/0")["state"] == "cancelled"


def test_between_two_trials_a_worker_hardly_idles(engine: Engine, tmp_path: Path) -> None:
    """By the database's clock: from the end of one trial to the lease of the next, one process, eight trials."""
    with served(made(engine)) as (url, _), Client(url, SECRETS["admin"]) as client:
        number = client.post("/api/v1/studies", json=study(trials=8, epochs=1))["study"]
        stop = Stop()

        def until_finished() -> None:
            while client.get(f"/api/v1/studies/{number}")["state"] != "finished":
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)

        worker = Worker(stop, lambda: Client(url, SECRETS["worker"]), name="w1", once=False)
        with stop.handling_signals(), suppress(Stopped):
            threading.Thread(target=until_finished, daemon=True).start()
            worker.work("cpu", data_root=None, home=tmp_path, artifacts=tmp_path / "artifacts", threads=1)
        history = [client.get(f"/api/v1/studies/{number}/trials/{trial}")["history"][0] for trial in range(8)]
        idle = [at(after["leased_at"]) - at(before["ended_at"]) for before, after in pairwise(history)]
        assert median(idle) < 0.5
