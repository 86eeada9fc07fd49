"""How numbers, times and states are written for people. Every template filter stands here.

Nothing here makes markup but `ago`, which escapes what it is given; a value that is missing reads "–", never "None".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from hpo.views import BudgetView, StudyView

MISSING = "–"

STATES = {
    "queued": "queued",
    "leased": "running",
    "complete": "complete",
    "infeasible": "infeasible",
    "pruned": "pruned",
    "failed": "failed",
    "cancelled": "cancelled",
    "released": "released",
    "stalled": "stalled",
    "lost": "lost",
    "running": "running",
    "paused": "paused",
    "stopped": "stopped",
    "finished": "finished",
    "idle": "idle",
    "busy": "busy",
    "draining": "draining",
    "silent": "silent",
}
"""The word for each state of a study, a trial, an attempt or a worker (a leased trial "runs" for people)."""

MEANINGS = {
    "queued": "waits for a worker",
    "leased": "a worker trains it",
    "complete": "has its value",
    "infeasible": "diverged, collapsed or out of memory; it counts as chance, and the sampler learns from it",
    "pruned": "stopped early by the pruner",
    "failed": "an exception, or its workers died too often",
    "cancelled": "cancelled by a person",
    "released": "handed back by its worker; the next one resumes it",
    "stalled": "made no step for too long; counts as a death of the worker",
    "lost": "its worker went silent; the next one resumes it",
    "running": "workers take its trials",
    "paused": "no new trials start; running ones finish",
    "stopped": "stopped by a person; no trials start",
    "finished": "its budget is used up",
    "idle": "asks for work",
    "busy": "trains a trial",
    "draining": "finishes its trial and gets no other",
    "silent": "has not been heard of lately",
}


def number(value: Any) -> str:
    """A number with three or four significant digits: 3.2e-2 below a tenth, 0.712, 12.5, 128; words as they are."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 0.1 <= abs(value) < 100_000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as 71.3%."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def points(difference: float) -> str:
    """A difference of two shares in points: +1.9, −0.4."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def objective(value: float | None, study: StudyView) -> str:
    """A trial's value: an accuracy in percent where the workload is the Siamese network, a plain number elsewhere."""
    return percent(value) if is_accuracy(study) else number(value)


def is_accuracy(study: StudyView) -> bool:
    return study.workload == "siamese"


def objective_name(study: StudyView) -> str:
    return "accuracy" if is_accuracy(study) else "value"


def chance(study: StudyView) -> float | None:
    """The accuracy of guessing, 1 / way, where the workload is the Siamese network; None elsewhere."""
    way = study.spec.get("settings", {}).get("way", 20)
    if not is_accuracy(study) or isinstance(way, bool) or not isinstance(way, int) or way < 1:
        return None
    return 1 / way


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 0.4 s, 42 s, 3 min 5 s, 2 h 14 min, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for big, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        limit = {"min": 3600, "h": 86400, "d": math.inf}[big]
        if whole < limit:
            rest = whole % size // part
            return f"{whole // size} {big} {rest} {small}" if rest else f"{whole // size} {big}"
    raise AssertionError("unreachable")


def exact(moment: datetime | None) -> str:
    """A moment in UTC to the second."""
    return MISSING if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(moment: datetime | None, now: datetime | None = None) -> Markup:
    """A relative time ("3 min ago") whose exact moment stands in its title."""
    if moment is None:
        return Markup('<span class="faint">{}</span>').format(MISSING)
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 5:
        words = "just now"
    elif seconds < 60:
        words = f"{int(seconds)} s ago"
    elif seconds < 3600:
        words = f"{int(seconds // 60)} min ago"
    elif seconds < 2 * 86400:
        words = f"{int(seconds // 3600)} h ago"
    elif seconds < 60 * 86400:
        words = f"{int(seconds // 86400)} days ago"
    else:
        words = f"{moment.astimezone(UTC):%Y-%m-%d}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.astimezone(UTC).isoformat(timespec="seconds"), exact(moment), words
    )


def size(count: int | None) -> str:
    """Bytes in binary units: 12 B, 1.3 MiB, 15 GiB."""
    if count is None:
        return MISSING
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def capitalize_first(text: str) -> str:
    """A sentence's beginning, with the rest as it is ("Lake's runs", "API" keep their capitals)."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def finished(study: StudyView) -> int:
    """Trials of its own that came to an end by themselves: cancelled ones were taken back, seeding ones given."""
    ended = sum(study.counts.get(state, 0) for state in ("complete", "infeasible", "pruned", "failed"))
    return ended - sum(seed.trials for seed in study.seeded if seed.exact)


def budget_lines(budget: BudgetView, study: StudyView) -> list[dict[str, Any]]:
    """Each limit of a study with what is used of it: label, used and limit as text, share in [0, 1]."""
    lines: list[dict[str, Any]] = []
    if budget.trials is not None:
        lines.append(
            {
                "label": "Trials",
                "used": f"{budget.trials_used:,}",
                "limit": f"{budget.trials:,}",
                "share": _share(budget.trials_used, budget.trials),
            }
        )
    if budget.hours is not None:
        lines.append(
            {
                "label": "Worker time",
                "used": duration(3600 * budget.hours_used),
                "limit": duration(3600 * budget.hours),
                "share": _share(budget.hours_used, budget.hours),
            }
        )
    if budget.target is not None:
        best = study.best.value if study.best else None
        reached = best is not None and (
            best >= budget.target if study.direction == "maximize" else best <= budget.target
        )
        lines.append(
            {
                "label": "Target",
                "used": objective(best, study),
                "limit": objective(budget.target, study),
                "share": 1.0 if reached else None,
            }
        )
    return lines


def _share(used: float, limit: float) -> float:
    return min(1.0, used / limit) if limit > 0 else 1.0


def is_vector(value: Any) -> bool:
    return isinstance(value, Mapping)


def spread(point: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A point in a few words, for one row of a table: a vector as its lowest and highest component."""
    rows: list[tuple[str, str]] = []
    for name, value in point.items():
        if not is_vector(value):
            rows.append((name, number(value)))
            continue
        parts = list(value.values())
        numbers = [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
        if parts and len(numbers) == len(parts):
            low, high = number(min(numbers)), number(max(numbers))
            rows.append((name, low if low == high else f"{low} … {high}"))
        else:
            rows.append((name, ", ".join(dict.fromkeys(number(part) for part in parts))))
    return rows


def by_layer(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as a table: `labels` are its rows, `vectors` its columns, `scalars` what has no layer."""
    vectors = {name: value for name, value in point.items() if is_vector(value)}
    labels = list(dict.fromkeys(label for value in vectors.values() for label in value))
    return {
        "labels": labels,
        "vectors": vectors,
        "scalars": {name: value for name, value in point.items() if not is_vector(value)},
    }
