"""Leases: claiming one from any running study, and speaking for the trial that it holds."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from api.routes.base import Hpo, LeaseId, OnceOnly, Waits, Who, needs
from api.routes.base import router as api_router
from hpo.coordinator import Coordinator
from hpo.errors import WhetstoneError
from hpo.protocol import ClaimRequest, Lease, ReleaseRequest, ReportReply, ReportRequest, TellReply, TellRequest
from hpo.tokens import Principal

log = logging.getLogger("whetstone.api")
router: APIRouter = api_router(tags=["leases"])

CLAIM = {"worker": "gpu-1", "device": "cuda:0", "memory_bytes": 17179869184, "version": "0.1.0", "wait_s": 20}
REPORT = {
    "token": 17,
    "reports": [{"epoch": 3, "value": 0.61, "metrics": {"loss": 0.42}}],
    "checkpoint_epoch": 3,
}
COMPLETE = {"token": 17, "outcome": "complete", "value": 0.61}
FAILED = {
    "token": 17,
    "outcome": "failed",
    "reason": "ValueError",
    "traceback": "Traceback (most recent call last): ...",
}
RELEASE = {"token": 17, "reason": "shutdown", "checkpoint_epoch": 3}


@router.post(
    "/claims",
    response_model=Lease,
    **needs("worker", 400, 413, 415, more={204: {"description": "There was nothing to do within `wait_s` seconds."}}),
)
async def claim(
    request: Request,
    body: Annotated[ClaimRequest, Body(examples=[CLAIM])],
    hpo: Hpo,
    who: Who,
    waits: Waits,
    once: OnceOnly,
) -> Lease | Response:
    """Lease a trial of any running study; 204 when there is nothing to do within `wait_s` seconds."""
    lease = await waits.until(lambda: hpo.claim(body, who, once), body.wait_s, request, kind=body.memory_bytes)
    if lease is None:
        return Response(status_code=204)
    if once is None and await request.is_disconnected():
        # Nobody heard of this lease, and no key will ask for it again: do not let the trial sit out a whole term.
        await waits.slowly(lambda: _give_back(hpo, lease, who))
    return lease


def _give_back(hpo: Coordinator, lease: Lease, who: Principal) -> None:
    try:
        hpo.release(lease.lease, ReleaseRequest(token=lease.token, reason="shutdown"), who)
    except WhetstoneError as error:
        log.warning("lease %d could not be given back and will expire: %s", lease.lease, error)


@router.post("/leases/{lease}/report", **needs("worker", 400, 404, 409, 413, 415))
def report(lease: LeaseId, body: Annotated[ReportRequest, Body(examples=[REPORT])], hpo: Hpo, who: Who) -> ReportReply:
    """Report epochs and renew the lease; the answer says go on, prune, stop or lost."""
    return hpo.report(lease, body, who)


@router.post("/leases/{lease}/tell", **needs("worker", 400, 404, 409, 413, 415))
def tell(
    lease: LeaseId, body: Annotated[TellRequest, Body(examples=[COMPLETE, FAILED])], hpo: Hpo, who: Who
) -> TellReply:
    """Tell a trial's outcome. The same again gets the same answer; a different one 409."""
    return hpo.tell(lease, body, who)


@router.post("/leases/{lease}/release", **needs("worker", 400, 404, 409, 413, 415))
def release(lease: LeaseId, body: Annotated[ReleaseRequest, Body(examples=[RELEASE])], hpo: Hpo, who: Who) -> TellReply:
    """Hand a trial back unfinished; the next worker resumes it."""
    return hpo.release(lease, body, who)
