"""The worker process: introduces itself, then claims and conducts one trial after another until it is told to stop.

Promise: a claim carries an Idempotency-Key and is repeated under it, so that an answer that got lost leaves no orphan;
whatever ends the process, a lease that reached it is handed back where a server can be reached. Exit codes: 0 stopped
as asked (or done, with `once`), 1 refused or unfit (one line says why), 3 the GPU gave up, 4 a trial was stuck; after
3 and 4 a supervisor should start it again. On a CPU nothing heavy is imported before the server has answered.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import time
import uuid
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from hpo.protocol import MAX_WAIT_S, ClaimRequest, Lease, WorkerHello, WorkerPlace
from hpo.rest import ApiError, Backoff, Client, ServerUnreachable, is_transient, new_key
from workers.artifacts import Artifacts, ArtifactsUnusable
from workers.device import Device, DeviceUnusable, candidates, probe
from workers.stop import Stop, Stopped
from workers.trial import Conductor, Leave
from workers.unsent import Unsent

log = logging.getLogger("whetstone.worker")

GIVE_BACK_S = 1.0
"""How long we wait for the answer to a claim that was under way when we were asked to stop."""
AWAY_S = 30.0
"""After an outage this long the coordinator may have given our device away: ask for it again."""


class Rejected(Exception):
    """The server does not want us, or is no Whetstone server: one line."""


def run(
    url: str,
    token: str,
    *,
    name: str | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    home: Path,
    artifacts: str | Path,
    threads: int | None = None,
    once: bool = False,
) -> int:
    """Be a worker of the server at `url` until SIGTERM or SIGINT; returns the exit code.

    `artifacts` is a directory or an fsspec URL, `threads` the CPU threads of a trial (default: PyTorch's, one for each
    physical core; with several CPU workers on one machine, share the cores among them). With `once`, take one trial
    (waiting for it if need be) and end. A stuck thread makes this end the process itself.
    """
    _log_to_stderr()
    stop = Stop()
    worker: Worker | None = None
    with stop.handling_signals():
        try:
            worker = Worker(stop, lambda: Client(url, token), name=name or default_name(), once=once)
            leave = worker.work(device, data_root=data_root, home=home, artifacts=artifacts, threads=threads)
        except Stopped:
            log.info("stopped")
            return 0
        except (Rejected, DeviceUnusable, ArtifactsUnusable, ValueError) as error:
            log.error("%s", error)
            return 1
        finally:
            if worker is not None:
                worker.take_leave()
    if leave is None:
        return 0
    (log.info if leave.code == 0 else log.error)("%s", leave.message)
    if leave.stuck:  # a thread is inside a computation that does not return: joining it would hang
        logging.shutdown()
        sys.stdout.flush()
        os._exit(leave.code)
    return leave.code


class Worker:
    """One worker process's dealings with the coordinator between its trials."""

    def __init__(self, stop: Stop, connect: Any, *, name: str, once: bool) -> None:
        self._stop = stop
        self._connect = connect
        self._client: Client = connect()
        self._name = name
        self._once = once
        self._version = _version()
        self._known = False

    def work(
        self, device: str, *, data_root: Path | None, home: Path, artifacts: str | Path, threads: int | None
    ) -> Leave | None:
        """Claim and conduct until asked to stop (raises `Stopped`), done (`once`), or a trial says to leave."""
        allowed = candidates(device)
        place = self._introduce(allowed, insist=device not in ("auto", "cuda"))
        unsent = Unsent(home)
        unsent.deliver(self._client)
        kept = Artifacts(artifacts, home / "scratch")
        from workers.siamese import Siamese

        probe(place)
        trains = Siamese(place, data_root=data_root, home=home)
        conductor = Conductor(self._connect, self._stop, trains, kept, unsent, threads=threads)
        log.info("worker %s is ready on %s; waiting for trials of %s", self._name, place.title, self._client.url)
        while True:
            lease, late = self._claim(place, conductor)
            if lease is None:  # the server was away for long: is the device still ours?
                place = self._introduce([place], insist=True, again=True)
                continue
            leave = conductor.conduct(lease, confirm=late)
            if leave is not None:
                if not leave.stuck:
                    conductor.close()
                return leave
            if self._once:
                conductor.close()
                return None

    def _introduce(self, allowed: list[Device], *, insist: bool, again: bool = False) -> Device:
        """Say who we are and get a device of our own; where all are taken, wait for one (unless this one was named)."""
        hello = WorkerHello(
            worker=self._name,
            host=platform.node()[:500],
            devices=[device.id for device in allowed],
            version=self._version,
            memory_bytes=allowed[0].memory_bytes,
            again=again,
        )
        said = False
        while True:
            place = WorkerPlace.model_validate(self._ask("/api/v1/workers", hello.model_dump(mode="json")))
            self._known = True
            for device in allowed:
                if device.id == place.device:
                    return device
            if insist:
                log.warning("%s is also in use by another worker", allowed[0].name)
                return allowed[0]
            if not said:
                said = True
                log.warning(
                    "all %d CUDA devices of this machine belong to other workers: waiting for one", len(allowed)
                )
            hello = hello.model_copy(update={"again": True})
            self._stop.sleep(5.0)

    def _ask(self, path: str, body: Any) -> Any:
        """One question, repeated until the server answers. Raises `Rejected` where waiting does not help."""
        backoff, said = Backoff(0.2, 5.0), False
        while True:
            try:
                with self._stop.breakable():
                    return self._client.once("POST", path, json=body)
            except (ServerUnreachable, ApiError) as error:
                if not is_transient(error):
                    raise _rejected(error, self._client.url) from None
                if not said:
                    said = True
                    log.warning("waiting for the server: %s", error)
                delay = backoff.next(error)
            self._stop.sleep(delay)

    def _claim(self, place: Device, conductor: Conductor) -> tuple[Lease | None, bool]:
        """The next lease, and whether its answer came late. None after a long outage. Raises `Stopped`, `Rejected`."""
        request = ClaimRequest(
            worker=self._name,
            device=place.id,
            memory_bytes=place.memory_bytes,
            version=self._version,
            wait_s=MAX_WAIT_S,
        ).model_dump(mode="json")
        while True:
            key, backoff, failed_at, asked = new_key(), Backoff(0.1, 5.0), None, None
            try:
                while True:
                    try:
                        with self._stop.breakable():
                            asked = asked or time.monotonic()
                            body = self._client.once(
                                "POST", "/api/v1/claims", json=request, key=key, timeout_s=MAX_WAIT_S + 15
                            )
                        break
                    except (ServerUnreachable, ApiError) as error:
                        if not is_transient(error):
                            raise _rejected(error, self._client.url) from None
                        if failed_at is None:
                            failed_at = time.monotonic()
                            log.warning("no trial for now: %s", error)
                        delay = backoff.next(error)
                    self._stop.sleep(delay)
            except Stopped:
                if asked is not None:
                    self._give_back(request, key, conductor)
                raise
            if failed_at is not None:
                log.info("the server is back")
            if body is not None:
                return Lease.model_validate(body), failed_at is not None
            if failed_at is not None and time.monotonic() - failed_at > AWAY_S:
                return None, True
            if time.monotonic() - asked < 1.0:  # it did not wait: it is shutting down
                self._stop.sleep(0.5)

    def _give_back(self, request: Any, key: str, conductor: Conductor) -> None:
        """We left while a claim was under way: if it was answered with a lease, the same key shows it. Release it."""
        try:
            with self._connect() as client:
                body = client.once("POST", "/api/v1/claims", json=request, key=key, timeout_s=GIVE_BACK_S)
        except (ServerUnreachable, ApiError):
            self._known = False  # it does not answer: no leave is taken of it either
            return
        if body is not None:
            conductor.release_unstarted(Lease.model_validate(body))

    def take_leave(self) -> None:
        """Say that we end, so that our device is free at once. Nobody waits for it: silence says the same, later."""
        if not self._known or self._stop.insisted:
            return
        try:
            with self._connect() as client:
                client.once("POST", f"/api/v1/workers/{self._name}/leave", timeout_s=0.5)
        except (ServerUnreachable, ApiError):
            return


def default_name() -> str:
    """Host, process and four random digits: two hosts with one name, or containers whose pids are all 1, differ."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:80].lstrip("._-") or "worker"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


def _rejected(error: Exception, url: str) -> Rejected:
    status = error.status if isinstance(error, ApiError) else 0
    if status == 401:
        return Rejected(f"{url} does not know this token: set WHETSTONE_TOKEN to one of `whetstone token create`")
    if status == 403:
        return Rejected(f"this token may not train at {url} ({error}): `whetstone token create NAME --role worker`")
    return Rejected(f"{url} refused this worker: {error}")


def _version() -> str:
    try:
        return package_version("whetstone")
    except PackageNotFoundError:
        return ""


def _log_to_stderr() -> None:
    """Lines for people, with times, on stderr; set up once, and not at all where the caller set up logging itself."""
    if logging.getLogger().handlers:
        return
    for name in ("whetstone", "model"):
        ours = logging.getLogger(name)
        ours.setLevel(logging.INFO)
        if not ours.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
            ours.addHandler(handler)
            ours.propagate = False
