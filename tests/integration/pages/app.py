"""An app with the Siamese workload for the tests of its pages, and a client that behaves as a browser does."""

from __future__ import annotations

import hashlib
import re
from html import unescape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from api.auth import OneTimeLink
from hpo.coordinator import Coordinator
from hpo.protocol import ClaimRequest, EpochReport, ReportRequest, TellRequest
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
WORKER = Principal(id="test:worker", role="worker", name="worker")
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


def text_of(page: str) -> str:
    """What a reader sees: markup gone, entities read, white space folded."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def trained(hpo: Coordinator, worker: str = "w1", **told: Any) -> tuple[int, int]:
    """Claim a trial, report two epochs and tell its outcome. Returns (study, trial)."""
    lease = hpo.claim(ClaimRequest(worker=worker, device="cpu"), WORKER)
    assert lease is not None
    epochs = [
        EpochReport(epoch=n, value=0.3 + 0.1 * n, metrics={"accuracy": 0.3 + 0.1 * n, "loss": 0.6 - 0.1 * n})
        for n in (0, 1)
    ]
    hpo.report(lease.lease, ReportRequest(token=lease.token, reports=epochs, checkpoint_epoch=1), WORKER)
    outcome = {"outcome": "complete", "value": 0.713, **told}
    hpo.tell(lease.lease, TellRequest(token=lease.token, **outcome), WORKER)
    return lease.study, lease.trial


def form(**over: str) -> dict[str, str]:
    """The launch form as a browser sends it."""
    return {"preset": "mini", "document": "", "name": "", **over}
