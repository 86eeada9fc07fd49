"""What keeps suggestions in a process's hands while it evaluates them: a thread that renews their leases.

Promise: it dies with its process, so that what was held is then given out again; an outage is waited out; and what the
server says of a lease (it was taken back, it need not go on) is logged once and remembered.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

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


class Heart:
    """A thread that renews what is held, until it is stopped. It starts with the first suggestion."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: dict[int, Held] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def hold(self, result_id: int, held: Held) -> None:
        with self._changed:
            self._held[result_id] = held
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="whetstone-heartbeat", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def held(self, result_id: int) -> Held | None:
        with self._changed:
            return self._held.get(result_id)

    def let_go(self, result_id: int) -> Held | None:
        with self._changed:
            return self._held.pop(result_id, None)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._client.close()

    def _beat(self) -> None:
        while True:
            with self._changed:
                pause = min((held.heartbeat_s for held in self._held.values()), default=None)
                if not self._stopped:
                    self._changed.wait(pause)
                if self._stopped:
                    return
                alive = [(number, held) for number, held in self._held.items() if not held.lost]
            for number, held in alive:
                self._renew(number, held)

    def _renew(self, number: int, held: Held) -> None:
        try:
            path, body = f"/api/v1/leases/{held.lease}/report", {"token": held.token, "reports": []}
            reply = self._client.once("POST", path, json=body, timeout_s=10.0)
        except (ServerUnreachable, ApiError) as error:
            if not is_transient(error):
                held.lost = str(error)
            return
        if reply["verdict"] == "lost":
            held.lost = reply["reason"]
            log.warning(
                "the suggestion %d was taken back: %s; a value for it is recorded all the same", number, held.lost
            )
        elif reply["verdict"] == "stop" and not held.stop:
            held.stop = reply["reason"]
            log.warning("the suggestion %d need not be evaluated any more: %s", number, held.stop)
