"""The thread that speaks for a trial while it trains: reports, heartbeats, and what the coordinator answers.

Reports go out in order, many in one request, and leave the buffer only when the server has them: an API restart or a
database outage delays them and loses none, and training does not wait (unless a whole buffer is unsent). Without news
an empty report renews the lease each `heartbeat_s`. What the server decides is read from `verdict`, which only ever
becomes graver: go on, prune, stop, lost. If the lease cannot be renewed for longer than its term, training goes on:
whether the outcome still counts is for the coordinator to say when it is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from itertools import islice

from hpo.protocol import EpochReport, Lease, ReportReply, ReportRequest, Verdict
from hpo.rest import ApiError, Backoff, Client, ServerUnreachable

log = logging.getLogger("whetstone.worker")

BATCH = 500
"""Reports in one request: far below the server's limit of 1,000 and of 1 MB."""

_GRAVITY = {Verdict.GO_ON: 0, Verdict.PRUNE: 1, Verdict.STOP: 2, Verdict.LOST: 3}


class Sender:
    """Reports on one lease, from a thread of its own. `start` it, `report` each epoch, `flush`, then `close`.

    `gap_s` is the least time between two requests, so that epochs of a few milliseconds travel together;
    `capacity` bounds the buffer: `report` blocks when that many are unsent.
    """

    def __init__(
        self, client: Client, lease: Lease, *, gap_s: float = 0.2, capacity: int = 20_000, confirm: bool = False
    ) -> None:
        self._client = client
        self._lease = lease
        self._gap_s = gap_s
        self._capacity = capacity
        self._pending: deque[EpochReport] = deque()
        self._changed = threading.Condition()
        self._checkpoint: int | None = None
        self._checkpoint_sent: int | None = None
        self._verdict, self._reason = Verdict.GO_ON, ""
        self._flushing = False
        self._closed = False
        self._sending = False
        # a lease whose answer came late may be over already: ask at once
        self._renewed = time.monotonic() - (lease.heartbeat_s if confirm else 0.0)
        self._thread = threading.Thread(target=self._run, name=f"sender-{lease.lease}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def verdict(self) -> Verdict:
        return self._verdict

    @property
    def reason(self) -> str:
        """Why the coordinator wants the trial to end, where it said so."""
        return self._reason

    @property
    def checkpoint_epoch(self) -> int | None:
        """Epochs in the newest checkpoint that is where a next attempt will look for it."""
        return self._checkpoint

    def report(self, report: EpochReport) -> Verdict:
        """Hand over one epoch and learn the newest verdict. Blocks only while `capacity` reports are unsent."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._pending) < self._capacity or self._over())
            if not self._over():
                self._pending.append(report)
                self._changed.notify_all()
        return self._verdict

    def checkpoint(self, epoch: int) -> None:
        """A checkpoint of `epoch` whole epochs is in its place: say so with the next message."""
        with self._changed:
            self._checkpoint = epoch
            self._changed.notify_all()

    def flush(self, timeout_s: float | None) -> bool:
        """Wait until everything reported is with the server, or the lease is lost. False when time ran out."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: self._verdict is Verdict.LOST or (not self._pending and not self._sending), timeout_s
            )

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread; what is still unsent is dropped. A request under way may outlast `timeout_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _over(self) -> bool:
        return self._closed or self._verdict is Verdict.LOST

    def _run(self) -> None:
        backoff = Backoff(0.1, min(5.0, self._lease.heartbeat_s))
        failures, silent_since, warned = 0, 0.0, False
        last = -self._gap_s
        while True:
            with self._changed:
                self._await_turn(last)
                if self._over():
                    return
                batch = list(islice(self._pending, BATCH))
                checkpoint = self._checkpoint
                self._sending = True
            began = last = time.monotonic()
            error = self._deliver(batch, checkpoint, began)
            with self._changed:
                self._sending = False
                self._changed.notify_all()
            if error is None:
                if failures > 2:
                    log.info("the server is back after %.0f s; nothing was lost", time.monotonic() - silent_since)
                failures, warned = 0, False
                backoff.reset()
                continue
            failures += 1
            silent_since = began if failures == 1 else silent_since
            if failures == 2:
                log.warning("reports are kept and sent again: %s", error)
            if not warned and time.monotonic() - self._renewed > self._lease.term_s:
                warned = True
                log.warning(
                    "the lease of trial %d could not be renewed for %.0f s: training goes on, the coordinator decides "
                    "what its outcome is worth",
                    self._lease.trial,
                    self._lease.term_s,
                )
            self._rest(backoff.next(error))

    def _await_turn(self, last: float) -> None:
        """Wait (holding the lock) until there is something to send and it is time for it."""
        while not self._over():
            now = time.monotonic()
            news = bool(self._pending) or self._checkpoint != self._checkpoint_sent
            due = self._renewed + self._lease.heartbeat_s
            if news:
                due = min(due, now if self._flushing and self._pending else last + self._gap_s)
            if due <= now:
                return
            self._changed.wait(due - now)

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _deliver(self, batch: list[EpochReport], checkpoint: int | None, began: float) -> Exception | None:
        """Send one request. Returns the error if the same is to be sent again, None if it is settled."""
        request = ReportRequest(token=self._lease.token, reports=batch, checkpoint_epoch=checkpoint)
        path = f"/api/v1/leases/{self._lease.lease}/report"
        verdict, reason = Verdict.GO_ON, ""
        try:
            body = self._client.once("POST", path, json=request.model_dump(mode="json"), timeout_s=20.0)
            reply = ReportReply.model_validate(body)
            verdict, reason = reply.verdict, reply.reason
        except ServerUnreachable as error:
            return error
        except ApiError as error:
            if error.transient:
                return error
            if error.status in (400, 413, 422):
                log.error("the server refused %d reports of trial %d: %s", len(batch), self._lease.trial, error)
            else:  # 409: another holds it, or it is over; 404: its study is gone; 401, 403: our token is
                verdict, reason = Verdict.LOST, error.message
        except ValueError:
            log.error("the server's answer to a report makes no sense: is it of another version?")
        with self._changed:
            self._renewed = began
            self._checkpoint_sent = checkpoint
            for _ in batch:
                self._pending.popleft()
            if _GRAVITY[verdict] > _GRAVITY[self._verdict]:
                self._verdict, self._reason = verdict, reason
        return None
