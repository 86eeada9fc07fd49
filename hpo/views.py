"""What the coordinator answers to people: read models of studies, trials, attempts and workers.

They are shaped for JSON (ISO times in UTC, parameters nested by label) and are what `/api/v1` returns as it stands.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, get_args

from pydantic import Field

from hpo.protocol import Answer, Point, TaskAnswers, Wire

StudyState = Literal["running", "paused", "stopped", "finished"]
STUDY_STATES: tuple[StudyState, ...] = get_args(StudyState)
TrialState = Literal["queued", "leased", "complete", "infeasible", "pruned", "failed", "cancelled"]
TRIAL_STATES: tuple[TrialState, ...] = get_args(TrialState)

T = TypeVar("T")


class Page(Wire, Generic[T]):
    """One page of a list; `next` is the cursor of the following one, or null."""

    items: list[T]
    next: str | None = None


class BudgetView(Wire):
    trials: int | None
    hours: float | None
    target: float | None
    trials_used: int
    hours_used: float


class OriginView(Answer):
    """Where a seeded trial was evaluated. The study may be gone by now."""

    study: int
    trial: int


class TrialView(Wire):
    """A trial as one row. `value` is null until it has one; `best_epoch` counts from 0."""

    study: int
    trial: int
    state: TrialState
    value: float | None
    params: Point
    origin: Literal["suggested", "queued", "recorded", "seeded"]
    reason: str
    attempts: int
    worker: str | None
    epoch: int | None
    """The last epoch reported by the current or last attempt."""
    started_at: datetime | None
    ended_at: datetime | None
    seconds: float
    """Wall time of all its attempts."""
    seeded_from: OriginView | None = None


class MetricPoint(Wire):
    attempt: int
    epoch: int
    value: float | None
    metrics: dict[str, float | None]
    at: datetime


class AttemptView(Wire):
    lease: int
    attempt: int
    state: str
    worker: str | None
    device: str
    leased_at: datetime
    renewed_at: datetime
    ended_at: datetime | None
    seconds: float
    reason: str
    traceback: str
    artifacts: str
    checkpoint_epoch: int | None
    resumed_from: int | None
    """Number of the attempt whose checkpoint this one began from, or null."""


class ScoreView(Wire):
    """Tasks answered rightly, as a share of all, with Wilson's 95% interval."""

    tasks: int
    correct: int
    accuracy: float
    low: float
    high: float


class AnswersView(Wire):
    """What a trial's best epoch made of each of the study's frozen tasks."""

    study: int
    trial: int
    score: ScoreView
    answers: TaskAnswers


class SideView(Wire):
    """One of two compared trials."""

    study: int
    study_name: str
    trial: int
    score: ScoreView


class ComparisonView(Wire):
    """Two trials task by task. Differences are of accuracies, a less b, as shares in [-1, 1]."""

    tasks: int
    a: SideView
    b: SideView
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    """The difference's 95% interval, from the paired counts (Agresti and Min 2005)."""
    high: float
    p_value: float
    """McNemar's exact test, two-sided: how often noise alone splits the tasks on which they differ so unevenly."""
    more_than_noise: bool
    verdict: str


class TrialDetail(TrialView):
    """A trial with its attempts and its learning curve. On an epoch trained twice the later attempt speaks."""

    seed: int
    history: list[AttemptView]
    curve: list[MetricPoint]
    score: ScoreView | None
    """What its best epoch made of the study's frozen tasks, or null where its answers were not told."""
    checkpoint: str | None
    """Folder with the best checkpoint, relative to the artifacts root, or null."""


class PickedView(Answer):
    """The sampler that "auto" has picked, and why."""

    sampler: str
    why: str


class SeedView(Answer):
    """What a study was given by another at its launch.

    `exact`: that study's finished trials were recorded with their values. Otherwise its best points were queued as far
    as the `parameters` that both search tell them, and `why` says why the values could not be taken over.
    """

    study: int
    name: str
    exact: bool
    trials: int
    parameters: list[str]
    why: str


class StudyView(Wire):
    study: int
    name: str
    description: str
    state: StudyState
    reason: str
    """Why it is stopped or finished ("all 24 trials are done"), empty while it runs."""
    workload: str
    direction: Literal["maximize", "minimize"]
    sampler: str
    pruner: str
    counts: dict[str, int]
    """Number of trials in each state; every state is present."""
    best: TrialView | None
    budget: BudgetView
    concurrency: int | None
    notes: str
    created_at: datetime
    finished_at: datetime | None
    spec: dict[str, Any]
    """Its document as launched, with all defaults; budget, concurrency, notes and `fixed` are those of now."""
    fixed: Point = Field(default_factory=dict)
    """Parameters fixed for the rest of the study; what is suggested next has these values."""
    picked: PickedView | None = None
    """What the sampler "auto" stands for now; null for another sampler, and until it has picked."""
    seeded: list[SeedView] = Field(default_factory=list)
    """What it began with; of its counts, trials that were recorded so are no work of this study."""
    unreadable: str = ""
    """Why this server cannot read its trials (they are then not counted here); empty where it can."""


class ProgressPoint(Wire):
    """One finished trial on the best-so-far chart, in order of finishing."""

    trial: int
    state: TrialState
    value: float | None
    best: float | None
    ended_at: datetime


class WorkerView(Wire):
    worker: str
    state: Literal["idle", "busy", "draining", "silent", "stopped"]
    host: str
    device: str
    memory_bytes: int | None
    version: str
    first_seen: datetime
    last_seen: datetime
    study: int | None
    trial: int | None
    trials_done: int
