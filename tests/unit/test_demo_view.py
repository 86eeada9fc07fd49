"""What the demo shows while it runs fits a terminal of 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cli import demo_view

STUDY: dict[str, Any] = {
    "counts": {"complete": 9, "infeasible": 0, "pruned": 10, "failed": 0},
    "budget": {"trials": 20},
    "best": {"trial": 1, "value": 0.635, "state": "complete"},
}


@pytest.mark.parametrize(
    ("left", "words"), [(None, "5m 14s, ..."), (0.2, "5m 14s, nearly done"), (674.0, "5m 14s, about 11m 14s left")]
)
def test_progress_is_one_line_in_a_terminal_of_80_columns(left: float | None, words: str) -> None:
    shown = io.StringIO()
    running = [{"trial": 18, "epoch": None, "worker": "demo-2"}, {"trial": 7, "epoch": 6, "worker": "demo-1"}]
    Console(file=shown, width=80).print(demo_view.progress(STUDY, running, 314.0, left))
    head, first, second = shown.getvalue().strip().splitlines()
    assert head.rstrip().endswith(f"19 of 20 trials  best 63.5%  {words}")
    assert [line.split() for line in (first, second)] == [
        ["trial", "7", "running", "epoch", "6", "demo-1"],
        ["trial", "18", "running", "starting", "demo-2"],
    ]
