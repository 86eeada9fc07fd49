"""Trials as rows of Optuna's stock tables, written whole or in parts, each by one statement.

Every function works on the connection it is given, in one round trip; where that has no transaction open, the statement
is one of its own. Invariants: trials of a study are
numbered 0, 1, 2, ... in the order of their ids, under the study's row lock; a finished trial is never changed here; and
whatever stock Optuna reads back from these rows is what it would have written itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState
from sqlalchemy import Connection

Parameter = tuple[float, BaseDistribution]
"""A parameter as Optuna stores it: the internal value (a category's index) and the distribution it was drawn from."""

# Excludes itself and stock Optuna's FOR UPDATE, but not the key-share locks of foreign keys: no report waits for it.
_LOCK_STUDY = sa.text("SELECT study_id FROM public.studies WHERE study_id = :study FOR NO KEY UPDATE")

# A trial with all it has. The number is read after the lock, in a new statement: one that locked and counted at once
# would count a stale snapshot. Both go to the server together, and are one transaction where there is no other.
_INSERT_TRIAL = sa.text("""
    SELECT study_id FROM public.studies WHERE study_id = :study FOR NO KEY UPDATE;
    WITH clock AS (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now),
    trial AS (
        INSERT INTO public.trials (study_id, number, state, datetime_start, datetime_complete)
        SELECT :study, coalesce((SELECT max(number) + 1 FROM public.trials WHERE study_id = :study), 0),
               CAST(:state AS public.trialstate),
               CASE WHEN CAST(:began AS timestamp) IS NULL AND :running THEN now ELSE :began END,
               CASE WHEN CAST(:ended AS timestamp) IS NULL AND :finished THEN now ELSE :ended END
        FROM clock WHERE EXISTS (SELECT 1 FROM public.studies WHERE study_id = :study) RETURNING trial_id, number
    ),
    params AS (
        INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
        SELECT trial_id, p.name, p.value, p.distribution FROM trial,
            unnest(CAST(:names AS text[]), CAST(:internals AS float8[]), CAST(:distributions AS text[]))
            WITH ORDINALITY AS p (name, value, distribution, place) ORDER BY p.place
    ),
    vals AS (
        INSERT INTO public.trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, v.place - 1, nullif(nullif(v.value, 'Infinity'), '-Infinity'),
            CAST(CASE v.value WHEN 'Infinity' THEN 'INF_POS' WHEN '-Infinity' THEN 'INF_NEG' ELSE 'FINITE' END
                 AS public.trialvaluetype)
        FROM trial, unnest(CAST(:vals AS float8[])) WITH ORDINALITY AS v (value, place)
    ),
    reports AS (
        INSERT INTO public.trial_intermediate_values
            (trial_id, step, intermediate_value, intermediate_value_type)
        SELECT trial_id, r.step, nullif(nullif(nullif(r.value, 'NaN'), 'Infinity'), '-Infinity'),
            CAST(CASE r.value WHEN 'NaN' THEN 'NAN' WHEN 'Infinity' THEN 'INF_POS' WHEN '-Infinity' THEN 'INF_NEG'
                 ELSE 'FINITE' END AS public.trialintermediatevaluetype)
        FROM trial, unnest(CAST(:steps AS integer[]), CAST(:reported AS float8[])) AS r (step, value)
    ),
    system_attributes AS (
        INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
        SELECT trial_id, a.key, a.value FROM trial,
            unnest(CAST(:system_keys AS text[]), CAST(:system_values AS text[])) AS a (key, value)
    ),
    user_attributes AS (
        INSERT INTO public.trial_user_attributes (trial_id, key, value_json)
        SELECT trial_id, a.key, a.value FROM trial,
            unnest(CAST(:user_keys AS text[]), CAST(:user_values AS text[])) AS a (key, value)
    )
    SELECT trial_id, number FROM trial
""")

# Many trials that only wait, in order, each with attributes of its own (`of` says which trial an attribute is of).
_INSERT_WAITING = sa.text("""
    WITH trial AS (
        INSERT INTO public.trials (study_id, number, state)
        SELECT :study, first.number + place, 'WAITING'
        FROM (SELECT coalesce(max(number) + 1, 0) AS number FROM public.trials WHERE study_id = :study) AS first,
            generate_series(0, :count - 1) AS place
        ORDER BY place RETURNING trial_id, number
    ),
    attributes AS (
        INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
        SELECT trial.trial_id, a.key, a.value
        FROM (SELECT trial_id, row_number() OVER (ORDER BY number) - 1 AS place FROM trial) AS trial
        JOIN unnest(CAST(:of AS integer[]), CAST(:keys AS text[]), CAST(:texts AS text[])) AS a (of, key, value)
            ON a.of = trial.place
    )
    SELECT trial_id FROM trial ORDER BY number
""")

# The end of a trial, if it has not ended yet: its state, values and attributes at once, or nothing at all.
_FINISH_TRIAL = sa.text("""
    WITH trial AS (
        UPDATE public.trials SET state = CAST(:state AS public.trialstate),
            datetime_complete = clock_timestamp() AT TIME ZONE 'UTC'
        WHERE trial_id = :trial AND state IN ('RUNNING', 'WAITING') RETURNING trial_id
    ),
    vals AS (
        INSERT INTO public.trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, v.place - 1, nullif(nullif(v.value, 'Infinity'), '-Infinity'),
            CAST(CASE v.value WHEN 'Infinity' THEN 'INF_POS' WHEN '-Infinity' THEN 'INF_NEG' ELSE 'FINITE' END
                 AS public.trialvaluetype)
        FROM trial, unnest(CAST(:vals AS float8[])) WITH ORDINALITY AS v (value, place)
        ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type
    ),
    system_attributes AS (
        INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
        SELECT trial_id, a.key, a.value FROM trial,
            unnest(CAST(:system_keys AS text[]), CAST(:system_values AS text[])) AS a (key, value)
        ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
    )
    SELECT trial_id FROM trial
""")

# The end of many trials without values, of those that have not ended yet.
_FAIL_TRIALS = sa.text("""
    WITH trial AS (
        UPDATE public.trials SET state = 'FAIL', datetime_complete = clock_timestamp() AT TIME ZONE 'UTC'
        WHERE trial_id = ANY(CAST(:ids AS integer[])) AND state IN ('RUNNING', 'WAITING') RETURNING trial_id
    )
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT trial_id, a.key, a.value
    FROM trial, unnest(CAST(:system_keys AS text[]), CAST(:system_values AS text[])) AS a (key, value)
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
""")

# Between two states that are not finished: queued, leased, queued again. The start is that of the last lease.
_MOVE_TRIAL = sa.text("""
    UPDATE public.trials SET state = CAST(:state AS public.trialstate),
        datetime_start = CASE WHEN :running THEN clock_timestamp() AT TIME ZONE 'UTC' ELSE datetime_start END
    WHERE trial_id = :trial AND state IN ('RUNNING', 'WAITING') AND state <> CAST(:state AS public.trialstate)
    RETURNING trial_id
""")

_ADD_PARAMS = sa.text("""
    INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT :trial, p.name, p.value, p.distribution
    FROM unnest(CAST(:names AS text[]), CAST(:internals AS float8[]), CAST(:distributions AS text[]))
        WITH ORDINALITY AS p (name, value, distribution, place) ORDER BY p.place
    ON CONFLICT (trial_id, param_name) DO NOTHING
""")

_SET_SYSTEM_ATTRIBUTES = sa.text("""
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT :trial, a.key, a.value FROM unnest(CAST(:keys AS text[]), CAST(:texts AS text[])) AS a (key, value)
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
""")

# The trial's row is held while a part of it is written: no tell slips in between the look at its state and the write.
_HELD = """
    WITH trial AS (
        SELECT trial_id, study_id FROM public.trials
        WHERE trial_id = :trial AND state IN ('RUNNING', 'WAITING') FOR NO KEY UPDATE
    )
"""

# `fitting` are distributions that this one may stand beside; where the study has another one under this name, that one
# is returned and nothing is written.
_SET_PARAM = sa.text(
    _HELD  # noqa: S608
    + """,
    older AS (
        SELECT p.distribution_json FROM trial JOIN public.trials t ON t.study_id = trial.study_id
        JOIN public.trial_params p ON p.trial_id = t.trial_id AND p.param_name = :name LIMIT 1
    ),
    written AS (
        INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
        SELECT trial_id, :name, :value, :distribution FROM trial LEFT JOIN older ON true
        WHERE older.distribution_json IS NULL OR older.distribution_json = ANY(CAST(:fitting AS text[]))
        ON CONFLICT (trial_id, param_name)
        DO UPDATE SET param_value = excluded.param_value, distribution_json = excluded.distribution_json
        RETURNING trial_id
    )
    SELECT (SELECT count(*) > 0 FROM written) AS written, (SELECT distribution_json FROM older) AS older FROM trial
"""
)
_SET_REPORT = sa.text(
    _HELD  # noqa: S608
    + """
    INSERT INTO public.trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, :step, nullif(nullif(nullif(r.value, 'NaN'), 'Infinity'), '-Infinity'),
        CAST(CASE r.value WHEN 'NaN' THEN 'NAN' WHEN 'Infinity' THEN 'INF_POS' WHEN '-Infinity' THEN 'INF_NEG'
             ELSE 'FINITE' END AS public.trialintermediatevaluetype)
    FROM trial, (SELECT CAST(:value AS float8) AS value) AS r
    ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
        intermediate_value_type = excluded.intermediate_value_type
    RETURNING trial_id
"""
)


def set_attribute(held: str, of: str, kind: str) -> sa.TextClause:
    """Set one attribute of a study or a trial, where `held` finds it."""
    return sa.text(f"""{held}
        INSERT INTO public.{of}_{kind}_attributes ({of}_id, key, value_json) SELECT {of}_id, :key, :text FROM {of}
        ON CONFLICT ({of}_id, key) DO UPDATE SET value_json = excluded.value_json RETURNING {of}_id
    """)  # noqa: S608


_SET_TRIAL_ATTRIBUTE = {kind: set_attribute(_HELD, "trial", kind) for kind in ("user", "system")}

# The distributions that a study has under some names.
_DISTRIBUTIONS = sa.text("""
    SELECT n.name, (
        SELECT p.distribution_json FROM public.trials t JOIN public.trial_params p ON p.trial_id = t.trial_id
        WHERE t.study_id = :study AND p.param_name = n.name LIMIT 1) AS text
    FROM unnest(CAST(:names AS text[])) AS n (name)
""")


def lock_study(conn: Connection, study_id: int) -> None:
    """Hold the study's row to the end of the transaction. Take it before a trial's, and count in a later statement.

    Raises KeyError when there is no such study.
    """
    if conn.execute(_LOCK_STUDY, {"study": study_id}).one_or_none() is None:
        raise KeyError(f"there is no study {study_id}")


def insert_trial(
    conn: Connection,
    study_id: int,
    state: TrialState,
    params: Mapping[str, Parameter] | None = None,
    system_attrs: Mapping[str, Any] | None = None,
    *,
    user_attrs: Mapping[str, Any] | None = None,
    values: Sequence[float] | None = None,
    reports: Mapping[int, float] | None = None,
    began: datetime | None = None,
    ended: datetime | None = None,
) -> tuple[int, int]:
    """Add a trial with all it has, under the study's lock, in one round trip; returns (trial_id, number).

    `params` keep their order. `began` and `ended` are aware times, by default PostgreSQL's clock where the state calls
    for them. Raises KeyError when there is no such study, ValueError on a value that is NaN.
    """
    row = conn.execute(
        _INSERT_TRIAL,
        {
            "study": study_id,
            "state": state.name,
            "running": state == TrialState.RUNNING,
            "finished": state.is_finished(),
            "began": _to_utc(began),
            "ended": _to_utc(ended),
            **_parameters(params or {}),
            "vals": _checked(values or ()),
            "steps": list(reports or ()),
            "reported": [float(value) for value in (reports or {}).values()],
            **_attributes("system", system_attrs or {}),
            **_attributes("user", user_attrs or {}),
        },
    ).one_or_none()
    if row is None:
        raise KeyError(f"there is no study {study_id}")
    return row.trial_id, row.number


def insert_waiting(conn: Connection, study_id: int, marks: Sequence[Mapping[str, Any]]) -> list[int]:
    """Add a waiting trial for each of `marks`, its system attributes, in order; returns their ids.

    Two statements, however many they are. Raises KeyError when there is no such study.
    """
    lock_study(conn, study_id)
    flat = [(place, key, json.dumps(value)) for place, each in enumerate(marks) for key, value in each.items()]
    of, keys, texts = ([item[part] for item in flat] for part in range(3))
    found = conn.execute(
        _INSERT_WAITING, {"study": study_id, "count": len(marks), "of": of, "keys": keys, "texts": texts}
    )
    return list(found.scalars())


def fail_trials(conn: Connection, trial_ids: Sequence[int], system_attrs: Mapping[str, Any]) -> None:
    """End these trials as failed, all with these attributes, in one statement; those that have ended stay as they are.

    The caller holds their rows: taken here, they would be locked in whatever order the server finds them.
    """
    conn.execute(_FAIL_TRIALS, {"ids": list(trial_ids), **_attributes("system", system_attrs)})


def finish_trial(
    conn: Connection,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | float | None = None,
    system_attrs: Mapping[str, Any] | None = None,
) -> bool:
    """End a trial with its values and attributes, in one statement; False (and nothing is changed) if it had ended.

    Raises ValueError on a value that is NaN or a state that is no end.
    """
    if not state.is_finished():
        raise ValueError(f"{state.name} does not end a trial")
    if isinstance(values, int | float):
        values = (values,)
    row = conn.execute(
        _FINISH_TRIAL,
        {
            "trial": trial_id,
            "state": state.name,
            "vals": _checked(values or ()),
            **_attributes("system", system_attrs or {}),
        },
    ).one_or_none()
    return row is not None


def move_trial(conn: Connection, trial_id: int, state: TrialState) -> bool:
    """Take an unfinished trial from WAITING to RUNNING or back; False if it is there already, has ended or is none."""
    if state.is_finished():
        raise ValueError(f"{state.name} ends a trial: use finish_trial")
    found = conn.execute(
        _MOVE_TRIAL, {"trial": trial_id, "state": state.name, "running": state == TrialState.RUNNING}
    ).one_or_none()
    return found is not None


def add_params(conn: Connection, trial_id: int, params: Mapping[str, Parameter]) -> None:
    """Give a trial parameters it does not have yet (a queued point that the sampler completes)."""
    conn.execute(_ADD_PARAMS, {"trial": trial_id, **_parameters(params)})


def set_system_attrs(conn: Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
    """Set system attributes of a trial, whatever its state, replacing those of the same key."""
    keys, texts = list(attrs), [json.dumps(value) for value in attrs.values()]
    conn.execute(_SET_SYSTEM_ATTRIBUTES, {"trial": trial_id, "keys": keys, "texts": texts})


def set_param(
    conn: Connection, trial_id: int, name: str, parameter: Parameter, fitting: Sequence[str] = ()
) -> tuple[bool, str | None] | None:
    """Give an unfinished trial a parameter; None if it has finished or is none.

    Returns whether it was written. It is not where the study has a distribution under this name that reads neither like
    this one nor like one of `fitting`, those that are known to go with it; that one is returned too.
    """
    internal, distribution = parameter
    text = distribution_to_json(distribution)
    row = conn.execute(
        _SET_PARAM,
        {"trial": trial_id, "name": name, "value": internal, "distribution": text, "fitting": [text, *fitting]},
    ).one_or_none()
    return None if row is None else (row.written, row.older)


def set_report(conn: Connection, trial_id: int, step: int, value: float) -> bool:
    """Set an unfinished trial's value at a step; False if it has finished or is none."""
    values = {"trial": trial_id, "step": step, "value": float(value)}
    return conn.execute(_SET_REPORT, values).one_or_none() is not None


def set_attr(conn: Connection, trial_id: int, kind: Literal["user", "system"], key: str, value: Any) -> bool:
    """Set an attribute of an unfinished trial; False if it has finished or is none."""
    values = {"trial": trial_id, "key": key, "text": json.dumps(value)}
    return conn.execute(_SET_TRIAL_ATTRIBUTE[kind], values).one_or_none() is not None


def distributions(conn: Connection, study_id: int, names: Sequence[str]) -> dict[str, str]:
    """Return, as text, a distribution that the study has under each of these names, where it has one."""
    found = conn.execute(_DISTRIBUTIONS, {"study": study_id, "names": list(names)})
    return {name: text for name, text in found if text is not None}


def _parameters(params: Mapping[str, Parameter]) -> dict[str, list[Any]]:
    return {
        "names": list(params),
        "internals": [float(internal) for internal, _ in params.values()],
        "distributions": [distribution_to_json(distribution) for _, distribution in params.values()],
    }


def _attributes(kind: str, attrs: Mapping[str, Any]) -> dict[str, list[str]]:
    return {f"{kind}_keys": list(attrs), f"{kind}_values": [json.dumps(value) for value in attrs.values()]}


def _checked(values: Sequence[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if any(math.isnan(number) for number in numbers):
        raise ValueError("a trial's value is not a number")
    return numbers


def _to_utc(moment: datetime | None) -> datetime | None:
    """As Optuna stores times: UTC without saying so. A naive time is local, as Optuna's own are."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)
