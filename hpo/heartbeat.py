"""What keeps suggestions in a process's hands while it evaluates them: a thread that renews their leases.

Promise: it dies with its process, so that what was held is then given out again; an outage is waited out; and what the
server says of a lease (it was taken back, it need not go on) is logged once and remembered, unless its outcome is just
being told. A suggestion is renewed when a heartbeat has passed since the last one. A forked child keeps alive what it
asks for itself; what it inherits its parent renews.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field

from hpo.rest import ApiError, Client, ServerUnreachable, is_transient

log = logging.getLogger("whetstone.client")


@dataclass
class Held:
    """A suggestion in our hands."""

    lease: int
    token: int
    heartbeat_s: float
    lost: str = ""
    """Why it is ours no more, once the server has said so."""
    stop: str = ""
    """Why it need not be evaluated any more."""
    telling: bool = False
    """Its outcome is on its way: that its lease is over is then no news."""
    due: float = 0.0
    """When it is renewed next, on the clock that only goes forward."""
    process: int = field(default_factory=os.getpid)
    """Who asked for it."""


class Heart:
    """A thread that renews what is held, until it is stopped. It starts with the first suggestion."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: dict[int, Held] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def hold(self, result_id: int, held: Held) -> None:
        held.due = time.monotonic() + held.heartbeat_s
        with self._here():
            self._held[result_id] = held
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="whetstone-heartbeat", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def held(self, result_id: int) -> Held | None:
        with self._here():
            return self._held.get(result_id)

    def let_go(self, result_id: int) -> Held | None:
        with self._here():
            return self._held.pop(result_id, None)

    def stop(self) -> None:
        with self._here():
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._client.close()

    def _here(self) -> threading.Condition:
        """The lock. A forked child has none of its parent's threads, and may have inherited a lock that one held."""
        if self._process != os.getpid():
            self._process, self._changed, self._thread = os.getpid(), threading.Condition(), None
        return self._changed

    def _beat(self) -> None:
        while True:
            with self._changed:
                mine = {
                    number: held
                    for number, held in self._held.items()
                    if held.process == self._process and not held.lost
                }
                first = min((held.due for held in mine.values()), default=None)
                if not self._stopped:
                    self._changed.wait(None if first is None else max(0.0, first - time.monotonic()))
                if self._stopped:
                    return
                now = time.monotonic()
                due = [(n, held) for n, held in mine.items() if held.due <= now and self._held.get(n) is held]
            for number, held in due:
                held.due = now + held.heartbeat_s
                self._renew(number, held)

    def _renew(self, number: int, held: Held) -> None:
        try:
            path, body = f"/api/v1/leases/{held.lease}/report", {"token": held.token, "reports": []}
            reply = self._client.once("POST", path, json=body, timeout_s=10.0)
            verdict, reason = reply["verdict"], reply["reason"]
        except (ServerUnreachable, ApiError) as error:
            if is_transient(error):
                return
            verdict, reason = "lost", str(error)
        with self._changed:
            if held.telling or self._held.get(number) is not held:
                return  # its outcome was told, or it was given up, in the meantime
            if verdict == "lost":
                held.lost = reason
            elif verdict == "stop" and not held.stop:
                held.stop = reason
            else:
                return
        if verdict == "lost":
            log.warning(
                "the suggestion %d is not ours any more: %s; a value for it is recorded all the same", number, reason
            )
        else:
            log.warning("the suggestion %d need not be evaluated any more: %s", number, reason)
