"""What trials made of their study's frozen tasks, one bit a task, and two trials laid side by side.

Answers come with the tell of whoever holds the lease, in its transaction, and never change afterwards. Two trials are
compared only where their tasks are certainly the same: within one study, or across two whose settings freeze the same
ones. What cannot be compared is refused with the reason.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpo import comparison, statements
from hpo.desk import Desk, Known, one_fault
from hpo.errors import Conflict, NotFound
from hpo.protocol import TaskAnswers
from hpo.views import AnswersView, ComparisonView, ScoreView, SideView

FROZEN = ("data", "folder", "ink", "way", "shot", "validation_tasks", "validation_seed")
"""The settings of the workload "siamese" that decide which tasks a trial is measured on."""

STORE = sa.text("INSERT INTO whetstone.answers (trial_id, tasks, bits) VALUES (:trial_id, :tasks, :bits)")

# A trial with its state and, where it has them, its answers.
TRIAL = sa.text(f"""
    SELECT t.trial_id, {statements.STATE} AS state, r.tasks, r.bits,
           EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = t.trial_id) AS ran
    FROM public.trials t LEFT JOIN whetstone.answers r ON r.trial_id = t.trial_id
    WHERE t.study_id = :study AND t.number = :number
""")  # noqa: S608 -- put together of constants

OF_TRIALS = sa.text("SELECT trial_id, tasks, bits FROM whetstone.answers WHERE trial_id = ANY(CAST(:ids AS integer[]))")


def store(conn: sa.Connection, trial_id: int, told: TaskAnswers) -> None:
    """Keep the answers of a trial that is being told."""
    conn.execute(STORE, {"trial_id": trial_id, "tasks": told.tasks, "bits": told.bits})


def of_trials(conn: sa.Connection, trial_ids: list[int]) -> dict[int, TaskAnswers]:
    """The answers of those of these trials that have any, by trial id."""
    rows = conn.execute(OF_TRIALS, {"ids": trial_ids})
    return {row.trial_id: TaskAnswers.of(row.tasks, bytes(row.bits)) for row in rows}


def score_of(conn: sa.Connection, trial_id: int) -> ScoreView | None:
    row = conn.execute(OF_TRIALS, {"ids": [trial_id]}).one_or_none()
    return None if row is None else _score(row)


def get(desk: Desk, study: int, number: int) -> AnswersView:
    """Return a trial's answers.

    Raises:
        NotFound: there is no such study or trial, or it has no answers; the message says why.
    """
    with desk.transaction() as conn:
        desk.known(conn, study)
        row = _read(conn, study, number)
    if row.bits is None:
        raise NotFound(_why_none(row, study, number))
    told = TaskAnswers.of(row.tasks, bytes(row.bits))
    return AnswersView(study=study, trial=number, score=_score(row), answers=told)


def compare(desk: Desk, a: tuple[int, int], b: tuple[int, int]) -> ComparisonView:
    """Compare two trials, each given as (study, number), task by task.

    Raises:
        NotFound: there is no such study or trial.
        Invalid: both are the same trial.
        Conflict: one of them has no answers, or their tasks are not the same.
    """
    if a == b:
        raise one_fault("b", "is the same trial as a: name another")
    with desk.transaction() as conn:
        first_known, second_known = desk.known(conn, a[0]), desk.known(conn, b[0])
        first, second = _read(conn, *a), _read(conn, *b)
    for row, (study, number) in ((first, a), (second, b)):
        if row.bits is None:
            raise Conflict(_why_none(row, study, number))
    _check_same_tasks(first_known, second_known)
    if first.tasks != second.tasks:
        raise Conflict(f"the trials answered {first.tasks:,} and {second.tasks:,} tasks: only equal tasks compare")
    found = comparison.pair(bytes(first.bits), bytes(second.bits), first.tasks)
    low, high = comparison.difference_interval(found)
    p_value = comparison.mcnemar(found.only_a, found.only_b)
    apart = a[0] != b[0]
    return ComparisonView(
        tasks=found.tasks,
        a=SideView(study=a[0], study_name=first_known.spec.name, trial=a[1], score=_score(first)),
        b=SideView(study=b[0], study_name=second_known.spec.name, trial=b[1], score=_score(second)),
        both=found.both,
        only_a=found.only_a,
        only_b=found.only_b,
        neither=found.neither,
        difference=found.difference,
        low=low,
        high=high,
        p_value=p_value,
        more_than_noise=p_value < comparison.LEVEL,
        verdict=comparison.verdict(found, _name(a, apart), _name(b, apart)),
    )


def _read(conn: sa.Connection, study: int, number: int) -> Any:
    row = conn.execute(TRIAL, {"study": study, "number": number}).one_or_none()
    if row is None:
        raise NotFound(f"study {study} has no trial {number}")
    return row


def _score(row: Any) -> ScoreView:
    correct = comparison.count(bytes(row.bits))
    low, high = comparison.interval(correct, row.tasks)
    return ScoreView(tasks=row.tasks, correct=correct, accuracy=correct / row.tasks, low=low, high=high)


def _name(trial: tuple[int, int], with_study: bool) -> str:
    study, number = trial
    return f"trial {number} of study {study}" if with_study else f"trial {number}"


def _why_none(row: Any, study: int, number: int) -> str:
    if row.state in ("queued", "leased"):
        why = "it is not finished: its answers come with its outcome"
    elif row.state not in ("complete", "pruned"):
        why = f"it is {row.state}, and only complete and pruned trials have them"
    elif not row.ran:
        why = "its value was recorded, not measured here"
    else:
        why = "its worker told none (an older release, or an objective of one's own)"
    return f"trial {number} of study {study} has no answers to single tasks: {why}"


def _check_same_tasks(a: Known, b: Known) -> None:
    """Raise `Conflict` unless two studies froze the same tasks. What neither names is the workload's default."""
    if a.study == b.study:
        return
    if not a.spec.workload == b.spec.workload == "siamese":
        raise Conflict("trials of two studies compare only where both have the workload siamese")
    differ = [name for name in FROZEN if a.spec.settings.get(name) != b.spec.settings.get(name)]
    if differ:
        raise Conflict(
            f"studies {a.study} and {b.study} have other tasks: their settings differ in {', '.join(differ)}"
            " (one that names a default and one that leaves it out count as different)"
        )
    if a.spec.settings.get("data", "auto") == "auto":
        raise Conflict(
            f"studies {a.study} and {b.study} leave their data to their workers: trials of two studies compare only"
            " where the setting data names the data set"
        )
