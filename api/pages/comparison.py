"""Two trials side by side, task by task. What cannot be compared is answered with the reason and the form."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from api.errors import status_of
from api.pages.access import Reader
from api.pages.base import INT4, Hpo, router
from api.pages.render import page
from hpo.errors import Conflict, Invalid, NotFound, WhetstoneError

routes = router()

Number = Annotated[int | None, Query(ge=0, le=INT4)]


@routes.get("/compare")
def compare(
    request: Request,
    _: Reader,
    hpo: Hpo,
    study: Number = None,
    a: Number = None,
    b_study: Number = None,
    b: Number = None,
) -> Response:
    chosen = {"study": study, "a": a, "b_study": study if b_study is None else b_study, "b": b}
    if study is None or a is None or b is None:
        return page(request, "compare.html", chosen=chosen, found=None, message="")
    try:
        found = hpo.compare(study, a, b, b_study)
        points = [hpo.get_trial(side.study, side.trial).params for side in (found.a, found.b)]
    except (Conflict, Invalid, NotFound) as error:
        return page(
            request, "compare.html", status=status_of(error), chosen=chosen, found=None, message=_message(error)
        )
    return page(request, "compare.html", chosen=chosen, found=found, points=points, message="")


def _message(error: WhetstoneError) -> str:
    if isinstance(error, Invalid):
        return "; ".join(str(fault) for fault in error.faults)
    return str(error)
