"""The wire between a worker and the coordinator, and what the coordinator asks of a workload.

Everything here is plain data: a worker imports this module without Optuna or SQLAlchemy. Floats are finite
(NaN and infinities are refused at the edge); unknown keys are refused, so that a misspelt one is never lost.
The one invariant: a lease is spoken for by its `token`, and a message with an older token changes nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from hpo.errors import Fault

Value = float | int | str | bool
Point = dict[str, Value | dict[str, Value]]
"""Hyperparameters as people write them: ``{"eta": {"conv1": 0.01, ...}, "batch_pairs": 128}``."""

MAX_WAIT_S = 20.0
MAX_TASKS = 1_000_000
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"
WorkerName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Text = Annotated[str, StringConstraints(max_length=500)]
FencingToken = Annotated[int, Field(ge=0, lt=2**63)]
"""Of one lease; a later lease of the same trial has a larger one. PostgreSQL cannot compare more than 64 bits."""
LongText = Annotated[str, StringConstraints(max_length=20_000)]


class Wire(BaseModel):
    """Base of all messages: immutable, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(Wire):
    """Base of what the coordinator answers. A worker passes over what a newer server says beside it."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Workload(Protocol):
    """What a coordinator that knows no convolution asks of the thing it tunes."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        """Name every fault of a study's `settings`; paths are relative to them (``net``, ``epochs``)."""

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        """Say why this point can never be trained (no pixels left, an unknown hyperparameter), or None if it can."""


@runtime_checkable
class Sized(Protocol):
    """What a workload may say beside: how much memory a point takes. One that ran out then speaks for larger ones."""

    def footprint(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
        """Return the memory that training this point takes, to be compared with other points' of the study only.

        The unit is the workload's own. None where it cannot be told.
        """


class WorkerHello(Wire):
    """A worker introduces itself and asks for a device of its own among those its machine has."""

    worker: WorkerName
    host: Text = ""
    devices: list[Text] = Field(default_factory=list, max_length=64)
    version: Text = ""
    memory_bytes: int | None = Field(default=None, ge=0, lt=2**53)
    again: bool = False
    """The same process asks once more, after an outage or for want of a device: a wish to drain it stands."""


class WorkerPlace(Answer):
    """The answer: the device that is this worker's until it goes silent, or None when all are taken."""

    worker: str
    device: str | None


class ClaimRequest(Wire):
    """A worker asks for work; the answer comes after at most `wait_s` seconds."""

    worker: WorkerName
    device: Text = ""
    memory_bytes: int | None = Field(default=None, ge=0, lt=2**53)
    version: Text = ""
    wait_s: float = Field(default=0.0, ge=0.0, le=MAX_WAIT_S, allow_inf_nan=False)


class AskRequest(Wire):
    """A client that evaluates its own objective asks for one trial of one study."""

    worker: WorkerName


class Lease(Answer):
    """A trial in a worker's hands, until `term_s` seconds pass without a report."""

    lease: int
    token: FencingToken
    study: int
    study_name: str
    trial: int
    attempt: int
    workload: str
    params: Point
    settings: dict[str, Any]
    seed: int
    term_s: float
    heartbeat_s: float
    stall_s: float
    artifacts: str
    """Folder for this attempt's checkpoints, relative to the artifacts root. Made by the server."""
    resume: str | None = None
    """Folder of the earlier attempt that left a checkpoint, or None."""
    last_epoch: int | None = None
    """The last epoch that an earlier attempt reported: what a checkpoint holds beyond it was never heard of."""


class EpochReport(Wire):
    """What one epoch measured. `value` is the objective at that epoch (null when it is not finite)."""

    epoch: int = Field(ge=0, le=2_000_000_000)
    value: FiniteFloat | None = None
    metrics: dict[Annotated[str, StringConstraints(min_length=1, max_length=64)], FiniteFloat | None] = Field(
        default_factory=dict, max_length=64
    )


class ReportRequest(Wire):
    """Progress and heartbeat in one: an empty `reports` only renews the lease."""

    token: FencingToken
    reports: list[EpochReport] = Field(default_factory=list, max_length=1000)
    checkpoint_epoch: int | None = Field(default=None, ge=0, le=2_000_000_000)
    """Epochs that the newest checkpoint on disk holds; null when there is none yet."""


class Verdict(StrEnum):
    """What a worker is to do with its trial."""

    GO_ON = "go_on"
    PRUNE = "prune"
    STOP = "stop"
    LOST = "lost"


class ReportReply(Answer):
    verdict: Verdict
    reason: str = ""


class TaskAnswers(Wire):
    """Which of a study's frozen tasks were answered rightly, one bit a task.

    `right` is base64 of the bits: the first task in the highest bit of the first byte (as `numpy.packbits` does it),
    and zeros after the last.
    """

    tasks: int = Field(ge=1, le=MAX_TASKS)
    right: Annotated[str, StringConstraints(max_length=(MAX_TASKS + 23) // 24 * 4)]

    @field_validator("right")
    @classmethod
    def _whole(cls, text: str, info: ValidationInfo) -> str:
        try:
            bits = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise PydanticCustomError("answers_base64", "is not base64") from None
        tasks = info.data.get("tasks")
        if tasks is None:  # it has a fault of its own
            return text
        size = (tasks + 7) // 8
        if len(bits) != size:
            raise PydanticCustomError(
                "answers_length",
                "must hold one bit a task: {size} bytes, not {found}",
                {"size": size, "found": len(bits)},
            )
        if bits[-1] & ((1 << (8 * size - tasks)) - 1):
            raise PydanticCustomError("answers_rest", "must be zero in the bits after the last task")
        return text

    @classmethod
    def of(cls, tasks: int, bits: bytes) -> Self:
        return cls(tasks=tasks, right=base64.b64encode(bits).decode())

    @property
    def bits(self) -> bytes:
        return base64.b64decode(self.right)


Outcome = Literal["complete", "infeasible", "pruned", "failed"]


class TellRequest(Wire):
    """The outcome of a trial. `value` is required for complete; for infeasible it is the chance level, where known."""

    token: FencingToken
    outcome: Outcome
    value: FiniteFloat | None = None
    reason: LongText = ""
    traceback: Annotated[str, StringConstraints(max_length=100_000)] = ""
    checkpoint_epoch: int | None = Field(default=None, ge=0, le=2_000_000_000)
    answers: TaskAnswers | None = None
    """Of the best epoch; a complete or a pruned trial may have them."""


class CorrectionRequest(Wire):
    """Another outcome for a trial that has ended: a person knows better. `value` is required for complete."""

    outcome: Literal["complete", "infeasible"] = "complete"
    value: FiniteFloat | None = None
    reason: LongText = ""


class TellReply(Answer):
    study: int
    trial: int
    state: str
    value: float | None


ReleaseReason = Literal["shutdown", "stopped", "drained", "stalled", "broken"]


class ReleaseRequest(Wire):
    """A worker hands its trial back unfinished. "stalled" and "broken" (its device gave up) count as a death."""

    token: FencingToken
    reason: ReleaseReason
    checkpoint_epoch: int | None = Field(default=None, ge=0, le=2_000_000_000)
