"""One trial in a worker's hands, from its lease to the coordinator's answer about its outcome.

Training runs in the one trainer thread; this side watches it. Promise: every lease that is conducted here ends in a
tell or a release, each repeated until answered, unless the lease was lost (then it is dropped) or this process is
told to stop while no server answers (then the release is left to the next worker of this home). A trial that makes no
step for `stall_s` is released and the process must end, since a stuck thread cannot be killed.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from hpo.protocol import EpochReport, Lease, ReleaseReason, ReleaseRequest, TaskAnswers, TellRequest, Verdict
from hpo.rest import ApiError, Backoff, Client, ServerUnreachable, is_transient
from workers.artifacts import Artifacts, Place, UnsafeName
from workers.sender import Sender
from workers.stop import Stop, Stopped
from workers.unsent import Unsent

if TYPE_CHECKING:
    from workers.siamese import Ended

log = logging.getLogger("whetstone.worker")

STEP_S = 6.0
"""After a request to stop, training has this long to come to its next step and write a checkpoint,"""
FLUSH_S = 7.5
"""its reports until then to reach the server,"""
ANSWER_S = 9.0
"""and the release until then to be answered. Counted from the request: the whole is within 10 s."""
UPLOAD_S = 120.0
"""How long the end of a trial waits for its last checkpoints to be copied to a distant artifacts root."""


class Trains(Protocol):
    """A workload's training: `workers.siamese.Siamese`, or another one."""

    def train(
        self, lease: Lease, place: Place, report: Callable[[EpochReport], Verdict], interrupt: Callable[[], bool]
    ) -> Ended: ...


@dataclass(frozen=True)
class Leave:
    """The process has to end after this trial. `stuck`: a thread is beyond reach, so it must end without joining."""

    code: int
    message: str
    stuck: bool = False


class Conductor:
    """Conducts trials one after another for one worker process."""

    def __init__(
        self,
        connect: Callable[[], Client],
        stop: Stop,
        trains: Trains,
        artifacts: Artifacts,
        unsent: Unsent,
        *,
        threads: int | None,
    ) -> None:
        self._connect = connect
        self._client = connect()
        self._sending = connect()  # the sender's own: what breaks off here must not disturb it
        self._stop = stop
        self._trains = trains
        self._artifacts = artifacts
        self._unsent = unsent
        self._trainer = ThreadPoolExecutor(1, "trainer", initializer=_set_threads, initargs=(threads,))

    def close(self) -> None:
        self._trainer.shutdown(wait=True, cancel_futures=True)

    def conduct(self, lease: Lease, *, confirm: bool = False) -> Leave | None:
        """Train the lease and tell how it ended. `confirm`: the lease came late and may be over already."""
        began = time.monotonic()
        log.info("trial %d of study %r: attempt %d begins", lease.trial, lease.study_name, lease.attempt)
        sender = Sender(self._sending, lease, confirm=confirm)
        try:
            place = self._artifacts.open(lease.artifacts, sender.checkpoint)
        except (UnsafeName, OSError) as error:
            self._release(lease, "shutdown", None)
            return Leave(1, f"no place for the checkpoints of trial {lease.trial}: {error}")
        sender.start()
        watch = _Watch(lease.stall_s)

        def interrupt() -> bool:
            watch.step()
            return self._stop.requested or sender.verdict is not Verdict.GO_ON

        job = self._trainer.submit(self._trains.train, lease, place, sender.report, interrupt)
        try:
            leave = self._watch(lease, job, watch, sender)
            if leave is not None:
                return leave
            return self._end(lease, job, place, sender, began)
        finally:
            sender.close()
            if not job.running():
                place.close()

    def _watch(self, lease: Lease, job: Future[Ended], watch: _Watch, sender: Sender) -> Leave | None:
        """Wait for the training to end; None when it did."""
        while not wait([job], timeout=0.1).done:
            if self._stop.requested and (self._stop.insisted or self._stop.elapsed > STEP_S):
                if not self._stop.insisted:
                    log.warning("trial %d does not come to its next step: left at its last checkpoint", lease.trial)
                sender.close(0.1)
                self._release(lease, "shutdown", sender.checkpoint_epoch)
                return Leave(self._stop.exit_code if self._stop.insisted else 0, "stopped", stuck=True)
            if watch.stalled():
                log.error("trial %d made no step for %.0f s; it was here:\n%s", lease.trial, lease.stall_s, _stacks())
                sender.close(0.5)
                self._release(lease, "stalled", sender.checkpoint_epoch)
                return Leave(4, f"trial {lease.trial} is stuck and was released; restart this worker", stuck=True)
        return None

    def _end(self, lease: Lease, job: Future[Ended], place: Place, sender: Sender, began: float) -> Leave | None:
        """Training is over: deliver what is still here, and the outcome."""
        from workers.siamese import Ended, MachineUnfit

        leave = None
        try:
            ended = job.result()
        except MachineUnfit as error:
            leave = Leave(1, str(error))
            ended = Ended("stopped")
        except BaseException as error:
            ended = Ended("failed", reason=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        left = self._stop.left(FLUSH_S)
        if not place.finish(UPLOAD_S if left is None else left):
            log.warning("the last checkpoint of trial %d did not reach %s", lease.trial, self._artifacts.root)
        self._flush(lease, sender)
        sender.close()
        if sender.verdict is Verdict.LOST:
            log.warning("trial %d is not ours any more and was dropped: %s", lease.trial, sender.reason)
            return leave
        if ended.outcome == "stopped" and leave is None and sender.verdict is Verdict.PRUNE:
            ended = replace(ended, outcome="pruned", reason=sender.reason)
        if ended.poisoned:  # a GPU that vanished is a death of the worker's; the trial goes on elsewhere, a few times
            log.error("trial %d lost its device:\n%s", lease.trial, ended.traceback.rstrip() or ended.reason)
            self._release(lease, "broken", sender.checkpoint_epoch)
            return Leave(3, "the CUDA device gave up; restart this worker: only a new process can use it again")
        if ended.outcome == "stopped":
            by_person = sender.verdict is Verdict.STOP and leave is None
            self._release(lease, "stopped" if by_person else "shutdown", sender.checkpoint_epoch)
            return leave
        self._tell(lease, ended, sender, time.monotonic() - began)
        return leave

    def _flush(self, lease: Lease, sender: Sender) -> None:
        """Wait until every report is with the server; only a request to stop cuts that short."""
        while not sender.flush(0.1):
            if (left := self._stop.left(FLUSH_S)) is not None and left <= 0.1:
                log.warning("trial %d: its last reports could not be delivered", lease.trial)
                return

    def _tell(self, lease: Lease, ended: Ended, sender: Sender, seconds: float) -> None:
        assert ended.outcome != "stopped"
        request = TellRequest(
            token=lease.token,
            outcome=ended.outcome,
            value=ended.value,
            reason=_storable(ended.reason, 20_000),
            traceback=_storable(ended.traceback, 100_000),
            checkpoint_epoch=sender.checkpoint_epoch,
            answers=_answers(lease, ended),
        )
        if ended.outcome == "failed":
            log.error("trial %d failed:\n%s", lease.trial, ended.traceback.rstrip() or ended.reason)
        path, body = f"/api/v1/leases/{lease.lease}/tell", request.model_dump(mode="json")
        if request.answers is None:
            del body["answers"]  # servers of an older release know no such field
        try:
            reply = self._settle(path, body)
        except (ServerUnreachable, ApiError) as error:
            if is_transient(error):
                log.error("the outcome of trial %d could not be told (%s); %s", *self._left(lease, path, body, error))
            elif isinstance(error, ApiError) and error.status in (400, 413, 422) and request.answers is not None:
                log.warning("trial %d is told without its answers to single tasks: %s", lease.trial, error)
                self._tell(lease, replace(ended, answers=None), sender, seconds)
            elif isinstance(error, ApiError) and error.status in (400, 413, 422) and ended.outcome != "failed":
                refused = f"the coordinator refused the outcome ({ended.outcome}): {error}"
                self._tell(lease, replace(ended, outcome="failed", value=None, reason=refused), sender, seconds)
            else:
                log.warning("the outcome of trial %d changed nothing: %s", lease.trial, error)
            return
        value = f", {ended.value:.4f}" if ended.value is not None else ""
        best = (
            f" (best epoch {ended.best_epoch})" if ended.outcome == "complete" and ended.best_epoch is not None else ""
        )
        why = f": {ended.reason}" if ended.reason and ended.outcome in ("infeasible", "pruned") else ""
        log.info("trial %d: %s%s after %.1f s%s%s", lease.trial, reply["state"], value, seconds, best, why)

    def _release(self, lease: Lease, reason: ReleaseReason, checkpoint_epoch: int | None) -> None:
        request = ReleaseRequest(token=lease.token, reason=reason, checkpoint_epoch=checkpoint_epoch)
        path, body = f"/api/v1/leases/{lease.lease}/release", request.model_dump(mode="json")
        try:
            self._settle(path, body)
            log.info("trial %d: handed back (%s)", lease.trial, reason)
        except (ServerUnreachable, ApiError) as error:
            log.warning("trial %d could not be handed back (%s); %s", *self._left(lease, path, body, error))

    def _left(self, lease: Lease, path: str, body: Any, error: Exception) -> tuple[int, Exception, str]:
        """Leave a message that no server took to the next worker of this home; for the log, what becomes of it."""
        if is_transient(error) and self._unsent.keep(self._client.url, path, body):
            return lease.trial, error, "the next worker of this home tries again"
        return lease.trial, error, "its lease runs out by itself"

    def release_unstarted(self, lease: Lease) -> None:
        """Hand back a lease that came when this process was already asked to stop."""
        self._release(lease, "shutdown", None)

    def _settle(self, path: str, body: Any) -> Any:
        """Repeat one message until it is answered. Once asked to stop, only as long as that allows."""
        backoff, said, faults = Backoff(0.1, 3.0), False, 0
        while True:
            left = self._stop.left(ANSWER_S)
            try:
                if left is None:
                    with self._stop.breakable():
                        return self._client.once("POST", path, json=body, timeout_s=20.0)
                return self._client.once("POST", path, json=body, timeout_s=max(left, 0.5))
            except Stopped:
                self._client = self._connect()  # the old one was left in the middle of a request
                continue
            except (ServerUnreachable, ApiError) as error:
                faults += isinstance(error, ApiError) and error.status == 500
                hopeless = not is_transient(error) or faults >= 10
                if hopeless or (left is not None and left <= 0.1):
                    raise
                if not said:
                    said = True
                    log.warning("the outcome is kept and told again: %s", error)
                delay = backoff.next(error)
            try:
                if self._stop.requested:
                    time.sleep(min(delay, 0.5))
                else:
                    self._stop.sleep(delay)
            except Stopped:
                continue


class _Watch:
    """When the training last made a step."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._last = time.monotonic()

    def step(self) -> None:
        self._last = time.monotonic()

    def stalled(self) -> bool:
        return time.monotonic() - self._last > self._stall_s


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _answers(lease: Lease, ended: Ended) -> TaskAnswers | None:
    """The answers as the wire takes them. Those that it would refuse are left out: the outcome counts more."""
    if ended.answers is None or ended.outcome not in ("complete", "pruned"):
        return None
    try:
        return TaskAnswers.of(ended.tasks, ended.answers)
    except ValueError as error:
        log.warning("trial %d is told without its answers to single tasks: %s", lease.trial, error)
        return None


def _storable(text: str, limit: int) -> str:
    """Text that JSON and PostgreSQL can keep; of a long one the end, where a traceback says what happened."""
    clean = text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= limit else "..." + clean[-(limit - 3) :]


def _stacks() -> str:
    """Where every thread of the trainer stands."""
    import threading

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "".join(
        "".join(traceback.format_stack(frame)) for ident, frame in frames if names.get(ident, "").startswith("trainer")
    )
