"""Finished trials written again: their outcome replaced, or they themselves taken back.

Whetlab's protocol asks for this, and people do who know better. The row in `trials` stays, with its number; its value
is changed in place, or it becomes a cancelled trial. Invariant: every change adds a revision in the same transaction,
under the study's lock, so every process reads the trial once more before it suggests. Stock Optuna sees it when it
opens the study next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from hpo import writing
from hpo.desk import Known

# A finished trial's value and marks, whatever it ended as. An infeasible one has a value too, and its constraint.
OVERWRITE = sa.text("""
    WITH trial AS (
        UPDATE public.trials SET state = 'COMPLETE'
        WHERE trial_id = :trial AND state IN ('COMPLETE', 'PRUNED', 'FAIL') RETURNING trial_id, study_id
    ),
    vals AS (
        INSERT INTO public.trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, 0, :value, 'FINITE' FROM trial
        ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type
    ),
    marks AS (
        INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
        SELECT trial_id, a.key, a.value
        FROM trial, unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS a (key, value)
        ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
    )
    INSERT INTO whetstone.revisions (study_id, trial_id, what)
    SELECT study_id, trial_id, 'overwritten' FROM trial RETURNING revision_id
""")

# A finished trial becomes a cancelled one without a value. Had a worker leased it, its budget is free again.
TAKE_BACK = sa.text("""
    WITH trial AS (
        UPDATE public.trials SET state = 'FAIL'
        WHERE trial_id = :trial AND state IN ('COMPLETE', 'PRUNED', 'FAIL') RETURNING trial_id, study_id
    ),
    vals AS (DELETE FROM public.trial_values v USING trial WHERE v.trial_id = trial.trial_id),
    marks AS (
        INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
        SELECT trial_id, a.key, a.value
        FROM trial, unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS a (key, value)
        ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
    ),
    used AS (
        UPDATE whetstone.studies s SET trials_used = greatest(s.trials_used - 1, 0) FROM trial
        WHERE s.study_id = trial.study_id
          AND EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = trial.trial_id)
    )
    INSERT INTO whetstone.revisions (study_id, trial_id, what)
    SELECT study_id, trial_id, 'deleted' FROM trial RETURNING revision_id
""")

# A queued trial is given its parameters: those who remember it as it was read it once more.
REVISED = sa.text("""
    INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (:study, :trial, :what)
""")


def overwrite(conn: sa.Connection, known: Known, trial_id: int, value: float | None, why: str) -> None:
    """Give a finished trial another outcome; None makes it infeasible. The caller holds the study and the trial."""
    stored = writing.worst_value(conn, known) if value is None else value
    marks = {writing.INFEASIBLE: 1.0 if value is None else 0.0, writing.REASON: why}
    done = conn.execute(OVERWRITE, {"trial": trial_id, "value": stored, **_columns(marks)}).one_or_none()
    assert done is not None, "the trial is locked and was finished"


def take_back(conn: sa.Connection, trial_id: int, why: str) -> None:
    """Make a finished trial a cancelled one, without a value. The caller holds the study and the trial."""
    marks = {writing.CANCELLED: True, writing.REASON: why}
    done = conn.execute(TAKE_BACK, {"trial": trial_id, **_columns(marks)}).one_or_none()
    assert done is not None, "the trial is locked and was finished"


def note(conn: sa.Connection, study: int, trial_id: int, what: str) -> None:
    """Have every process read a trial once more. The caller holds the study's lock."""
    conn.execute(REVISED, {"study": study, "trial": trial_id, "what": what})


def _columns(marks: Mapping[str, Any]) -> dict[str, list[str]]:
    return {"keys": list(marks), "texts": [json.dumps(value) for value in marks.values()]}
