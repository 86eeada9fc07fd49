"""Each use of test data, recorded beside the checkpoint it scored: what is looked at often is no test any more.

A line of test-uses.jsonl: {"at", "what", "command", "accuracy", "tasks"}. Promise: whoever sees a test figure of a
checkpoint through a command has left a line; a score that failed half way has one too, without an accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

NAME = "test-uses.jsonl"


class Use:
    """A use under way: `score` it with what was found, once."""

    def __init__(self, earlier: int) -> None:
        self.count = earlier + 1
        self.accuracy: float | None = None
        self.tasks = 0

    def score(self, accuracy: float, tasks: int) -> None:
        self.accuracy, self.tasks = accuracy, tasks


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def told(count: int, whom: str = "this checkpoint") -> str:
    """The line to print with the figure."""
    return f"Test data used {times(count)} with {whom} (recorded in {NAME} beside it)."


def folder_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint that is named by it or by one of its files."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def count(checkpoint: Path) -> int:
    """How often test data was used with this checkpoint, in so far as it was recorded here."""
    path = folder_of(checkpoint) / NAME
    return sum(1 for line in path.read_text().splitlines() if line.strip()) if path.exists() else 0


@contextmanager
def recorded(checkpoint: Path, what: str, command: str) -> Iterator[Use]:
    """Record a use of test data. Raises OSError, before anything is looked at, where no line can be written."""
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "command": command}
    use = Use(count(checkpoint))
    with (folder_of(checkpoint) / NAME).open("a") as file:
        try:
            yield use
        finally:
            file.write(json.dumps(line | {"accuracy": use.accuracy, "tasks": use.tasks}) + "\n")
