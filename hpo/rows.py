"""Trials as rows of Optuna's stock tables, written and read by sets: a whole trial in one statement, many in six.

Every function works on the connection it is given, inside the caller's transaction. Invariants: trials of a study are
numbered 0, 1, 2, ... in the order of their ids, under the study's row lock; a finished trial is never changed here; and
whatever stock Optuna reads back from these rows is what it would have written itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection

Parameter = tuple[float, BaseDistribution]
"""A parameter as Optuna stores it: the internal value (a category's index) and the distribution it was drawn from."""

# Excludes itself and stock Optuna's FOR UPDATE, but not the key-share locks of foreign keys: no report waits for it.
_LOCK_STUDY = sa.text("SELECT study_id FROM public.studies WHERE study_id = :study FOR NO KEY UPDATE")

# A trial with all it has. The number is read after the lock, in a new statement: one that locked and counted at once
# would count a stale snapshot. Text arrays keep the statement's shape, and so its plan, whatever the parameters are.
_INSERT_TRIAL = sa.text("""
    WITH clock AS (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now),
    trial AS (
        INSERT INTO public.trials (study_id, number, state, datetime_start, datetime_complete)
        SELECT :study, coalesce((SELECT max(number) + 1 FROM public.trials WHERE study_id = :study), 0),
               CAST(:state AS public.trialstate),
               CASE WHEN CAST(:began AS timestamp) IS NULL AND :running THEN now ELSE :began END,
               CASE WHEN CAST(:ended AS timestamp) IS NULL AND :finished THEN now ELSE :ended END
        FROM clock RETURNING trial_id, number
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

_SET_REPORTS = sa.text("""
    INSERT INTO public.trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT :trial, r.step, nullif(nullif(nullif(r.value, 'NaN'), 'Infinity'), '-Infinity'),
        CAST(CASE r.value WHEN 'NaN' THEN 'NAN' WHEN 'Infinity' THEN 'INF_POS' WHEN '-Infinity' THEN 'INF_NEG'
             ELSE 'FINITE' END AS public.trialintermediatevaluetype)
    FROM unnest(CAST(:steps AS integer[]), CAST(:reported AS float8[])) AS r (step, value)
    ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
        intermediate_value_type = excluded.intermediate_value_type
""")

_TRIAL_COLUMNS = "trial_id, number, state::text AS state, datetime_start, datetime_complete"

# The trials first, the rest after: a trial seen as finished then has all it will ever have.
_TRIALS_OF_STUDY = sa.text(f"""
    SELECT {_TRIAL_COLUMNS} FROM public.trials
    WHERE study_id = :study AND (trial_id > :newer OR trial_id = ANY(CAST(:also AS integer[])))
      AND (CAST(:states AS text[]) IS NULL OR state::text = ANY(CAST(:states AS text[])))
    ORDER BY trial_id
""")  # noqa: S608
_TRIALS_BY_ID = sa.text(f"""
    SELECT {_TRIAL_COLUMNS} FROM public.trials WHERE trial_id = ANY(CAST(:ids AS integer[])) ORDER BY trial_id
""")  # noqa: S608
_VALUES = sa.text("""
    SELECT trial_id, array_agg(CASE value_type WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity'
                               ELSE value END ORDER BY objective) AS found
    FROM public.trial_values WHERE trial_id = ANY(CAST(:ids AS integer[])) GROUP BY trial_id
""")
_PARAMS = sa.text("""
    SELECT trial_id, array_agg(param_name ORDER BY param_id), array_agg(param_value ORDER BY param_id),
        array_agg(distribution_json ORDER BY param_id)
    FROM public.trial_params WHERE trial_id = ANY(CAST(:ids AS integer[])) GROUP BY trial_id
""")
_REPORTS = sa.text("""
    SELECT trial_id, array_agg(step ORDER BY step),
        array_agg(CASE intermediate_value_type WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity'
                  WHEN 'INF_NEG' THEN '-Infinity' ELSE intermediate_value END ORDER BY step)
    FROM public.trial_intermediate_values WHERE trial_id = ANY(CAST(:ids AS integer[])) GROUP BY trial_id
""")
_SYSTEM_ATTRIBUTES = sa.text("""
    SELECT trial_id, key, value_json FROM public.trial_system_attributes WHERE trial_id = ANY(CAST(:ids AS integer[]))
    ORDER BY trial_system_attribute_id
""")
_USER_ATTRIBUTES = sa.text("""
    SELECT trial_id, key, value_json FROM public.trial_user_attributes WHERE trial_id = ANY(CAST(:ids AS integer[]))
    ORDER BY trial_user_attribute_id
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
    """Add a trial with all it has, in one statement after the study's lock; returns (trial_id, number).

    `params` keep their order. `began` and `ended` are aware times, by default PostgreSQL's clock where the state calls
    for them. Raises KeyError when there is no such study, ValueError on a value that is NaN.
    """
    lock_study(conn, study_id)
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
    ).one()
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


def set_reports(conn: Connection, trial_id: int, reports: Mapping[int, float]) -> None:
    """Set intermediate values by step, replacing those of the same step."""
    numbers = [float(value) for value in reports.values()]
    conn.execute(_SET_REPORTS, {"trial": trial_id, "steps": list(reports), "reported": numbers})


def read_trials(
    conn: Connection,
    study_id: int,
    newer_than: int = -1,
    also_ids: Iterable[int] = (),
    states: Iterable[TrialState] | None = None,
) -> list[FrozenTrial]:
    """The study's trials with an id above `newer_than` or among `also_ids`, by id, in at most six statements."""
    rows = conn.execute(
        _TRIALS_OF_STUDY,
        {
            "study": study_id,
            "newer": newer_than,
            "also": list(also_ids),
            "states": None if states is None else [state.name for state in states],
        },
    ).all()
    return _frozen(conn, rows)


def read_trials_by_id(conn: Connection, trial_ids: Iterable[int]) -> list[FrozenTrial]:
    """These trials, of whatever study, in order of id; those that do not exist are left out."""
    return _frozen(conn, conn.execute(_TRIALS_BY_ID, {"ids": list(trial_ids)}).all())


def _frozen(conn: Connection, rows: Sequence[sa.Row[Any]]) -> list[FrozenTrial]:
    if not rows:
        return []
    ids = {"ids": [row.trial_id for row in rows]}
    values = {row.trial_id: row.found for row in conn.execute(_VALUES, ids)}
    params = {trial: found for trial, *found in conn.execute(_PARAMS, ids)}
    reports = {trial: dict(zip(steps, found, strict=True)) for trial, steps, found in conn.execute(_REPORTS, ids)}
    system_attrs = _grouped(conn, _SYSTEM_ATTRIBUTES, ids)
    user_attrs = _grouped(conn, _USER_ATTRIBUTES, ids)
    trials = []
    for row in rows:
        names, internals, texts = params.get(row.trial_id, ((), (), ()))
        distributions = {name: _distribution(text) for name, text in zip(names, texts, strict=True)}
        trials.append(
            FrozenTrial(
                number=row.number,
                state=TrialState[row.state],
                value=None,
                values=values.get(row.trial_id),
                datetime_start=to_local(row.datetime_start),
                datetime_complete=to_local(row.datetime_complete),
                params={
                    name: distributions[name].to_external_repr(internal)
                    for name, internal in zip(names, internals, strict=True)
                },
                distributions=distributions,
                user_attrs=user_attrs.get(row.trial_id, {}),
                system_attrs=system_attrs.get(row.trial_id, {}),
                intermediate_values=reports.get(row.trial_id, {}),
                trial_id=row.trial_id,
            )
        )
    return trials


def _grouped(conn: Connection, statement: sa.TextClause, ids: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    grouped: dict[int, dict[str, Any]] = {}
    for trial, key, text in conn.execute(statement, ids):
        grouped.setdefault(trial, {})[key] = json.loads(text)
    return grouped


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """A study has a few distinct distributions and a row of each for every trial."""
    return json_to_distribution(text)


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


def to_local(moment: datetime | None) -> datetime | None:
    """As Optuna hands times out: local without saying so."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
