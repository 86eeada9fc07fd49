"""One trial: its curve, its attempts, its hyperparameters, its checkpoint."""

from __future__ import annotations

import shlex
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from api.pages import words
from api.pages.access import Actor, Reader
from api.pages.base import Hpo, Study, Trial, router
from api.pages.render import live, page
from api.routes.files import FILES, resolve
from hpo.errors import NotFound
from hpo.views import MetricPoint, StudyView, TrialDetail

routes = router()

ENDED = frozenset({"complete", "infeasible", "pruned", "failed", "cancelled"})
TABLE_EPOCHS = 200


@routes.get("/studies/{study}/trials/{n}")
def trial(request: Request, _: Reader, hpo: Hpo, study: Study, n: Trial) -> Response:
    view = hpo.get_study(study)
    detail = hpo.get_trial(study, n)
    every_s = 10 if detail.state in ENDED else 2
    last = detail.curve[-1].epoch if detail.curve else "none"
    return page(
        request,
        "trial.html",
        study=view,
        trial=detail,
        accuracy=words.is_accuracy(view),
        best_epoch=best_epoch(view, detail),
        is_best=view.best is not None and view.best.trial == n,
        epochs=list(reversed(detail.curve[-TABLE_EPOCHS:])),
        metric_names=metric_names(detail.curve),
        live=live(request, every_s, "live-table"),
        version=f"{detail.attempts}-{len(detail.curve)}-{last}",
        evaluate=evaluate_command(request, detail),
        download=f"/api/v1/studies/{study}/trials/{n}/checkpoint",
        why_no_download=why_no_download(request, detail),
    )


def best_epoch(study: StudyView, trial: TrialDetail) -> MetricPoint | None:
    """The epoch whose value is the trial's, or the best so far."""
    with_value = [point for point in trial.curve if point.value is not None]
    if not with_value:
        return None
    pick = max if study.direction == "maximize" else min
    return pick(with_value, key=lambda point: point.value or 0.0)


def metric_names(curve: list[MetricPoint]) -> list[str]:
    """Every metric reported beside the objective, in the order of appearance."""
    names = dict.fromkeys(name for point in curve for name in point.metrics)
    return [name for name in names if name != "accuracy"]


def evaluate_command(request: Request, trial: TrialDetail) -> str | None:
    """The command that scores this trial's best checkpoint, to be run where the artifacts are."""
    if trial.checkpoint is None:
        return None
    root = str(request.app.state.artifacts).rstrip("/")
    return f"whetstone evaluate {shlex.quote(f'{root}/{trial.checkpoint}')}"


def why_no_download(request: Request, trial: TrialDetail) -> str | None:
    """Why the best checkpoint's files cannot be had from this server, or None where they can."""
    if trial.checkpoint is None:
        return None
    try:
        for name in FILES.values():
            resolve(request.app.state.artifacts, trial.checkpoint, name)
    except NotFound as error:
        return str(error)
    return None


@routes.get("/studies/{study}/trials/{n}/curve.json")
def curve(_: Reader, hpo: Hpo, study: Study, n: Trial) -> Response:
    """What the learning curve draws, column by column."""
    view = hpo.get_study(study)
    points = hpo.get_trial(study, n).curve
    columns: dict[str, list[Any]] = {
        "epoch": [point.epoch for point in points],
        "attempt": [point.attempt for point in points],
        "value": [point.value for point in points],
        "loss": [point.metrics.get("loss") for point in points],
        "accuracy_320": [point.metrics.get("accuracy_320") for point in points],
    }
    return JSONResponse(
        {
            "percent": words.is_accuracy(view),
            "name": words.objective_name(view),
            "chance": words.chance(view),
            "direction": view.direction,
            **columns,
        }
    )


@routes.post("/studies/{study}/trials/{n}/cancel")
def cancel(_: Actor, hpo: Hpo, study: Study, n: Trial) -> Response:
    hpo.cancel_trial(study, n)
    return RedirectResponse(f"/studies/{study}/trials/{n}", status_code=303)


@routes.post("/studies/{study}/trials/{n}/requeue")
def requeue(_: Actor, hpo: Hpo, study: Study, n: Trial) -> Response:
    again = hpo.requeue_trial(study, n)
    return RedirectResponse(f"/studies/{study}/trials/{again.trial}", status_code=303)
