"""The real service as processes: `whetstone serve` on a real PostgreSQL, `whetstone worker`s, to be killed at will."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.rest import ApiError, Client, ServerUnreachable
from tests.ports import free_port

ADMIN, WORKER = "wst_admin_of_the_fault_tests", "wst_worker_of_the_fault_tests"
PATIENCE_S = 600.0
"""For what has to come true on any machine, however slow and busy it is."""

TINY_SETTINGS: dict[str, Any] = {
    "net": {
        "input": 28,
        "conv": [{"filters": 4, "kernel": 5, "pool": True}, {"filters": 4, "kernel": 3, "pool": True}],
        "fc": 8,
    },
    "data": "strokes",
    "batch_pairs": 16,
    "pairs_per_epoch": 48,
    "epochs": 4,
    "patience": None,
    "validation_tasks": 40,
    "way": 5,
    "precision": "fp32",
    "checkpoint_every_s": 0,
    "lambda": 0.0,
}
"""A network that trains an epoch in a few milliseconds, with a checkpoint at every step."""

SPACE: list[dict[str, Any]] = [
    {
        "name": "eta",
        "type": "float",
        "low": 1e-3,
        "high": 1e-1,
        "log": True,
        "labels": ["conv1", "conv2", "fc", "output"],
    },
    {"name": "mu", "type": "float", "low": 0.0, "high": 0.9},
]


def study(name: str = "tiny", *, trials: int = 4, **settings: Any) -> dict[str, Any]:
    return {
        "name": name,
        "workload": "siamese",
        "sampler": {"name": "random"},
        "seed": 5,
        "space": SPACE,
        "settings": TINY_SETTINGS | settings,
        "budget": {"trials": trials},
    }


@dataclass
class Service:
    """One database, one address, one home; an API process and workers that come and go."""

    home: Path
    database_url: str
    port: int
    term_s: float
    stall_s: float = 600.0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    api: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WHETSTONE_")}
        return kept | {
            "DATABASE_URL": self.database_url,
            "WHETSTONE_HOME": str(self.home),
            "WHETSTONE_ADMIN_TOKEN": ADMIN,
            "WHETSTONE_WORKER_TOKEN": WORKER,
            "WHETSTONE_LEASE_TERM_S": str(self.term_s),
            "WHETSTONE_HEARTBEAT_S": str(self.term_s / 4),
            "WHETSTONE_STALL_S": str(self.stall_s),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def client(self) -> Client:
        return Client(self.url, ADMIN, patience_s=20.0)

    def start(self, *arguments: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment | environment,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_api(self) -> None:
        self.api = self.start("serve", "--port", str(self.port), log="api")
        with Client(self.url, ADMIN, patience_s=0.0) as client:
            self.until(lambda: answers(client), "the API does not answer")

    def kill_api(self) -> None:
        assert self.api is not None
        self.api.kill()
        self.api.wait(60)

    def start_worker(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        given = ("--url", self.url, "--device", "cpu", "--name", name, "--threads", "1", *arguments)
        return self.start("worker", *given, log=name, **{"WHETSTONE_TOKEN": WORKER, **environment})

    def log(self, name: str) -> str:
        path = self.home / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for something that has to come true; fails with the processes' last words."""
        end = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > end or (self.api is not None and self.api.poll() not in (None, -signal.SIGKILL)):
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.home.glob("*.log")
                )
                raise AssertionError(f"{what} within {PATIENCE_S:g} s\n{logs}")
            time.sleep(0.02)
        return found

    def stop(self) -> None:
        """End the workers, who hand their trials back, and then the API."""
        for processes in ([each for each in self.processes if each is not self.api], self.processes):
            for process in processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 12
            for process in processes:
                try:
                    process.wait(max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def answers(client: Client) -> bool:
    try:
        client.once("GET", "/readyz", timeout_s=2.0)
    except (ServerUnreachable, ApiError):
        return False
    return True


@contextmanager
def service(home: Path, database_url: str, *, term_s: float = 30.0, stall_s: float = 600.0) -> Iterator[Service]:
    """A service whose API runs; everything it started has ended when the block is left."""
    home.mkdir(parents=True, exist_ok=True)
    made = Service(home, database_url, free_port(), term_s, stall_s)
    try:
        made.start_api()
        yield made
    finally:
        made.stop()
