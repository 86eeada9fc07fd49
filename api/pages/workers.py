"""Workers: who is there, on what device, doing what."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.pages.access import Actor, Reader
from api.pages.base import Hpo, router
from api.pages.render import live, page
from hpo.protocol import NAME_PATTERN

routes = router()


@routes.get("/workers")
def workers(request: Request, _: Reader, hpo: Hpo) -> Response:
    order = {"busy": 0, "idle": 1, "draining": 2, "silent": 3, "stopped": 4}
    found = sorted(hpo.list_workers(), key=lambda worker: (order[worker.state], worker.worker))
    return page(request, "workers.html", section="workers", workers=found, live=live(request))


@routes.post("/workers/{worker}/drain")
def drain(_: Actor, hpo: Hpo, worker: Annotated[str, Path(pattern=NAME_PATTERN)]) -> Response:
    hpo.drain_worker(worker)
    return RedirectResponse("/workers", status_code=303)
