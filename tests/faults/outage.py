"""PostgreSQL stopped at once (as by `pg_ctl stop -m immediate`) in the middle of two studies, and started again.

Real servers, a real worker that trains, and clients over HTTP that keep books. What was acknowledged is there
afterwards, no worker has ended, both studies finish, and every worker had a whole term to make itself heard again.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from hpo.embedded import EmbeddedPostgres
from tests.faults.books import Books, evaluating
from tests.faults.schedule_checks import Auditor
from tests.faults.service import ADMIN, Service, service, study

OUTAGES_S = (0.0, 20.0, 60.0)
EPOCHS, TRIALS, ASKED = 16, 2, 40

# Leases taken back before PostgreSQL has been there again for a whole term.
HASTY = """
    SELECT trial_number, reason FROM whetstone.attempts WHERE state = 'lost'
    AND ended_at BETWEEN pg_postmaster_start_time() AND pg_postmaster_start_time() + make_interval(secs => %(term)s)
"""


def external(name: str, trials: int, **more: Any) -> dict[str, Any]:
    """A study of clients that evaluate an objective of their own."""
    space = [{"name": name, "type": "float", "low": 0.0, "high": 1.0} for name in ("x", "y")]
    document = {"name": name, "workload": "external", "sampler": "random", "seed": 3, "space": space}
    return document | {"budget": {"trials": trials}} | more


def outage(folder: Path, seconds: float, *, term_s: float = 2.0, settings: dict[str, str] | None = None) -> str:
    """Play it; return what happened in a few words. Raises AssertionError with everything that is broken.

    With `seconds` of 0 the server comes back as soon as its keeper sees that it is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    postgres = EmbeddedPostgres(folder / "postgres", settings=settings)
    postgres.start()
    books = Books()
    try:
        with service(folder / "home", postgres.url, term_s=term_s) as running:
            with running.client() as client:
                asked = client.post("/api/v1/studies", json=external("asked", ASKED))["study"]
                document = study("trained", trials=TRIALS, epochs=EPOCHS, pairs_per_epoch=320, checkpoint_every_s=0.1)
                trained = client.post("/api/v1/studies", json=document)["study"]
            workers = [running.start_worker("w1")]
            # They begin once the worker does, so that both studies are under way when the server goes.
            running.until(lambda: begun(running, trained), "the worker has not begun")
            with evaluating(books, [running.url], ADMIN, asked, 4, work_s=0.3):
                running.until(lambda: len(books.told) >= 5, "the clients have not begun")
                stop_at_once(postgres, seconds)
                running.until(lambda: over(running, trained), "the worker's study did not finish")
            running.until(lambda: over(running, asked), "the clients' study did not finish")
            assert [worker.poll() for worker in workers] == [None] * len(workers), (
                f"a worker ended: {running.log('w1')}"
            )
            auditor = Auditor(postgres.url.replace("+psycopg2", ""))
            auditor.studies = [asked, trained]
            broken = books.compare(auditor) + whole(running, trained)
            counts = auditor.rows(
                "SELECT study_id, count(*), max(number) + 1 FROM public.trials GROUP BY 1 ORDER BY study_id"
            )
            hasty = auditor.rows(HASTY, term=term_s)
            auditor.close()
            broken += [f"trial {row.trial_number} was taken at once from its worker: {row.reason}" for row in hasty]
            if [tuple(row) for row in counts] != [(asked, ASKED, ASKED), (trained, TRIALS, TRIALS)]:
                broken.append(f"the trials of both studies: {counts}")
            assert not broken, "\n".join(broken)
    finally:
        postgres.stop()
    return f"{len(books.told)} outcomes and {len(books.epochs)} epochs acknowledged and kept"


def stop_at_once(postgres: EmbeddedPostgres, seconds: float) -> None:
    """SIGQUIT to the postmaster, and nobody to start it again for so many seconds; then wait until it answers."""
    pid = postgres.pid
    assert pid is not None
    os.kill(pid, signal.SIGQUIT)
    if seconds:
        postgres.stop()
        time.sleep(seconds)
        postgres.start()


def begun(running: Service, number: int) -> bool:
    with running.client() as client:
        trials = client.get(f"/api/v1/studies/{number}/trials")["items"]
    return any((trial["epoch"] or 0) >= 1 for trial in trials)


def over(running: Service, number: int) -> bool:
    with running.client() as client:
        return bool(client.get(f"/api/v1/studies/{number}")["state"] == "finished")


def whole(running: Service, number: int) -> list[str]:
    """Complete trials of the worker's study that lack an epoch."""
    broken = []
    with running.client() as client:
        for trial in client.get(f"/api/v1/studies/{number}/trials")["items"]:
            curve = client.get(f"/api/v1/studies/{number}/trials/{trial['trial']}")["curve"]
            if trial["state"] == "complete" and [item["epoch"] for item in curve] != list(range(EPOCHS)):
                broken.append(f"trial {trial['trial']} has the epochs {[item['epoch'] for item in curve]}")
    return broken
