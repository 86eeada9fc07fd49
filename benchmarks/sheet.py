"""One run of the coordinator's benchmark: how much of everything, what is wanted, where it happens, what came out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.fleet import Heard, Pace
from benchmarks.measure import Figure, Results, say
from benchmarks.place import Place


@dataclass(frozen=True)
class Scale:
    """How much of everything is measured."""

    behind: int = 1_000
    few: int = 100
    many: int = 10_000
    reports: int = 50
    asks: int = 60
    running: tuple[int, int] = (16, 200)
    counted: int = 12
    http_turns: int = 3
    http_s: float = 8.0
    clients: int = 16
    paced_s: float = 60.0
    held: int = 200
    tells: int = 30
    reads: int = 40
    starts: int = 3
    workers: int = 1_000
    fleet_s: float = 300.0
    pace: Pace = field(default_factory=Pace)
    bend: tuple[int, ...] = (1_500, 2_000, 3_000, 4_000, 6_000)
    bend_s: float = 60.0


FULL = Scale()
QUICK = Scale(
    behind=30, few=20, many=60, reports=5, asks=3, running=(2, 5), counted=1, http_turns=1, http_s=3.0, clients=2,
    paced_s=1.0, held=3, tells=2, reads=2, starts=1, workers=5, fleet_s=2.0, pace=Pace(1.0, 0.1, 0.5),
    bend=(8,), bend_s=1.0,
)  # fmt: skip
"""Only shows that everything runs."""


class Sheet:
    """What is wanted, where it is measured, and the results so far. `goals` has unit and goal of each figure."""

    def __init__(self, scale: Scale, wanted: Sequence[str], place: Place, goals: Mapping[str, tuple[str, str]]) -> None:
        self.scale, self.wanted, self.place, self.goals = scale, wanted, place, goals
        self.results = Results()

    def wants(self, *names: str) -> bool:
        return any(name in self.wanted for name in names)

    def add(self, name: str, value: float, note: str) -> None:
        """A figure of the table, if it is wanted."""
        if name in self.wanted:
            unit, goal = self.goals[name]
            self.results.figures.append(Figure(name, value, unit, goal, note))

    def also(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.results.also.append(Figure(name, value, unit, note=note))

    def heard(self, name: str, heard: Heard) -> str:
        """Keep what a load met; what went wrong, for a note."""
        self.results.details[name] = {
            "ms": {kind: [round(value, 2) for value in values] for kind, values in heard.ms.items()},
            "errors": dict(heard.errors.most_common(50)),
            "connections": heard.opened,
        }
        worst = heard.errors.most_common(1)
        return f"{heard.errors.total()} errors, mostly {worst[0][0]}" if worst else "no errors"

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Say what is being measured, and how long it took."""
        began = time.monotonic()
        say.print(f"{what} ...")
        yield
        say.print(f"  {time.monotonic() - began:.0f} s")
