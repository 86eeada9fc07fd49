"""Trials: reading them, queueing or recording one, cancelling and requeueing, and asking for one to evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Query

from api import openapi
from api.routes.base import INT4, Cursor, Document, Hpo, Limit, OnceOnly, StudyId, TrialNumber, Waits, Who, needs
from api.routes.base import router as api_router
from hpo import spec
from hpo.protocol import AskRequest, CorrectionRequest, Lease
from hpo.views import AnswersView, ComparisonView, Page, TrialDetail, TrialState, TrialView

router: APIRouter = api_router(tags=["trials"])


@router.get("/studies/{study}/trials", **needs("viewer", 404))
def list_trials(
    study: StudyId,
    hpo: Hpo,
    state: TrialState | None = None,
    order: Annotated[Literal["number", "-value", "value"], Query(description="Sorting; '-' is descending.")] = "number",
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[TrialView]:
    """Trials of a study."""
    return hpo.list_trials(study, state=state, order=order, cursor=cursor, limit=limit)


@router.post(
    "/studies/{study}/trials", status_code=201, **needs("admin", 400, 404, 409, 413, 415, body=openapi.TRIAL_BODY)
)
def add_trial(study: StudyId, hpo: Hpo, sent: Document, once: OnceOnly) -> TrialView:
    """Queue a point of one's own, or (with a value or an outcome) record a finished trial."""

    def judge(document: object) -> None:
        spec.parse_trial(document, spec.load(hpo.get_study(study).spec), hpo.workloads)

    return hpo.add_trial(study, sent.checked_by(judge), once)


@router.get("/studies/{study}/trials/{n}", **needs("viewer", 404))
def get_trial(study: StudyId, n: TrialNumber, hpo: Hpo) -> TrialDetail:
    """One trial with its attempts, its learning curve and the reason of its end."""
    return hpo.get_trial(study, n)


@router.patch("/studies/{study}/trials/{n}", **needs("admin", 400, 404, 409, 413, 415))
def correct_trial(
    study: StudyId,
    n: TrialNumber,
    body: Annotated[CorrectionRequest, Body(examples=[{"value": 0.61, "reason": "measured on the wrong split"}])],
    hpo: Hpo,
) -> TrialView:
    """Replace the outcome of a trial that has ended; what is suggested next follows it."""
    return hpo.correct_trial(study, n, body)


@router.get("/studies/{study}/trials/{n}/answers", **needs("viewer", 404))
def get_answers(study: StudyId, n: TrialNumber, hpo: Hpo) -> AnswersView:
    """What the trial's best epoch made of each of the study's frozen tasks: one bit a task, with the score."""
    return hpo.get_answers(study, n)


@router.get("/studies/{study}/compare", **needs("viewer", 404, 409))
def compare(
    study: StudyId,
    hpo: Hpo,
    a: Annotated[int, Query(ge=0, le=INT4, description="A trial's number.")],
    b: Annotated[int, Query(ge=0, le=INT4, description="Another's.")],
    b_study: Annotated[
        int | None, Query(ge=0, le=INT4, description="The study of b, if it is another one on the same tasks.")
    ] = None,
) -> ComparisonView:
    """Two trials task by task: accuracies, their difference with its interval, and whether it is more than noise."""
    return hpo.compare(study, a, b, b_study)


@router.post("/studies/{study}/trials/{n}/cancel", **needs("admin", 404, 409))
def cancel_trial(study: StudyId, n: TrialNumber, hpo: Hpo) -> TrialView:
    """Cancel a queued or running trial. It leaves the budget."""
    return hpo.cancel_trial(study, n)


@router.post("/studies/{study}/trials/{n}/requeue", **needs("admin", 404, 409))
def requeue_trial(study: StudyId, n: TrialNumber, hpo: Hpo, once: OnceOnly) -> TrialView:
    """Queue the point of a trial that failed, was cancelled, pruned or infeasible again, as a new trial."""
    return hpo.requeue_trial(study, n, once)


@router.post("/studies/{study}/ask", status_code=201, **needs("worker", 400, 404, 409, 413, 415))
async def ask(
    study: StudyId,
    body: Annotated[AskRequest, Body(examples=[{"worker": "laptop-1"}])],
    hpo: Hpo,
    who: Who,
    waits: Waits,
    once: OnceOnly,
) -> Lease:
    """Lease a trial to a client that evaluates its own objective (workload "external")."""
    return await waits.slowly(lambda: hpo.ask(study, body, who, once))
