"""How the command line speaks: tables for people, JSON for pipes, one clear line for an error.

Results go to stdout and everything else to stderr, so that a pipe sees only what was asked for.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

STATE_STYLE = {
    "running": "cyan",
    "leased": "cyan",
    "complete": "green",
    "finished": "green",
    "paused": "yellow",
    "queued": "yellow",
    "pruned": "blue",
    "infeasible": "magenta",
    "failed": "red",
    "stopped": "red",
    "cancelled": "bright_black",
}


def escape(text: str) -> str:
    """Text from anywhere as a terminal may have it: nothing in it is markup, and control characters are spelt out."""
    plain = "".join(
        f"\\x{ord(letter):02x}" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in text
    )
    return markup.escape(plain)


def print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # JSON itself escapes only the older half of the control characters.
    sys.stdout.write(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def say(message: str) -> None:
    """A line for the person at the terminal, on stderr."""
    err.print(escape(message), soft_wrap=True)


def state(name: str) -> str:
    return f"[{STATE_STYLE.get(name, 'default')}]{escape(name)}[/]"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def value_of(trial: Mapping[str, Any] | None, workload: str = "") -> str:
    """A trial's value: accuracies as per cent, other objectives as they are."""
    value = None if trial is None else trial.get("value")
    return percent(value) if workload == "siamese" else number(value, 6)


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    whole = round(value)
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{value:.1f}s" if value < 10 else f"{whole}s"


def table(title: str | None, columns: Iterable[str | tuple[str, str]], rows: Iterable[Iterable[str]]) -> Table:
    """A table; a column given as (name, "right") is right-aligned, one given as (name, "cut") gives way to the others
    where the terminal is narrow, its cells cut with an ellipsis. Cells may hold rich markup.
    """
    made = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    named = [(column, "left") if isinstance(column, str) else column for column in columns]
    for place, (name, kind) in enumerate(named, 1):
        last = place == len(named)  # where a terminal is narrow, the last column folds rather than one vanishes
        narrows = last or kind == "cut"
        made.add_column(name, justify="right" if kind == "right" else "left", no_wrap=not narrows, overflow="fold")
    for row in rows:
        made.add_row(*(_cut(cell) if kind == "cut" else cell for (_, kind), cell in zip(named, row, strict=True)))
    return made


def _cut(cell: str) -> Text:
    """A cell that stays on its line, however narrow its column is."""
    text = Text.from_markup(cell, overflow="ellipsis")
    text.no_wrap = True
    return text


def parameter_table(params: Mapping[str, Any], title: str | None = None) -> Table:
    """Hyperparameters by layer: a row for each label, a column for each vector; scalars stand under "all"."""
    vectors = {name: value for name, value in params.items() if isinstance(value, dict)}
    scalars = {name: value for name, value in params.items() if not isinstance(value, dict)}
    labels = list(dict.fromkeys(label for value in vectors.values() for label in value))
    columns: list[str | tuple[str, str]] = ["", *((escape(name), "right") for name in (*vectors, *scalars))]
    rows = [
        [escape(label), *(show(value.get(label)) for value in vectors.values()), *("" for _ in scalars)]
        for label in labels
    ]
    if scalars:
        rows.append(["all", *("" for _ in vectors), *(show(value) for value in scalars.values())])
    return table(title, columns, rows)


def show(value: Any) -> str:
    """One hyperparameter, short: three significant digits for floats, everything else as it is."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return escape(str(value))
    short = f"{value:.3g}"
    return short if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")
