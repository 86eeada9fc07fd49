"""An app with the Siamese workload for the tests of its pages, and a client that behaves as a browser does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from api.auth import OneTimeLink
from hpo.coordinator import Coordinator
from hpo.tokens import Principal
from model.spec import SiameseWorkload

SECRETS = {role: f"wst_pages-{role}-of-this-process" for role in ("admin", "worker", "viewer")}
EXTERNAL: dict[str, Any] = {
    "name": "mine",
    "workload": "external",
    "sampler": "random",
    "space": [{"name": "x", "type": "float", "low": 0.0, "high": 1.0}],
}
LAYERS = ["conv1", "conv2", "conv3", "conv4", "fc", "output"]
SIAMESE: dict[str, Any] = {
    "name": "digits",
    "workload": "siamese",
    "sampler": "random",
    "space": [
        {"name": "eta", "type": "float", "low": 1e-4, "high": 0.1, "log": True, "labels": LAYERS},
        {"name": "mu", "type": "float", "low": 0.0, "high": 0.95, "labels": LAYERS},
        {"name": "lambda", "type": "float", "low": 1e-6, "high": 1e-2, "log": True, "labels": LAYERS},
    ],
    "settings": {"net": "mini", "epochs": 2},
    "budget": {"trials": 3},
}
PRESETS = {"mini": {**SIAMESE, "name": "mini"}}


def make_app(engine: Engine, artifacts: Path, one_time: OneTimeLink | None = None, term_s: float = 30.0) -> FastAPI:
    """The app as `serve` composes it, with one token for each role."""
    return create_app(
        Coordinator(engine, {"siamese": SiameseWorkload()}, term_s=term_s),
        engine,
        presets=PRESETS,
        artifacts=artifacts,
        process_tokens={
            hashlib.sha256(secret.encode()).hexdigest(): Principal(id=f"process:{role}", role=role, name=role)  # type: ignore[arg-type]
            for role, secret in SECRETS.items()
        },
        one_time=one_time,
        version="0.0.test",
    )


def browser(app: FastAPI) -> TestClient:
    """A client that says what a browser says of its requests, and follows no redirect."""
    headers = {"accept": "text/html,application/xhtml+xml", "sec-fetch-site": "same-origin"}
    return TestClient(app, headers=headers, follow_redirects=False, raise_server_exceptions=False)


def sign_in(client: TestClient, role: str) -> None:
    answer = client.post("/login", data={"token": SECRETS[role]})
    assert answer.status_code == 303, answer.text
