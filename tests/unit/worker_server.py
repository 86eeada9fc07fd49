"""A real HTTP server whose answers a test scripts: the coordinator's side of a worker, misbehaving at will."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hpo.protocol import Lease
from tests.ports import free_port


class Drop(Exception):
    """Close the connection without an answer, as a process that is killed does."""


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float = field(default_factory=time.monotonic)

    @property
    def what(self) -> str:
        """The last part of the path: "claims", "report", "tell"."""
        return self.path.split("?")[0].rsplit("/", 1)[-1]


Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Server:
    """`answer` maps each request to (status, JSON or None or text[, headers]); `seen` keeps every request."""

    def __init__(self, answer: Callable[[Seen], Reply]) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self._port = free_port()
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; the second time on the same port, as a restarted server does."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                seen = Seen(self.command, self.path, dict(self.headers), json.loads(raw) if raw else None)
                outer.seen.append(seen)
                try:
                    status, body, *more = outer.answer(seen)
                except Drop:
                    self.close_connection = True
                    return
                data = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in (more[0] if more else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = do_PATCH = do_DELETE = do

            def log_message(self, format: str, *args: object) -> None:
                return None

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            connections: list[Any]

            def get_request(self) -> Any:
                made = super().get_request()
                self.connections.append(made[0])
                return made

            def handle_error(self, request: object, client_address: object) -> None:
                return None

        Http.connections = []
        self._http = Http(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and open connections are cut."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            for connection in self._http.connections:  # type: ignore[attr-defined]
                with suppress(OSError):
                    connection.shutdown(2)
            self._http = None

    def what(self, name: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.what == name]


@contextmanager
def serving(answer: Callable[[Seen], Reply]) -> Iterator[Server]:
    server = Server(answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def refusal(code: str, message: str = "no", details: list[Any] | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "details": details or []}}


def a_lease(**changes: Any) -> Lease:
    """A lease of a trial of a network so small that an epoch takes milliseconds."""
    fields: dict[str, Any] = {
        "lease": 7,
        "token": 70,
        "study": 1,
        "study_name": "tiny",
        "trial": 3,
        "attempt": 1,
        "workload": "siamese",
        "params": {"eta": 0.05},
        "settings": {},
        "seed": 11,
        "term_s": 2.0,
        "heartbeat_s": 0.5,
        "stall_s": 60.0,
        "artifacts": "studies/1/trials/3/attempts/1",
        "resume": None,
    }
    return Lease.model_validate(fields | changes)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that has to come true. Fails the test if it does not."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
