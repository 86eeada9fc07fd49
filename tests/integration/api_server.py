"""An app over a real database for the API's tests: in this process, or behind a real uvicorn."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine

from api.app import create_app
from api.auth import OneTimeLink
from api.methods import http_protocol
from hpo import database
from hpo.coordinator import Coordinator
from hpo.errors import Fault
from hpo.tokens import Principal

SECRETS = {"admin": "wst_admin-of-this-process", "worker": "wst_worker-of-this-process", "viewer": "wst_viewer-here"}
BRANIN: dict[str, Any] = {
    "name": "branin",
    "workload": "bowl",
    "sampler": "random",
    "space": [
        {"name": "x", "type": "float", "low": -5.0, "high": 10.0},
        {"name": "y", "type": "float", "low": 0.0, "high": 15.0},
    ],
    "budget": {"trials": 100},
    "seed": 7,
}
EXTERNAL = BRANIN | {"name": "asked", "workload": "external"}
PRESETS = {"branin": BRANIN, "wide": BRANIN | {"name": "wide", "budget": {"trials": 5, "hours": 2.0}}}


class Bowl:
    """A workload without settings, all of whose points can be trained: for workers that are played by a test."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        return [Fault(name, "a bowl has no settings") for name in settings]

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        return None


def app_alone() -> FastAPI:
    """An app that was only composed, to look at: nothing is connected, and nothing answers at its database."""
    return make_app(database.connect("postgresql://nobody@127.0.0.1:1/nothing"))


def bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[role]}"}


def make_app(engine: Engine, artifacts: Path | str = "/nonexistent", one_time: OneTimeLink | None = None) -> FastAPI:
    """An app with one process token for each role."""
    return create_app(
        Coordinator(engine, {"bowl": Bowl()}, term_s=30.0, heartbeat_s=10.0, stall_s=600.0),
        engine,
        presets=PRESETS,
        artifacts=artifacts,
        process_tokens={
            hashlib.sha256(secret.encode()).hexdigest(): Principal(id=f"process:{role}", role=role, name=role)
            for role, secret in SECRETS.items()
        },
        one_time=one_time,
        version="0.0.test",
    )


@contextmanager
def served(app: FastAPI) -> Iterator[tuple[str, uvicorn.Server]]:
    """A real uvicorn in a thread, its address, and (once the block is left) its orderly end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            log_config=None,
            timeout_graceful_shutdown=30,
            timeout_keep_alive=60,  # as `serve` has it: longer than any client here rests
            lifespan="on",
            http=http_protocol(),
            ws="none",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + 120
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server did not start within 120 s"
            time.sleep(0.02)
        try:
            yield "http://{}:{}".format(*listener.getsockname()), server
        finally:
            app.state.waiting.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"
