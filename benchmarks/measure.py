"""What every benchmark shares: figures with goals, the machine they were measured on, the table and the file.

Promise: the file is {"figures": [{"name", "value", "unit", "goal"}], ...}; beside the figures stand the machine's
facts, what else was measured, and what was left out, with the reason. A goal is a comparison as text, ">= 2.5"; a
figure without one is for information.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

say = Console(stderr=True, highlight=False)
"""Where progress is told; stdout has the table alone."""


@dataclass(frozen=True)
class Figure:
    """One measured number; `note` says in a few words what it rests on."""

    name: str
    value: float
    unit: str
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if not self.goal:
            return None
        relation, bound = self.goal.split()
        return self.value >= float(bound) if relation == ">=" else self.value <= float(bound)


@dataclass
class Results:
    """What a run has found so far."""

    figures: list[Figure] = field(default_factory=list)
    also: list[Figure] = field(default_factory=list)
    """Figures without goals: what the others are made of."""
    skipped: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Every single measurement, for whoever doubts a median."""


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The lowest and the highest of some measurements, as people read them."""
    return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"


def machine() -> dict[str, Any]:
    """The facts without which a number of seconds says nothing."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def write(path: Path, results: Results, **facts: Any) -> None:
    """The results as JSON."""
    document = {
        "figures": [{"name": f.name, "value": f.value, "unit": f.unit, "goal": f.goal} for f in results.figures],
        "notes": {f.name: f.note for f in results.figures if f.note},
        "skipped": results.skipped,
        "also": [{"name": f.name, "value": f.value, "unit": f.unit} for f in results.also],
        **facts,
        "details": results.details,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def show(results: Results, facts: Mapping[str, Any]) -> None:
    """The table on stdout: each figure with its goal and whether it is met."""
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    table.add_column("met", no_wrap=True)
    table.add_column("measured")
    for figure in results.figures:
        met = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[figure.met]
        table.add_row(figure.name, _number(figure), figure.goal, met, escape(figure.note))
    for name, why in results.skipped.items():
        table.add_row(name, "", "", "[yellow]left out[/]", escape(why))
    for figure in results.also:
        table.add_row(f"[dim]{figure.name}[/]", _number(figure), "", "", escape(figure.note))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)
    console.print(table)


def _number(figure: Figure) -> str:
    digits = 0 if abs(figure.value) >= 1000 else 1 if abs(figure.value) >= 100 else 2
    return f"{figure.value:,.{digits}f} {figure.unit}".rstrip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.partition(":")[::2] for line in lines if ":" in line)
    by_name = {name.strip(): value.strip() for name, value in fields.items()}
    model = by_name.get("model name", platform.machine())
    units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in by_name.get("flags", "").split()]
    return f"{model} ({', '.join(units) or 'no bf16'})"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
