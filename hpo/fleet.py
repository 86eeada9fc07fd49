"""Workers: who they are, which device is whose, and who is to go.

A device belongs to at most one live worker; a worker is live until it takes its leave or is silent for two terms. A
GPU's UUID names one device whatever the host says it is called (every container has a host name of its own and may see
the same GPUs); any other name is a device of its host. Devices are given out one worker at a time, so two that start
together never get the same. A drained worker finishes its trial and gets no further lease, until it introduces itself
anew.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpo import events
from hpo.desk import Desk, storable
from hpo.errors import NotFound
from hpo.protocol import WorkerHello, WorkerPlace
from hpo.tokens import Principal
from hpo.views import WorkerView

SILENT_TERMS = 2
LISTED_HOURS = 24

# One at a time in the whole fleet: introductions are rare and short.
LOCK_DEVICES = sa.text("SELECT pg_advisory_xact_lock(hashtextextended('whetstone:devices', 0))")

# Devices that other live workers have: those of this host, and every one that is known by a UUID.
TAKEN = sa.text("""
    SELECT device FROM whetstone.workers
    WHERE (host = :host OR device LIKE 'GPU-%' OR device LIKE 'MIG-%') AND name <> :name AND device <> ''
      AND NOT stopped AND last_seen > clock_timestamp() - make_interval(secs => :silent_s)
""")

# A worker introduces itself: what it was before is forgotten, and unless it is the same process a wish to drain it too.
HELLO = sa.text("""
    INSERT INTO whetstone.workers AS w (name, host, device, memory_bytes, version, bearer)
    VALUES (:name, :host, :device, :memory_bytes, :version, :bearer)
    ON CONFLICT (name) DO UPDATE SET host = excluded.host, device = excluded.device, version = excluded.version,
        memory_bytes = excluded.memory_bytes, bearer = excluded.bearer, draining = w.draining AND :again,
        stopped = false, last_seen = clock_timestamp()
""")

HAS = sa.text("SELECT device FROM whetstone.workers WHERE name = :name AND host = :host")

# A worker takes its leave. Only who speaks for it may say so.
LEAVE = sa.text("""
    UPDATE whetstone.workers SET stopped = true, last_seen = clock_timestamp()
    WHERE name = :name AND bearer = :bearer RETURNING worker_id
""")

DRAIN = sa.text("UPDATE whetstone.workers SET draining = true WHERE name = :name RETURNING worker_id")

# The fleet, with what each worker holds and how many trials it has ended. Those long gone are left out.
WORKERS = sa.text("""
    SELECT w.*, a.study_id, a.trial_number, coalesce(d.done, 0) AS done,
           w.last_seen <= clock_timestamp() - make_interval(secs => :silent_s) AS silent
    FROM whetstone.workers w
    LEFT JOIN LATERAL (
        SELECT study_id, trial_number FROM whetstone.attempts
        WHERE worker_id = w.worker_id AND state = 'leased' ORDER BY attempt_id DESC LIMIT 1
    ) a ON TRUE
    LEFT JOIN (
        SELECT worker_id, count(*) AS done FROM whetstone.attempts
        WHERE state IN ('complete', 'infeasible', 'pruned', 'failed') GROUP BY worker_id
    ) d ON d.worker_id = w.worker_id
    WHERE (CAST(:name AS text) IS NULL OR w.name = :name)
      AND (a.study_id IS NOT NULL OR w.last_seen > clock_timestamp() - make_interval(hours => :hours)
           OR CAST(:name AS text) IS NOT NULL)
    ORDER BY w.name
""")


def hello(desk: Desk, request: WorkerHello, principal: Principal) -> WorkerPlace:
    """Take down who the worker is and give it the first of the devices it sees that no other live worker has.

    A worker that comes back keeps its device. "cpu" may be shared. The device is None where the worker named none or
    all are taken.
    """
    host = storable(request.host)
    offered = [storable(device) for device in request.devices]
    with desk.transaction() as conn:
        conn.execute(LOCK_DEVICES)
        me = {"name": request.worker, "host": host, "silent_s": silent_s(desk)}
        taken = set(conn.execute(TAKEN, me).scalars())
        free = [device for device in offered if device == "cpu" or device not in taken]
        had = conn.execute(HAS, me).scalar()
        device = had if had in free else next(iter(free), None)
        about: dict[str, Any] = {
            "device": device or "",
            "memory_bytes": request.memory_bytes,
            "version": storable(request.version),
            "bearer": principal.id,
            "again": request.again,
        }
        conn.execute(HELLO, me | about)
        events.notify(conn, "worker", None)
    return WorkerPlace(worker=request.worker, device=device)


def listing(desk: Desk) -> list[WorkerView]:
    """Return the workers that were heard of within a day, and those that hold a trial, by name."""
    with desk.transaction() as conn:
        return _read(desk, conn, None)


def drain(desk: Desk, name: str) -> WorkerView:
    """Let a worker finish its trial and give it no further one.

    Raises:
        NotFound: there is no such worker.
    """
    with desk.transaction() as conn:
        if conn.execute(DRAIN, {"name": storable(name)}).one_or_none() is None:
            raise NotFound("there is no worker of that name")
        events.notify(conn, "worker", None)
        return _read(desk, conn, name)[0]


def leave(desk: Desk, name: str, principal: Principal) -> WorkerView:
    """Take down that a worker has ended in good order: its device is free at once.

    Raises:
        NotFound: there is no such worker of this bearer's.
    """
    with desk.transaction() as conn:
        if conn.execute(LEAVE, {"name": storable(name), "bearer": principal.id}).one_or_none() is None:
            raise NotFound("there is no worker of that name that this token speaks for")
        events.notify(conn, "worker", None)
        return _read(desk, conn, name)[0]


def silent_s(desk: Desk) -> float:
    """How long a worker may be silent before it counts as gone, in seconds."""
    return SILENT_TERMS * desk.term_s


def _read(desk: Desk, conn: sa.Connection, name: str | None) -> list[WorkerView]:
    rows = conn.execute(WORKERS, {"name": name, "silent_s": silent_s(desk), "hours": LISTED_HOURS})
    return [
        WorkerView(
            worker=row.name,
            state="stopped"
            if row.stopped
            else "silent"
            if row.silent
            else "draining"
            if row.draining
            else "idle"
            if row.study_id is None
            else "busy",
            host=row.host,
            device=row.device,
            memory_bytes=row.memory_bytes,
            version=row.version,
            first_seen=row.first_seen,
            last_seen=row.last_seen,
            study=row.study_id,
            trial=row.trial_number,
            trials_done=row.done,
        )
        for row in rows
    ]
