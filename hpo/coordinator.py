"""The coordinator: the one object that an API holds, and all that people and workers may ask of it.

It keeps nothing that PostgreSQL does not have, so any number of them may serve one database, and one that is killed
and started anew goes on where it was. Every method is safe to call from any thread. Errors are those of `hpo.errors`.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpo import answers, database, expiry, export, fleet, leases, outcomes, points, statements, studies, trials
from hpo.desk import Desk
from hpo.errors import DatabaseUnavailable
from hpo.idempotency import Once
from hpo.protocol import (
    AskRequest,
    ClaimRequest,
    CorrectionRequest,
    Lease,
    ReleaseRequest,
    ReportReply,
    ReportRequest,
    TellReply,
    TellRequest,
    WorkerHello,
    WorkerPlace,
    Workload,
)
from hpo.tokens import Principal
from hpo.views import (
    STUDY_STATES,
    TRIAL_STATES,
    AnswersView,
    ComparisonView,
    Page,
    ProgressPoint,
    StudyView,
    TrialDetail,
    TrialView,
    WorkerView,
)
from hpo.whetlab import Whetlab

P = ParamSpec("P")
R = TypeVar("R")

# Trials of all our studies by state, studies by state, and leases.
STUDIES_BY_STATE = sa.text("SELECT study_id, state FROM whetstone.studies")
LEASES = sa.text("SELECT count(*) FROM whetstone.attempts WHERE state = 'leased'")

_TRY_AGAIN = {"40001", "40P01"}  # PostgreSQL rolled the transaction back: nothing happened


def _counted(
    method: Callable[Concatenate[Coordinator, P], R],
) -> Callable[Concatenate[Coordinator, P], R]:
    """Count a call and its seconds, and turn a database that cannot serve it into `DatabaseUnavailable`."""

    @functools.wraps(method)
    def call(self: Coordinator, *args: P.args, **kwargs: P.kwargs) -> R:
        began = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        except PoolTimeout as error:
            raise DatabaseUnavailable("all connections to PostgreSQL are in use: try again") from error
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) in _TRY_AGAIN:
                raise DatabaseUnavailable("PostgreSQL gave way to another transaction: try again") from error
            raise
        finally:
            self._count(method.__name__, time.perf_counter() - began)

    return cast("Callable[Concatenate[Coordinator, P], R]", call)


class Coordinator:
    """Studies, trials, leases and workers of one database.

    Args:
        engine: of a database that `schema.upgrade` has brought up to date.
        workloads: what can be tuned, by name; the workload "external" is always there.
        term_s: how long a lease lives without a report.
        heartbeat_s: how often a worker is to report; well below the term.
        stall_s: how long a trial may make no step before its worker hands it back.
    """

    def __init__(
        self,
        engine: sa.Engine,
        workloads: Mapping[str, Workload],
        *,
        term_s: float = 30.0,
        heartbeat_s: float = 10.0,
        stall_s: float = 600.0,
    ) -> None:
        if not 0 < heartbeat_s < term_s:
            raise ValueError(f"the heartbeat ({heartbeat_s} s) must be above 0 and below the lease's term ({term_s} s)")
        self.engine = engine
        self.workloads = dict(workloads)
        self.term_s = term_s
        self._desk = Desk(engine, workloads, term_s=term_s, heartbeat_s=heartbeat_s, stall_s=stall_s)
        self.whetlab = Whetlab(self._desk)
        self._contact = expiry.Contact(term_s)
        self._cleaned = -math.inf  # the monotonic clock of a machine that has just started is near zero
        self._calls: dict[str, tuple[int, float]] = {}
        self._calls_lock = threading.Lock()

    # Studies

    @_counted
    def create_study(self, document: Mapping[str, Any], once: Once | None = None) -> StudyView:
        """Launch a study. Raises `Invalid` with every fault, or `Conflict` where its name is taken."""
        return studies.create(self._desk, document, once)

    @_counted
    def list_studies(
        self, *, state: str | None = None, name: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[StudyView]:
        """Return one page of studies, the newest first; `name` selects by a part of the name, an exact match first."""
        return studies.listing(self._desk, state=state, name=name, cursor=cursor, limit=limit)

    @_counted
    def get_study(self, study: int) -> StudyView:
        return studies.get(self._desk, study)

    @_counted
    def patch_study(self, study: int, document: Mapping[str, Any]) -> StudyView:
        """Change state, budget, concurrency, notes or what is fixed. Raises `Conflict` that names what is allowed."""
        return studies.patch(self._desk, study, document)

    @_counted
    def delete_study(self, study: int) -> None:
        """Delete a study and all its trials. Raises `Conflict` while trials are leased, unless it is stopped."""
        studies.delete(self._desk, study)

    # Trials

    @_counted
    def list_trials(
        self,
        study: int,
        *,
        state: str | None = None,
        order: str = "number",
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[TrialView]:
        """Return one page of trials, by "number", "-value" or "value"; those without a value come last."""
        return trials.listing(self._desk, study, state=state, order=order, cursor=cursor, limit=limit)

    @_counted
    def get_trial(self, study: int, n: int) -> TrialDetail:
        return trials.get(self._desk, study, n)

    @_counted
    def get_answers(self, study: int, n: int) -> AnswersView:
        """Return what a trial made of each of the study's tasks. Raises `NotFound` that says why it has no answers."""
        return answers.get(self._desk, study, n)

    @_counted
    def compare(self, study: int, a: int, b: int, b_study: int | None = None) -> ComparisonView:
        """Compare two trials task by task; the second may be of another study with the same tasks."""
        return answers.compare(self._desk, (study, a), (study if b_study is None else b_study, b))

    @_counted
    def add_trial(self, study: int, document: Mapping[str, Any], once: Once | None = None) -> TrialView:
        """Queue a point of one's own, or record a finished trial."""
        return points.add(self._desk, study, document, once)

    @_counted
    def cancel_trial(self, study: int, n: int) -> TrialView:
        """Cancel a trial: a queued one at once, a leased one through its worker."""
        return points.cancel(self._desk, study, n)

    @_counted
    def correct_trial(self, study: int, n: int, request: CorrectionRequest) -> TrialView:
        """Give a trial that has ended another outcome."""
        return points.correct(self._desk, study, n, request)

    @_counted
    def requeue_trial(self, study: int, n: int, once: Once | None = None) -> TrialView:
        """Queue the point of a failed, cancelled, pruned or infeasible trial as a new trial, which is returned."""
        return points.requeue(self._desk, study, n, once)

    @_counted
    def best(self, study: int, top: int = 10) -> list[TrialView]:
        """Return the best complete trials, the best first."""
        return trials.best(self._desk, study, top)

    @_counted
    def progress(self, study: int) -> list[ProgressPoint]:
        """Return every finished trial in order of finishing, with the best value so far."""
        return trials.progress(self._desk, study)

    @_counted
    def export(self, study: int) -> dict[str, Any]:
        """Return the whole study as plain JSON values; `hpo.export.WRITERS` make text of it."""
        return export.document(self._desk, study)

    # Leases

    @_counted
    def claim(self, request: ClaimRequest, principal: Principal, once: Once | None = None) -> Lease | None:
        """Give a worker a trial of any running study, or None at once when there is nothing to do."""
        return leases.claim(self._desk, request, principal, once)

    @_counted
    def ask(self, study: int, request: AskRequest, principal: Principal, once: Once | None = None) -> Lease:
        """Give a client a trial of this study. Raises `Conflict` with the reason when it has none to give."""
        return leases.ask(self._desk, study, request, principal, once)

    @_counted
    def report(self, lease: int, request: ReportRequest, principal: Principal) -> ReportReply:
        """Take down progress and renew the lease. Never raises for a lease that is over: it answers "lost"."""
        return outcomes.report(self._desk, lease, request, principal)

    @_counted
    def tell(self, lease: int, request: TellRequest, principal: Principal) -> TellReply:
        """Store the outcome of a trial, once. Raises `LeaseLost` or `Told` where that cannot be."""
        return outcomes.tell(self._desk, lease, request, principal)

    @_counted
    def release(self, lease: int, request: ReleaseRequest, principal: Principal) -> TellReply:
        """Take a trial back unfinished."""
        return outcomes.release(self._desk, lease, request, principal)

    # Workers

    @_counted
    def hello(self, request: WorkerHello, principal: Principal) -> WorkerPlace:
        """Give a worker a device of its own among those that it sees."""
        return fleet.hello(self._desk, request, principal)

    @_counted
    def list_workers(self) -> list[WorkerView]:
        return fleet.listing(self._desk)

    @_counted
    def drain_worker(self, name: str) -> WorkerView:
        """Let a worker finish its trial and give it no further one, until it introduces itself anew."""
        return fleet.drain(self._desk, name)

    @_counted
    def leave_worker(self, name: str, principal: Principal) -> WorkerView:
        """Take down that a worker has ended in good order. Raises `NotFound` unless it is the caller's."""
        return fleet.leave(self._desk, name, principal)

    # The house

    @_counted
    def expire(self) -> int:
        """Take back the trials of silent workers. To be called about every third of a term."""
        expired = expiry.expire(self._desk, self._contact)
        if time.monotonic() - self._cleaned > expiry.CLEAN_EVERY_S:
            self._cleaned = time.monotonic()
            expiry.clean(self._desk)
        return expired

    def read_ahead(self) -> None:
        """Read what the first asks will need. To be called once, in a thread of its own: asks need not wait for it."""
        self._desk.read_ahead()

    def ready(self) -> None:
        """Return if PostgreSQL answers. Raises `DatabaseUnavailable`."""
        database.ping(self.engine)

    def stats(self) -> dict[str, Any]:
        """Return counts for metrics: trials, studies and workers by state, leases, and calls with their seconds."""
        with self._desk.transaction() as conn:
            states: dict[int, str] = {row.study_id: row.state for row in conn.execute(STUDIES_BY_STATE)}
            live = conn.execute(LEASES).scalar_one()
            counts = dict.fromkeys(TRIAL_STATES, 0)
            for row in conn.execute(statements.COUNTS, {"studies": list(states), "few": statements.LOOKED_UP}):
                counts[row.state] += row.trials
        workers = dict.fromkeys(("idle", "busy", "draining", "silent", "stopped"), 0)
        for worker in fleet.listing(self._desk):
            workers[worker.state] += 1
        with self._calls_lock:
            calls = {name: {"count": count, "seconds": seconds} for name, (count, seconds) in self._calls.items()}
        return {
            "trials": counts,
            "studies": {state: list(states.values()).count(state) for state in STUDY_STATES},
            "workers": workers,
            "leases": live,
            "calls": calls,
        }

    def _count(self, name: str, seconds: float) -> None:
        with self._calls_lock:
            count, total = self._calls.get(name, (0, 0.0))
            self._calls[name] = (count + 1, total + seconds)
