"""What all pages share: the order of checks, and the parts of an address or a form.

Address first, then who is asking, then what is asked for: a stranger learns nothing from a page's errors.
"""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Form, Path, Query
from starlette.requests import Request

from api.limits import check_address
from hpo.coordinator import Coordinator

INT4 = 2**31 - 1


def coordinator_of(request: Request) -> Coordinator:
    return cast(Coordinator, request.app.state.coordinator)


def _checked_address(request: Request) -> None:
    check_address(request)


def router() -> APIRouter:
    """A router of pages: they stand outside of the REST description."""
    return APIRouter(include_in_schema=False, redirect_slashes=False, dependencies=[Depends(_checked_address)])


Hpo = Annotated[Coordinator, Depends(coordinator_of)]
Study = Annotated[int, Path(ge=0, le=INT4)]
Trial = Annotated[int, Path(ge=0, le=INT4)]
Cursor = Annotated[str | None, Query(max_length=200)]
Number = Annotated[str, Form(max_length=100)]
