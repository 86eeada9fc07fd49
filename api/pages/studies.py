"""The list of studies, and the tabs of one."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Form, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from api.pages import words
from api.pages.access import Actor, Reader
from api.pages.base import Cursor, Hpo, Number, Study, router
from api.pages.render import POLL_S, live, page
from hpo import fixed, yaml_document
from hpo.document import MAX_NAME, in_order
from hpo.errors import Fault, Invalid
from hpo.views import STUDY_STATES, TRIAL_STATES, ProgressPoint, StudyState, StudyView, TrialState

routes = router()

TABS = (("", "Overview"), ("trials", "Trials"), ("queue", "Queue"), ("config", "Configuration"))
ROWS = 50
TABLE_POINTS = 100
IDLE_POLL_S = 10
"""A study that cannot move is asked about less often."""
TRIALS_PER_SECOND = 1000
Order = Literal["number", "-value", "value"]


def pace(study: StudyView) -> float:
    """Seconds between two looks at a study: the larger it is, the more a look costs."""
    if study.state != "running" and not study.counts.get("leased"):
        return IDLE_POLL_S
    return max(POLL_S, words.finished(study) / TRIALS_PER_SECOND)


def tab(
    request: Request, template: str, study: StudyView, key: str, *others: str, status: int = 200, **context: Any
) -> Response:
    """One tab of a study, in its frame, whose head and `others` are kept fresh with it (unless a form was refused)."""
    fresh = live(request, pace(study), "live-head", *others) if request.method == "GET" else ""
    return page(request, template, status=status, study=study, tab=key, tabs=TABS, live=fresh, **context)


@routes.get("/")
def studies(
    request: Request,
    _: Reader,
    hpo: Hpo,
    name: Annotated[str, Query(max_length=MAX_NAME)] = "",
    state: Annotated[StudyState | Literal[""], Query()] = "",
    cursor: Cursor = None,
) -> Response:
    found = hpo.list_studies(state=state or None, name=name.strip() or None, cursor=cursor, limit=ROWS)
    filters = {key: value for key, value in (("name", name), ("state", state)) if value}
    return page(
        request,
        "studies.html",
        page=found,
        name=name,
        state_filter=state,
        study_states=STUDY_STATES,
        filtered=bool(filters or cursor),
        cursor=cursor,
        first="/?" + urlencode(filters),
        further="/?" + urlencode({**filters, "cursor": found.next or ""}),
        live=live(request),
    )


@routes.get("/studies")
def studies_by_another_name(request: Request, _: Reader) -> Response:
    return RedirectResponse("/", status_code=307)


@routes.get("/studies/{study}")
def overview(request: Request, _: Reader, hpo: Hpo, study: Study) -> Response:
    view = hpo.get_study(study)
    points = hpo.progress(study)
    at_hand = any(worker.state == "idle" for worker in hpo.list_workers()) if view.state == "running" else True
    return tab(
        request,
        "study_overview.html",
        view,
        "",
        "live-table",
        version=f"{len(points)}-{view.counts.get('complete', 0)}",
        points=list(reversed(points[-TABLE_POINTS:])),
        more_points=len(points) > TABLE_POINTS,
        idle_workers=at_hand,
    )


@routes.get("/studies/{study}/progress.json")
def progress(_: Reader, hpo: Hpo, study: Study) -> Response:
    """What the best-so-far chart draws, column by column, in the order of finishing."""
    view = hpo.get_study(study)
    points = hpo.progress(study)
    return JSONResponse(
        {
            "percent": words.is_accuracy(view),
            "name": words.objective_name(view),
            "chance": words.chance(view),
            "target": view.budget.target,
            "direction": view.direction,
            "url": f"/studies/{study}/trials/",
            **_columns(points),
        }
    )


def _columns(points: list[ProgressPoint]) -> dict[str, list[Any]]:
    return {
        "trial": [point.trial for point in points],
        "state": [point.state for point in points],
        "value": [point.value for point in points],
        "best": [point.best for point in points],
    }


@routes.get("/studies/{study}/trials")
def trials(
    request: Request,
    _: Reader,
    hpo: Hpo,
    study: Study,
    state: Annotated[TrialState | Literal[""], Query()] = "",
    order: Annotated[Order, Query()] = "number",
    cursor: Cursor = None,
) -> Response:
    view = hpo.get_study(study)
    found = hpo.list_trials(study, state=state or None, order=order, cursor=cursor, limit=ROWS)
    at = f"/studies/{study}/trials?"
    chosen = {key: value for key, value in (("state", state), ("order", order)) if value and value != "number"}
    return tab(
        request,
        "study_trials.html",
        view,
        "trials",
        page=found,
        state_filter=state,
        order=order,
        trial_states=TRIAL_STATES,
        cursor=cursor,
        first=at + urlencode(chosen),
        further=at + urlencode({**chosen, "cursor": found.next or ""}),
        sorts=_sorts(view, order, at, state),
    )


def _sorts(study: StudyView, order: str, at: str, state: str) -> dict[str, dict[str, str]]:
    """For each sortable column: the address that sorts by it (best first), and how it is sorted now."""
    best, worst = ("-value", "value") if study.direction == "maximize" else ("value", "-value")
    following = worst if order == best else best
    aria = {"value": "ascending", "-value": "descending"}.get(order, "none")
    keep = {"state": state} if state else {}
    return {
        "number": {"href": at + urlencode(keep), "aria": "ascending" if order == "number" else "none"},
        "value": {"href": at + urlencode({**keep, "order": following}), "aria": aria},
    }


@routes.get("/studies/{study}/queue")
def queue(request: Request, _: Reader, hpo: Hpo, study: Study, cursor: Cursor = None) -> Response:
    return _queue(request, hpo, study, cursor, typed="", faults=())


def _queue(
    request: Request, hpo: Hpo, study: int, cursor: str | None, typed: str, faults: tuple[Fault, ...]
) -> Response:
    view = hpo.get_study(study)
    found = hpo.list_trials(study, state="queued", order="number", cursor=cursor, limit=ROWS)
    return tab(
        request,
        "study_queue.html",
        view,
        "queue",
        status=422 if faults else 200,
        page=found,
        cursor=cursor,
        first=f"/studies/{study}/queue",
        further=f"/studies/{study}/queue?" + urlencode({"cursor": found.next or ""}),
        typed=typed or yaml_document.write(example_point(view)),
        faults=faults,
    )


def example_point(study: StudyView) -> dict[str, Any]:
    """A point to edit: the best one so far, or the middle of the space as far as the spec tells it."""
    if study.best is not None:
        return dict(study.best.params)
    point: dict[str, Any] = {}
    for parameter in study.spec.get("space", []):
        value = _middle(parameter)
        labels = parameter.get("labels")
        point[parameter["name"]] = dict.fromkeys(labels, value) if labels else value
    return point


def _middle(parameter: dict[str, Any]) -> Any:
    if parameter.get("type") == "categorical":
        return parameter["choices"][0]
    low, high = parameter["low"], parameter["high"]
    if parameter.get("step"):
        return low + parameter["step"] * round((high - low) / parameter["step"] / 2)
    middle = (low * high) ** 0.5 if parameter.get("log") else (low + high) / 2
    return round(middle) if parameter.get("type") == "integer" else float(f"{middle:.3g}")


@routes.post("/studies/{study}/trials")
def add_point(
    request: Request, _: Actor, hpo: Hpo, study: Study, params: Annotated[str, Form(max_length=1_000_000)] = ""
) -> Response:
    try:
        hpo.add_trial(study, {"params": yaml_document.read(params, "point")})
    except Invalid as error:
        return _queue(request, hpo, study, None, params, error.faults)
    return RedirectResponse(f"/studies/{study}/queue", status_code=303)


@routes.get("/studies/{study}/config")
def config(request: Request, _: Reader, hpo: Hpo, study: Study) -> Response:
    return _config(request, hpo.get_study(study), {}, ())


def _config(
    request: Request,
    study: StudyView,
    typed: dict[str, str],
    faults: tuple[Fault, ...],
    typed_fixed: str | None = None,
    fixed_faults: tuple[Fault, ...] = (),
) -> Response:
    stored = {
        "trials": study.budget.trials,
        "hours": study.budget.hours,
        "target": study.budget.target,
        "concurrency": study.concurrency,
        "notes": study.notes,
    }
    shown = {key: "" if value is None else str(value) for key, value in stored.items()}
    return tab(
        request,
        "study_config.html",
        study,
        "config",
        status=422 if faults or fixed_faults else 200,
        typed={**shown, **typed},
        faults=faults,
        at_fault={fault.at for fault in faults},
        typed_fixed=(yaml_document.write(study.fixed) if study.fixed else "") if typed_fixed is None else typed_fixed,
        fixed_faults=fixed_faults,
        document=yaml_document.write(in_order(study.spec)),
    )


@routes.post("/studies/{study}/change")
def change(
    request: Request,
    _: Actor,
    hpo: Hpo,
    study: Study,
    trials: Number = "",
    hours: Number = "",
    target: Number = "",
    concurrency: Number = "",
    notes: Annotated[str, Form(max_length=100_000)] = "",
) -> Response:
    """Budget, concurrency and notes, all five at once: what is left empty has no limit."""
    typed = {"trials": trials, "hours": hours, "target": target, "concurrency": concurrency, "notes": notes}
    wanted = {
        "budget": {key: numeral(typed[key]) for key in ("trials", "hours", "target")},
        "concurrency": numeral(concurrency),
        "notes": newlines(notes),
    }
    try:
        hpo.patch_study(study, wanted)
    except Invalid as error:
        return _config(request, hpo.get_study(study), typed, error.faults)
    return RedirectResponse(f"/studies/{study}/config", status_code=303)


@routes.post("/studies/{study}/fixed")
def fix(
    request: Request,
    _: Actor,
    hpo: Hpo,
    study: Study,
    typed: Annotated[str, Form(alias="fixed", max_length=1_000_000)] = "",
) -> Response:
    """What is fixed from now on: the whole of it, so that what is not in the form is released."""
    view = hpo.get_study(study)
    try:
        wanted = yaml_document.read(typed, "fixed") if typed.strip() else {}
        hpo.patch_study(study, {"fixed": fixed.replacing(view.fixed, wanted)})
    except Invalid as error:
        return _config(request, view, {}, (), newlines(typed), error.faults)
    return RedirectResponse(f"/studies/{study}/config", status_code=303)


def numeral(typed: str) -> int | float | str | None:
    """What was typed as a number, None where nothing was, or the text itself, for the coordinator to refuse."""
    typed = typed.strip().replace(",", ".") if typed.count(",") == 1 and "." not in typed else typed.strip()
    if not typed:
        return None
    for kind in (int, float):
        try:
            return kind(typed)
        except ValueError:
            continue
    return typed


def newlines(text: str) -> str:
    """Text of a form with the line ends that everything else uses (browsers send CRLF)."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


@routes.post("/studies/{study}/state")
def set_state(_: Actor, hpo: Hpo, study: Study, state: Annotated[str, Form(max_length=20)] = "") -> Response:
    hpo.patch_study(study, {"state": state})
    return RedirectResponse(f"/studies/{study}", status_code=303)


@routes.post("/studies/{study}/delete")
def delete(_: Actor, hpo: Hpo, study: Study, confirm: Annotated[str, Form(max_length=1000)] = "") -> Response:
    # Whitespace aside: a name that came by Whetlab's protocol may hold line breaks, which no field takes.
    if "".join(confirm.split()) != "".join(hpo.get_study(study).name.split()):
        raise Invalid([Fault("confirm", "is not the study's name; nothing was deleted")])
    hpo.delete_study(study)
    return RedirectResponse("/", status_code=303)
