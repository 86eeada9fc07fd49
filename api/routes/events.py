"""Server-sent events of one study: what changed, so that a page knows when to look again."""

from __future__ import annotations

from collections.abc import AsyncIterable

from fastapi import APIRouter, Depends
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.routes.base import Hpo, StudyId, Waits, needs
from api.routes.base import router as api_router
from hpo.errors import DatabaseUnavailable

router: APIRouter = api_router(tags=["studies"])


def _is_there(study: StudyId, hpo: Hpo) -> None:
    hpo.get_study(study)


def _room(waits: Waits) -> None:
    if waits.streams_full:
        raise DatabaseUnavailable("too many event streams are open on this server; try again")


@router.get(
    "/studies/{study}/events",
    response_class=EventSourceResponse,
    dependencies=[Depends(_room), Depends(_is_there)],
    **needs("viewer", 404),
)
async def events(study: StudyId, waits: Waits) -> AsyncIterable[ServerSentEvent]:
    """A stream of `trial`, `study` and `work` events, each with ``{"study": id}``; it ends now and then: reconnect."""
    yield ServerSentEvent(event="hello", data={"study": study}, retry=2000)
    async for kinds in waits.news(study):
        for kind in sorted(kinds):
            yield ServerSentEvent(event=kind, data={"study": study})
