"""What the tests of leases share: a study's document, a coordinator with a short term, workers in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa

from hpo.coordinator import Coordinator
from hpo.errors import Fault
from hpo.protocol import (
    AskRequest,
    ClaimRequest,
    EpochReport,
    Lease,
    ReleaseRequest,
    ReportReply,
    ReportRequest,
    TellReply,
    TellRequest,
)
from hpo.tokens import Principal

T = TypeVar("T")
ALICE = Principal(id="token:1", role="worker", name="alice")
MALLORY = Principal(id="token:2", role="worker", name="mallory")


class Ball:
    """A workload: a point is feasible while `x` is below `limit`."""

    def __init__(self, limit: float = 2.0) -> None:
        self.limit = limit

    def check(self, settings: Any) -> Sequence[Fault]:
        return [Fault(name, "is not a setting of this workload") for name in settings if name != "net"]

    def feasible(self, point: Any, settings: Any) -> str | None:
        x = point.get("x", 0.0)
        return None if x < self.limit else f"x must be below {self.limit}"


def study(name: str = "s", **changes: Any) -> dict[str, Any]:
    """A document of two dimensions, sampled at random unless it says otherwise."""
    document: dict[str, Any] = {
        "name": name,
        "workload": "ball",
        "sampler": "random",
        "seed": 7,
        "space": [
            {"name": "x", "type": "float", "low": 0.0, "high": 1.0},
            {"name": "eta", "type": "float", "low": 1e-4, "high": 1e-1, "log": True, "labels": ["conv", "fc"]},
        ],
        "settings": {"net": "mini"},
    }
    return document | changes


def point(x: float) -> dict[str, Any]:
    return {"x": x, "eta": {"conv": 0.01, "fc": 0.02}}


def coordinator(engine: sa.Engine, *, term_s: float = 30.0, **workloads: Any) -> Coordinator:
    return Coordinator(
        engine, {"ball": Ball(), **workloads}, term_s=term_s, heartbeat_s=term_s / 3, stall_s=10 * term_s
    )


def claim(desk: Coordinator, worker: str = "w1", who: Principal = ALICE, **more: Any) -> Lease | None:
    return desk.claim(ClaimRequest(worker=worker, **more), who)


def must_claim(desk: Coordinator, worker: str = "w1", who: Principal = ALICE) -> Lease:
    lease = claim(desk, worker, who)
    assert lease is not None
    return lease


def ask(desk: Coordinator, number: int, worker: str = "w1", who: Principal = ALICE) -> Lease:
    return desk.ask(number, AskRequest(worker=worker), who)


def tell(
    desk: Coordinator,
    lease: Lease,
    value: float | None = 0.5,
    outcome: Any = "complete",
    who: Principal = ALICE,
    **more: Any,
) -> TellReply:
    return desk.tell(lease.lease, TellRequest(token=lease.token, outcome=outcome, value=value, **more), who)


def report(
    desk: Coordinator, lease: Lease, values: dict[int, float | None] | None = None, who: Principal = ALICE, **more: Any
) -> ReportReply:
    reports = [
        EpochReport(epoch=epoch, value=value, metrics={"loss": 0.1, "accuracy": value})
        for epoch, value in (values or {}).items()
    ]
    return desk.report(lease.lease, ReportRequest(token=lease.token, reports=reports, **more), who)


def release(
    desk: Coordinator, lease: Lease, reason: Any = "shutdown", who: Principal = ALICE, **more: Any
) -> TellReply:
    return desk.release(lease.lease, ReleaseRequest(token=lease.token, reason=reason, **more), who)


def together(*calls: Callable[[], T]) -> list[T | Exception]:
    """Run the calls at one moment, each in a thread of its own; return what each returned or raised, in order."""
    gate = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(place: int, call: Callable[[], T]) -> None:
        gate.wait()
        try:
            results[place] = call()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=item, name=f"w{place}") for place, item in enumerate(enumerate(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    return results


def deadlocks(engine: sa.Engine) -> int:
    """How many deadlocks PostgreSQL has broken in this database."""
    with engine.connect() as conn:
        conn.execute(sa.text("SELECT pg_stat_force_next_flush()"))
        found: int = conn.execute(
            sa.text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        ).scalar_one()
        return found


def attempts(engine: sa.Engine, trial: int = 0) -> list[tuple[int, str]]:
    """Number and state of each attempt of a trial, in order."""
    with engine.connect() as conn:
        found = conn.execute(
            sa.text("SELECT attempt, state FROM whetstone.attempts WHERE trial_number = :n ORDER BY attempt"),
            {"n": trial},
        )
        return [(row.attempt, row.state) for row in found]


def stock(engine: sa.Engine, name: str = "s") -> optuna.Study:
    """The study as stock Optuna opens it."""
    url = engine.url.render_as_string(hide_password=False)
    return optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(url))
