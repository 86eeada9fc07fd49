"""Studies with a past: thousands of finished trials with their reports, written by SQL in seconds.

The space is that of presets/koch2015.yaml, 18 dimensions. Promise: the rows are those that a study would have which
had run: stock Optuna reads them, and so does the coordinator (its attempts, metrics and counters are there too).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from optuna.distributions import BaseDistribution, distribution_to_json

from hpo import spec
from hpo.coordinator import Coordinator

_PRESET = Path(__file__).parents[1] / "presets" / "koch2015.yaml"
INFEASIBLE = 10
"""One in so many of a study's past trials diverged, where there are any."""

# Trials that ended one a second, the last one a second ago. Row i of a study is its trial i.
_TRIALS = """
    INSERT INTO public.trials (study_id, number, state, datetime_start, datetime_complete)
    SELECT %(study)s, i, 'COMPLETE', n.now - make_interval(secs => 60 + %(trials)s - i),
           n.now - make_interval(secs => %(trials)s - i)
    FROM generate_series(0, %(trials)s - 1) AS i, (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now) AS n
    ORDER BY i
"""

# A uniform draw from each parameter's range, in its own scale.
_PARAMS = """
    INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT t.trial_id, p.name,
           CASE WHEN p.log THEN exp(ln(p.low) + random() * (ln(p.high) - ln(p.low)))
                ELSE p.low + random() * (p.high - p.low) END,
           p.text
    FROM public.trials t,
         unnest(%(names)s::text[], %(lows)s::float8[], %(highs)s::float8[], %(logs)s::boolean[], %(texts)s::text[])
             WITH ORDINALITY AS p (name, low, high, log, text, place)
    WHERE t.study_id = %(study)s ORDER BY t.trial_id, p.place
"""

_VALUES = """
    INSERT INTO public.trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0,
           CASE WHEN number %% %(infeasible)s = %(infeasible)s - 1 THEN 0.05 ELSE 0.5 + 0.4 * random() END, 'FINITE'
    FROM public.trials WHERE study_id = %(study)s ORDER BY trial_id
"""

_REPORTS = """
    INSERT INTO public.trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT t.trial_id, step, 0.9 - 0.8 / (step + 2) + 0.05 * random(), 'FINITE'
    FROM public.trials t, generate_series(0, %(reports)s - 1) AS step
    WHERE t.study_id = %(study)s ORDER BY t.trial_id, step
"""

_MARKS = """
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT t.trial_id, m.key, m.text
    FROM public.trials t
    CROSS JOIN LATERAL (VALUES
        ('whetstone:origin', '"suggested"'),
        ('constraints:infeasible', CASE WHEN t.number %% %(infeasible)s = %(infeasible)s - 1 THEN '1.0' ELSE '0.0' END)
    ) AS m (key, text)
    WHERE t.study_id = %(study)s ORDER BY t.trial_id
"""

_REPORTED = sa.text("""
    INSERT INTO public.trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    VALUES (:trial, :step, :value, 'FINITE')
""")

# What the coordinator has beside Optuna's rows: an attempt for each trial, its metrics, the study's counters.
_ATTEMPTS = """
    INSERT INTO whetstone.attempts (study_id, trial_id, trial_number, attempt, token, bearer, state, leased_at,
                                    renewed_at, expires_at, ended_at, last_epoch, told)
    SELECT t.study_id, t.trial_id, t.number, 1, nextval('whetstone.fencing'), 'token:0',
           CASE WHEN t.number %% %(infeasible)s = %(infeasible)s - 1 THEN 'infeasible' ELSE 'complete' END,
           t.datetime_start AT TIME ZONE 'UTC', e.ended, e.ended, e.ended, nullif(%(reports)s - 1, -1), '{}'
    FROM public.trials t CROSS JOIN LATERAL (SELECT t.datetime_complete AT TIME ZONE 'UTC' AS ended) AS e
    WHERE t.study_id = %(study)s ORDER BY t.trial_id
"""
_METRICS = """
    INSERT INTO whetstone.metrics (attempt_id, epoch, value, metrics)
    SELECT a.attempt_id, v.step, v.intermediate_value, '{"loss": 0.25, "seconds": 1.9}'
    FROM whetstone.attempts a JOIN public.trial_intermediate_values v USING (trial_id)
    WHERE a.study_id = %(study)s ORDER BY a.attempt_id, v.step
"""
_COUNTERS = (
    "UPDATE whetstone.studies SET trials_used = %(trials)s, seconds_used = 60.0 * %(trials)s WHERE study_id = %(study)s"
)


def document(name: str, sampler: str, *, pruner: str = "none", workload: str = "external") -> dict[str, Any]:
    """A study's document: the paper's space, and the network's settings where a worker is to claim its trials."""
    preset = _preset()
    made = {"name": name, "workload": workload, "space": preset["space"], "sampler": sampler, "pruner": pruner}
    if workload != "external":
        made["settings"] = preset["settings"]
    return made | {"direction": "maximize", "seed": 1}


@cache
def _preset() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_PRESET.read_text())
    return loaded


@cache
def space() -> dict[str, BaseDistribution]:
    """The 18 distributions by their flat names, for those who ask stock Optuna."""
    return dict(spec.parse(document("space", "random"), {}).space.distributions)


def reported(engine: sa.Engine, trial: int, reports: int) -> None:
    """Give a running trial of stock Optuna's reports. (One at a time would take it minutes.)"""
    values = [{"trial": trial, "step": step, "value": 0.5 + step / 1e4} for step in range(reports)]
    with engine.begin() as connection:
        connection.execute(_REPORTED, values)


def launch(coordinator: Coordinator, name: str, sampler: str, **options: str) -> int:
    """A new study of the coordinator's; its number."""
    return coordinator.create_study(document(name, sampler, **options)).study


def fill(engine: sa.Engine, study: int, trials: int, *, reports: int = 0, infeasible: bool = False, ours: bool) -> None:
    """Give an empty study finished trials with so many reports each; `ours` adds what the coordinator keeps."""
    distributions = space()
    values = {
        "study": study,
        "trials": trials,
        "reports": reports,
        "infeasible": INFEASIBLE if infeasible else trials + 1,
        "names": list(distributions),
        "lows": [each.low for each in distributions.values()],  # type: ignore[attr-defined]
        "highs": [each.high for each in distributions.values()],  # type: ignore[attr-defined]
        "logs": [each.log for each in distributions.values()],  # type: ignore[attr-defined]
        "texts": [distribution_to_json(each) for each in distributions.values()],
    }
    steps = [_TRIALS, _PARAMS, _VALUES, _REPORTS]
    if ours:
        steps += [_MARKS, _ATTEMPTS, _METRICS, _COUNTERS]
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT setseed(0.5)")
        for step in steps:
            connection.exec_driver_sql(step, values)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE)")  # as autovacuum would have, long before
