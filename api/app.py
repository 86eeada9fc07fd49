"""The app: REST v1 under /api/v1, Whetlab's protocol under /api/alpha, the pages at the root, health and metrics.

`create_app` composes what it is given and opens nothing: the LISTEN connection is made when the server starts the app,
and ended when it stops it. The invariant: whatever comes in passes the body limit, and whatever fails leaves in the one
error shape.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import Engine

from api import auth, errors, limits, openapi
from api.pages import mount
from api.routes import events, files, health, leases, sign_in, studies, trials, whetlab, workers
from api.wait import Waiting
from api.whetlab import WhetlabAddresses
from hpo.coordinator import Coordinator
from hpo.tokens import Principal

log = logging.getLogger("whetstone.api")


def create_app(
    coordinator: Coordinator,
    engine: Engine,
    *,
    presets: Mapping[str, dict[str, Any]],
    artifacts: Path | str,
    process_tokens: Mapping[str, Principal],
    one_time: auth.OneTimeLink | None,
    version: str,
) -> FastAPI:
    """The ASGI app.

    `presets` are study documents by name; `artifacts` is the root of the checkpoints, a folder or an fsspec URL;
    `process_tokens` are principals by the SHA-256 (hex) of tokens that live as long as the process; `one_time` is the
    link that signs the first browser in. A server that is told to exit calls ``app.state.waiting.close()`` first, so
    that claims that wait and event streams do not hold it up (`cli serve` does).
    """
    who = auth.Auth(engine, process_tokens, one_time)
    waiting = Waiting(engine.url.render_as_string(hide_password=False), on_token=who.forget)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        auth.keep_secrets_out_of_the_access_log()
        waiting.start()
        try:
            yield
        finally:
            await waiting.stop()

    app = FastAPI(
        title="Whetstone",
        version=version,
        summary="Bayesian hyperparameter optimisation, self-hosted",
        lifespan=life,
        docs_url=None,  # the stock viewers load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.coordinator = coordinator
    app.state.engine = engine
    app.state.auth = who
    app.state.presets = {name: dict(document) for name, document in presets.items()}
    app.state.artifacts = artifacts
    app.state.waiting = waiting
    app.state.readiness = health.Readiness(coordinator)
    app.state.counted = health.Counted(coordinator)
    app.add_middleware(limits.BodyLimit)
    errors.install(app)
    for module in (studies, trials, leases, workers, events, files, sign_in):
        app.include_router(module.router, prefix="/api/v1")
    app.include_router(health.router)
    app.include_router(whetlab.router)
    openapi.install(app)
    mount.install(app)  # after the others, so that its headers also stand on what they answer
    app.add_middleware(WhetlabAddresses)
    return app
