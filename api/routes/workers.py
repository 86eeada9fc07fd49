"""Workers: introducing themselves, being seen, being drained, taking their leave."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from api.routes.base import Hpo, Who, WorkerId, needs
from api.routes.base import router as api_router
from hpo.protocol import WorkerHello, WorkerPlace
from hpo.views import WorkerView

router: APIRouter = api_router(tags=["workers"])

HELLO = {
    "worker": "gpu-1",
    "host": "node7",
    "devices": ["cuda:0", "cuda:1"],
    "version": "0.1.0",
    "memory_bytes": 17179869184,
}


@router.post("/workers", **needs("worker", 400, 409, 413, 415))
def hello(body: Annotated[WorkerHello, Body(examples=[HELLO])], hpo: Hpo, who: Who) -> WorkerPlace:
    """Introduce a worker, and claim a device of its own among those of its machine."""
    return hpo.hello(body, who)


@router.get("/workers", **needs("viewer"))
def list_workers(hpo: Hpo) -> list[WorkerView]:
    """All workers that were ever here, and what they do now."""
    return hpo.list_workers()


@router.post("/workers/{worker}/leave", **needs("worker", 404))
def leave(worker: WorkerId, hpo: Hpo, who: Who) -> WorkerView:
    """A worker takes its leave: its device is free at once."""
    return hpo.leave_worker(worker, who)


@router.post("/workers/{worker}/drain", **needs("admin", 404))
def drain(worker: WorkerId, hpo: Hpo) -> WorkerView:
    """Let a worker finish its trial and take no other."""
    return hpo.drain_worker(worker)
