"""A whole study as a document, and the document as JSON, CSV and YAML.

`WRITERS` turn what `document` returns into text. A CSV cell of text that a spreadsheet would run as a formula is
written with an apostrophe before it; numbers are left alone. `best` holds the point of the best trial in the form that
`whetstone train` reads (params, settings, seed), and `best_point` writes it out as YAML.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import yaml

from hpo import answers, statements, studies, trials
from hpo.desk import Desk, Known
from hpo.document import in_order

FORMAT = 1
# All pages of an export are read from one state of the database.
ONE_STATE = sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
CHUNK = 500
_RISKY = ("=", "+", "-", "@", "\t", "\r")
_COLUMNS = (
    "trial",
    "state",
    "value",
    "origin",
    "attempts",
    "epoch",
    "seconds",
    "worker",
    "started_at",
    "ended_at",
    "reason",
)


def document(desk: Desk, study: int) -> dict[str, Any]:
    """Return the study, its best trial's point and all its trials with their attempts, as plain JSON values.

    Raises:
        NotFound: there is no such study.
    """
    with desk.transaction() as conn:
        conn.execute(ONE_STATE)
        known = desk.known(conn, study)
        view = studies.view_of(conn, known).model_dump(mode="json")
        view["spec"] = in_order(view["spec"])
        found = list(_trials(conn, known))
    best = view.pop("best")
    point = None
    if best is not None:
        point = {
            "study": known.spec.name,
            "trial": best["trial"],
            "value": best["value"],
            "params": best["params"],
            "settings": dict(known.spec.settings),
            "seed": known.trial_seed(best["trial"]),
        }
    return {"format": FORMAT, "study": view, "best": point, "trials": found}


def _trials(conn: sa.Connection, known: Known) -> Iterator[dict[str, Any]]:
    number = -1
    while True:
        place = {"study": known.study, "number": number, "limit": CHUNK}
        page = conn.execute(statements.trials_by_number(None), place).all()
        attempts = trials.attempts_of(conn, known.study, [(row.trial_id, row.number) for row in page])
        views = trials.views(conn, known, [row.trial_id for row in page])
        told = answers.of_trials(conn, [row.trial_id for row in page])
        for row, view in zip(page, views, strict=True):
            history = [attempt.model_dump(mode="json") for attempt in attempts[row.trial_id]]
            right = told[row.trial_id].model_dump() if row.trial_id in told else None
            more = {"seed": known.trial_seed(row.number), "answers": right, "history": history}
            yield view.model_dump(mode="json") | more
        if len(page) < CHUNK:
            return
        number = page[-1].number


def to_json(exported: Mapping[str, Any]) -> str:
    return json.dumps(exported, indent=2, allow_nan=False) + "\n"


def to_yaml(exported: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(exported), sort_keys=False, allow_unicode=True)


def to_csv(exported: Mapping[str, Any]) -> str:
    """Return one line a trial; a vector's components stand in columns of their own, ``eta[conv1]``."""
    columns = list(_columns(exported["study"]["spec"]["space"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([_cell(name) for name in (*_COLUMNS, *columns)])
    for trial in exported["trials"]:
        flat = dict(_flat(trial["params"]))
        writer.writerow([_cell(trial[name]) for name in _COLUMNS] + [_cell(flat.get(name)) for name in columns])
    return out.getvalue()


def best_point(exported: Mapping[str, Any]) -> str | None:
    """Return the best trial's point as YAML that `whetstone train` reads, or None where there is none yet."""
    best = exported["best"]
    if best is None:
        return None
    about = f"# study {best['study']}, trial {best['trial']}, value {best['value']}\n"
    point = {name: best[name] for name in ("params", "settings", "seed")}
    return about + yaml.safe_dump(point, sort_keys=False, allow_unicode=True)


WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {"json": to_json, "csv": to_csv, "yaml": to_yaml}


def _columns(space: list[dict[str, Any]]) -> Iterator[str]:
    for parameter in space:
        labels = parameter.get("labels")
        if labels:
            yield from (f"{parameter['name']}[{label}]" for label in labels)
        else:
            yield parameter["name"]


def _flat(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}[{label}]", component) for label, component in value.items())
        else:
            yield name, value


def _cell(value: object) -> str:
    """Return a cell; text that would be a formula is quoted, a number never is."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("\x00", "")
    return f"'{text}" if text.startswith(_RISKY) else text
