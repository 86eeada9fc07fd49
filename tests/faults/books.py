"""Clients over HTTP that evaluate an objective of their own, and keep books of what the server acknowledged.

Whatever gets no answer is sent again, with the same key or token, until it gets one: so at the end every outcome is
acknowledged or refused, and the database can be held against the books.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hpo.rest import ApiError, Client, is_transient, new_key
from tests.faults.schedule_checks import Auditor


@dataclass
class Books:
    """What was acknowledged: leases in the order of their arrival, epochs, outcomes; and what went wrong for good."""

    leases: list[dict[str, Any]] = field(default_factory=list)
    epochs: dict[tuple[int, int], float] = field(default_factory=dict)
    told: dict[int, float] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, auditor: Auditor) -> list[str]:
        """What the database does not hold of it, and what must never be there."""
        stored = {
            row.attempt_id: row
            for row in auditor.rows(
                "SELECT a.attempt_id, a.state, t.state::text AS ends, v.value FROM whetstone.attempts a "
                "JOIN public.trials t USING (trial_id) "
                "LEFT JOIN public.trial_values v ON v.trial_id = t.trial_id WHERE a.study_id = ANY(%(studies)s)"
            )
        }
        metrics = {
            (row.attempt_id, row.epoch): row.value
            for row in auditor.rows(
                "SELECT m.* FROM whetstone.metrics m JOIN whetstone.attempts a USING (attempt_id) "
                "WHERE a.study_id = ANY(%(studies)s)"
            )
        }
        broken = [*self.faults, *auditor.look()]
        for lease, value in self.told.items():
            row = stored.get(lease)
            if row is None or (row.state, row.ends, row.value) != ("complete", "COMPLETE", value):
                broken.append(f"lease {lease} was told {value}, which was acknowledged, and is {row}")
        for place, value in self.epochs.items():
            if metrics.get(place) != value:
                broken.append(f"epoch {place[1]} of lease {place[0]} was acknowledged, and is {metrics.get(place)}")
        numbers = [lease["lease"] for lease in self.leases]
        broken += [f"lease {number} was given out twice" for number in set(numbers) if numbers.count(number) > 1]
        return broken


def patiently(client: Client, path: str, body: Any, *, key: str | None = None, patience_s: float = 120.0) -> Any:
    """Send one message until it is answered. Raises `ApiError` for a refusal that no waiting mends."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return client.once("POST", path, json=body, key=key)
        except Exception as error:
            if not is_transient(error) or time.monotonic() > end:
                raise
        time.sleep(0.05)


def evaluate(books: Books, url: str, token: str, study: int, worker: str, *, work_s: float, epochs: int = 2) -> None:
    """Ask for trials of a study and tell each, until it has none to give for good."""
    try:
        with Client(url, token, patience_s=120.0) as client:
            while True:
                try:
                    lease = patiently(client, f"/api/v1/studies/{study}/ask", {"worker": worker}, key=new_key())
                except ApiError as error:
                    state = client.get(f"/api/v1/studies/{study}")["state"]
                    if error.status != 409 or state == "finished":
                        if error.status != 409:
                            raise
                        return
                    time.sleep(0.02)
                    continue
                with books.guard:
                    books.leases.append(lease)
                _evaluate(books, client, lease, work_s, epochs)
    except Exception as error:
        with books.guard:
            books.faults.append(f"{worker} met {type(error).__name__}: {error}")


def _evaluate(books: Books, client: Client, lease: dict[str, Any], work_s: float, epochs: int) -> None:
    path, token = f"/api/v1/leases/{lease['lease']}", lease["token"]
    for epoch in range(epochs):
        time.sleep(work_s / epochs)
        value = ((lease["lease"] * 37 + epoch * 11) % 101) / 101
        reply = patiently(
            client, f"{path}/report", {"token": token, "reports": [{"epoch": epoch, "value": value, "metrics": {}}]}
        )
        if reply["verdict"] == "lost":
            books.lost.append(lease["lease"])
            return
        with books.guard:
            books.epochs[lease["lease"], epoch] = value
    value = (lease["lease"] % 89) / 89
    try:
        patiently(client, f"{path}/tell", {"token": token, "outcome": "complete", "value": value})
    except ApiError as error:
        if error.status != 409:
            raise
        books.lost.append(lease["lease"])
        return
    with books.guard:
        books.told[lease["lease"]] = value


@contextmanager
def evaluating(books: Books, urls: list[str], token: str, study: int, count: int, work_s: float) -> Iterator[None]:
    """`count` such clients at once, spread over the servers; the block's end waits for them."""
    threads = [
        threading.Thread(
            target=evaluate, args=(books, urls[n % len(urls)], token, study, f"e{study}-{n}"), kwargs={"work_s": work_s}
        )
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(180)
