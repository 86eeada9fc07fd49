"""Trials as Whetlab's clients know them: results, each with a variable for every setting, the outcome among them.

A result's id is its trial's, a variable's is made of it and of the setting's place, so nothing is stored for them.
What is shown follows from the trial's state: pending ones have no outcome, infeasible and failed ones "NaN", pruned
ones their last report, and cancelled ones, or those whose worker has been asked to stop, are not shown at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo import statements, trials
from hpo.desk import Known
from hpo.errors import Fault, NotFound
from hpo.experiments import PLACES, Experiment, Setting
from hpo.protocol import Value
from hpo.space import Flat, show

DESCRIPTION = "whetstone:description"

# ruff: noqa: S608 -- the statements are put together of constants of this module and its neighbour; values are bound
_SHOWN = f"""
    NOT (t.state = 'FAIL' AND {statements.CANCELLED})
    AND NOT (t.state = 'RUNNING' AND EXISTS (
        SELECT 1 FROM whetstone.attempts a
        WHERE a.trial_id = t.trial_id AND a.state = 'leased' AND a.stop_requested <> ''))
"""
COUNT = sa.text(f"SELECT count(*) FROM public.trials t WHERE t.study_id = :study AND {_SHOWN}")

_ROWS = f"""
    SELECT t.trial_id, t.study_id, {statements.STATE} AS state, v.value, p.names, p.internals, m.keys, m.marks,
           CASE t.state WHEN 'PRUNED' THEN (
               SELECT i.intermediate_value FROM public.trial_intermediate_values i
               WHERE i.trial_id = t.trial_id AND i.intermediate_value_type = 'FINITE' ORDER BY i.step DESC LIMIT 1
           ) END AS last_report
    FROM page JOIN public.trials t ON t.trial_id = page.trial_id
    LEFT JOIN public.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
    LEFT JOIN LATERAL (
        SELECT array_agg(param_name) AS names, array_agg(param_value) AS internals
        FROM public.trial_params WHERE trial_id = t.trial_id
    ) p ON TRUE
    LEFT JOIN LATERAL (
        SELECT array_agg(key) AS keys, array_agg(value_json) AS marks FROM public.trial_system_attributes
        WHERE trial_id = t.trial_id AND (key LIKE 'whetstone:%' OR key = 'fixed_params')
    ) m ON TRUE
    ORDER BY t.trial_id
"""

# One page of a study's results, the oldest first.
PAGE = sa.text(f"""
    WITH page AS (
        SELECT t.trial_id FROM public.trials t WHERE t.study_id = :study AND {_SHOWN}
        ORDER BY t.trial_id LIMIT :limit OFFSET :offset
    ) {_ROWS}
""")

# One result, of whichever of our studies it is.
ONE = sa.text(f"""
    WITH page AS (
        SELECT t.trial_id FROM public.trials t JOIN whetstone.studies s ON s.study_id = t.study_id
        WHERE t.trial_id = :result AND {_SHOWN}
    ) {_ROWS}
""")

_NUMBER = re.compile(r"\s*[+-]?(nan|inf|infinity|(\d+\.?\d*|\.\d+)(e[+-]?\d{1,5})?)\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Sent:
    """What a client wrote into a result: components of its point, and its outcome.

    Attributes:
        outcome: None where nothing was said of it, NaN where the point is infeasible.
        named: the settings that stood there.
    """

    flat: Flat
    outcome: float | None
    named: tuple[Setting, ...]


def count(conn: sa.Connection, study: int) -> int:
    found: int = conn.execute(COUNT, {"study": study}).scalar_one()
    return found


def listing(
    conn: sa.Connection, known: Known, experiment: Experiment, *, offset: int, limit: int
) -> list[dict[str, Any]]:
    """Some results of an experiment, the oldest first."""
    rows = conn.execute(PAGE, {"study": known.study, "offset": offset, "limit": limit})
    return [view(row, known, experiment) for row in rows]


def find(conn: sa.Connection, result: int) -> Any:
    """The row of one result. Raises `NotFound` where there is none, or none any more."""
    row = conn.execute(ONE, {"result": result}).one_or_none()
    if row is None:
        raise NotFound(f"there is no result {result}")
    return row


def view(row: Any, known: Known, experiment: Experiment) -> dict[str, Any]:
    """A result as its five keys. A point that is queued half-made has no variables yet."""
    marks = trials.marks_of(row)
    values = shown(row, known, experiment)
    variables = []
    if values is not None:
        place = row.trial_id * PLACES
        variables = [
            {"id": place + number, "setting": setting.id, "result": row.trial_id, "name": setting.name, "value": value}
            for number, (setting, value) in enumerate(
                zip(experiment.settings, [*values, outcome_of(row, experiment)], strict=True)
            )
        ]
    return {
        "id": row.trial_id,
        "experiment": row.study_id,
        "userProposed": marks.get("whetstone:origin", "queued" if "fixed_params" in marks else "suggested")
        != "suggested",
        "description": str(marks.get(DESCRIPTION, "")),
        "variables": variables,
    }


def shown(row: Any, known: Known, experiment: Experiment) -> list[Any] | None:
    """The values of all settings but the outcome, or None where some are not there."""
    flat = trials.flat_params(known, row)
    values = [setting.show(flat) for setting in experiment.settings[:-1]]
    whole = all(name in flat for name in experiment.space.names)
    return values if whole and all(value is not None for value in values) else None


def outcome_of(row: Any, experiment: Experiment) -> float | str | None:
    """The outcome as it is shown: maximised, None while it is pending, "NaN" where there will be none."""
    if row.state in ("queued", "leased"):
        return None
    value = {"complete": row.value, "pruned": row.last_report if row.value is None else row.value}.get(row.state)
    if value is None or not math.isfinite(value):
        return "NaN"
    return float(experiment.sign * value) + 0.0  # a minimised 0 is 0, not -0


def read(experiment: Experiment, body: Mapping[str, Any], faults: list[Fault]) -> Sent:
    """Read a result's variables. What is wrong with them is added to `faults`; what is not there is left out."""
    given = body.get("variables", [])
    if not isinstance(given, list):
        faults.append(Fault("variables", f"must be a list, not {show(given)}"))
        given = []
    flat: Flat = {}
    outcome: float | None = None
    named: list[Setting] = []
    for place, entry in enumerate(given):
        at = f"variables[{place}]"
        setting = _setting(experiment, entry, at, faults)
        if setting is None:
            continue
        if setting in named:
            faults.append(Fault(at, f"names {show(setting.name)} twice"))
            continue
        named.append(setting)
        try:
            if setting.parameter is None:
                outcome = read_outcome(entry.get("value"))
            else:
                flat |= setting.read(entry.get("value"))
        except ValueError as error:
            faults.append(Fault(f"{at}.value", str(error)))
    return Sent(flat, outcome, tuple(named))


def _setting(experiment: Experiment, entry: object, at: str, faults: list[Fault]) -> Setting | None:
    """The setting that a variable is of: by its name, by its id, or both, which must then agree."""
    if not isinstance(entry, Mapping):
        faults.append(Fault(at, f"must be an object, not {show(entry)}"))
        return None
    name, place = entry.get("name"), entry.get("setting")
    by_name = experiment.by_name.get(name) if isinstance(name, str) else None
    whole = isinstance(place, int | float) and not isinstance(place, bool) and math.isfinite(place)
    by_id = experiment.by_id.get(int(place)) if whole else None  # type: ignore[arg-type]
    if (name is not None and by_name is None) or (by_name is None and by_id is None):
        known = ", ".join(show(setting.name) for setting in experiment.settings[:8])
        faults.append(Fault(at, f"is of no setting of this experiment; it has {known}"))
        return None
    if by_name is not None and by_id is not None and by_name is not by_id:
        faults.append(Fault(at, f"has the name of one setting ({show(name)}) and the id of another ({by_id.id})"))
        return None
    return by_name or by_id


def read_outcome(value: object) -> float | None:
    """An outcome: a number, or its text; NaN for everything that is not finite; None for none yet.

    Raises:
        ValueError: it is something else; the message is safe to show.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value[:400]):
        raise ValueError(f"must be a number, or NaN where the point is infeasible, not {show(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, or NaN where the point is infeasible, not {show(value)}")
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def differ(experiment: Experiment, stored: Sequence[Any], sent: Sent) -> list[str]:
    """The settings to which a client gives other values than a result has. Lua's 14 digits are no difference."""
    flat: dict[str, Value] = {}
    for setting, value in zip(experiment.settings, stored, strict=False):
        flat |= setting.read(value)
    names = []
    for setting in sent.named:
        if setting.parameter is not None and any(
            not _alike(sent.flat[name], flat[name]) for name in setting.parameter.flat_names if name in sent.flat
        ):
            names.append(setting.name)
    return names


def _alike(first: Value, second: Value) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-9)
    return first == second
