"""Health and metrics, at the root. They need no token, so that probes and scrapers hold no secret.

For the same reason they tell nothing worth hiding: totals, without the name of a study, a trial or a worker. What is
scraped is counted at most once in a few seconds, however often strangers ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import JSONResponse, Response

from api.errors import NOT_MIGRATED, RETRY_AFTER_S, shape
from api.openapi import ERROR_SCHEMA
from hpo import schema
from hpo.coordinator import Coordinator
from hpo.errors import DatabaseUnavailable, WhetstoneError

router = APIRouter(tags=["health"], redirect_slashes=False)
COUNTED_FOR_S = 2.0
CHECKED_FOR_S = 10.0
NO_STORE = {"Cache-Control": "no-store"}


@router.get("/healthz")
async def healthz() -> JSONResponse:
    """The process is alive. Asks nothing of the database."""
    return JSONResponse({"status": "alive"}, headers=NO_STORE)


NOT_READY = {
    "description": "Not ready; the message says why.",
    "content": {"application/json": {"schema": ERROR_SCHEMA}},
}


@router.get("/readyz", responses={503: NOT_READY})
def readyz(request: Request) -> JSONResponse:
    """The database answers, and its schema is this server's."""
    readiness: Readiness = request.app.state.readiness
    try:
        readiness.check()
    except WhetstoneError as error:
        headers = NO_STORE | {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse(shape(error.code, str(error)), 503, headers)
    return JSONResponse({"status": "ready"}, headers=NO_STORE)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """Prometheus metrics: totals only, no names. No token is needed."""
    counted: Counted = request.app.state.counted
    return Response(counted.text(), media_type=CONTENT_TYPE_LATEST, headers=NO_STORE)


class Readiness:
    """Whether the database answers, and whether its schema was this server's when it was last looked at."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._until = 0.0

    def check(self) -> None:
        """Return if this server can serve.

        Raises:
            DatabaseUnavailable: it cannot; the message says why.
        """
        self._coordinator.ready()
        if time.monotonic() < self._until:
            return
        state = schema.check(self._coordinator.engine)
        if state == "new":
            raise DatabaseUnavailable(
                "the database was upgraded by a newer Whetstone than this one: install that version"
            )
        if state != "current":
            raise DatabaseUnavailable(NOT_MIGRATED)
        self._until = time.monotonic() + CHECKED_FOR_S


class Counted:
    """The coordinator's totals in Prometheus' text, counted again when they are older than `COUNTED_FOR_S`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._lock = threading.Lock()
        self._until = 0.0
        self._text = b""

    def text(self) -> bytes:
        with self._lock:
            if time.monotonic() >= self._until:
                self._text = generate_latest(self._registry)
                self._until = time.monotonic() + COUNTED_FOR_S
            return self._text

    def describe(self) -> list[Metric]:
        """Nothing: registering is not to ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from families(self._coordinator.stats())


def families(stats: Mapping[str, Any]) -> Iterator[Metric]:
    """The metrics that `Coordinator.stats` amounts to."""
    for name, label, text in (
        ("trials", "state", "Trials by state, of all studies."),
        ("studies", "state", "Studies by state."),
        ("workers", "state", "Workers by state."),
    ):
        gauge = GaugeMetricFamily(f"whetstone_{name}", text, labels=[label])
        for value, count in sorted(stats.get(name, {}).items()):
            gauge.add_metric([value], count)
        yield gauge
    yield GaugeMetricFamily("whetstone_leases", "Leases that are held now.", value=stats.get("leases", 0))
    calls = CounterMetricFamily(
        "whetstone_coordinator_calls", "Calls of the coordinator in this process.", labels=["call"]
    )
    seconds = CounterMetricFamily(
        "whetstone_coordinator_seconds", "Seconds spent in calls of the coordinator in this process.", labels=["call"]
    )
    for call, spent in sorted(stats.get("calls", {}).items()):
        calls.add_metric([call], spent["count"])
        seconds.add_metric([call], spent["seconds"])
    yield calls
    yield seconds
