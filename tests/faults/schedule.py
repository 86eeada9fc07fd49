"""Random schedules: what several clients do with several coordinators, and what goes wrong meanwhile, as plain data.

A schedule is a function of a seed and a number, so one that failed among a thousand runs again by itself. Its steps
name nothing that exists only at run time: who, where and which are dice, read against what is there when the step is
taken. So any step can be left out and the rest still means something, which is all that shrinking needs. Hypothesis is
not used for this: a schedule lives with threads, clocks and killed processes, and may fail once in three tries, where
hypothesis sees a flaky test and gives up, and its thousand schedules cannot be divided among processes or taken up at
the 413th.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

ACTS = {
    "claim": 18,
    "ask": 9,
    "crowd": 4,
    "report": 13,
    "tell": 15,
    "release": 6,
    "cancel": 5,
    "requeue": 4,
    "queue": 4,
    "record": 1,
    "steer": 6,
    "die": 3,
    "retry": 7,
    "repeat": 9,
    "late": 5,
    "stranger": 2,
    "reuse": 1,
    "wait": 6,
    "expire": 2,
}
"""What may be done, by weight. `crowd`: everybody asks at once. `late`: speak for a lease that is over.
`retry`: what got no answer, once more. `repeat`: what got one, once more. `stranger`: speak for somebody else's lease.
`reuse`: an old key with a new body."""

FAULTS = {"": 70, "lost": 12, "before": 5, "after": 6, "during": 3, "terminate": 3, "kill": 2}
"""What goes wrong with a call, by weight. `lost`: it is made, and its answer does not arrive. `kill`: its coordinator
is killed meanwhile, and a new one takes its place. The others are the proxy's."""

TWINS = {"": 82, "same": 7, "rival": 7, "other": 4}
"""What happens at the very same moment on another thread: the same call, another one about the same lease, or
anything."""


@dataclass(frozen=True)
class Step:
    """One thing that is done. `who`, `where` and `dice` are read against what is there."""

    act: str
    who: int
    where: int
    dice: int
    fault: str = ""
    nth: int = 0
    twin: str = ""

    def __str__(self) -> str:
        more = "".join(
            f" {word}" for word in (self.fault and f"{self.fault}:{self.nth}", self.twin and f"+{self.twin}") if word
        )
        return f"{self.act} by {self.who} at {self.where} ({self.dice}){more}"


@dataclass(frozen=True)
class StudyPlan:
    budget: int
    concurrency: int | None
    max_attempts: int
    points: int
    pruner: str


@dataclass(frozen=True)
class Schedule:
    """`processes`: the coordinators are processes of their own, to be killed by SIGKILL; otherwise objects of ours."""

    seed: int
    number: int
    coordinators: int
    processes: bool
    clients: int
    studies: tuple[StudyPlan, ...]
    steps: tuple[Step, ...]

    def without(self, first: int, last: int) -> Schedule:
        return replace(self, steps=self.steps[:first] + self.steps[last:])


def draw(seed: int, number: int, *, steps: int = 36, processes: float = 0.2) -> Schedule:
    """The schedule of this number. `processes`: how many of them have coordinators that are processes."""
    rng = random.Random(f"{seed}/{number}")
    separate = rng.random() < processes
    studies = tuple(
        StudyPlan(
            budget=rng.randint(2, 7),
            concurrency=rng.choice((None, None, 1, 2, 3)),
            max_attempts=rng.choice((1, 2, 2, 3)),
            points=rng.choice((0, 0, 1, 3)),
            pruner=rng.choice(("none", "none", "median")),
        )
        for _ in range(rng.choice((1, 1, 2)))
    )
    return Schedule(
        seed=seed,
        number=number,
        coordinators=rng.choice((2, 2, 3)),
        processes=separate,
        clients=rng.randint(3, 6),
        studies=studies,
        steps=tuple(_step(rng) for _ in range(rng.randint(steps // 2, steps * 3 // 2))),
    )


def _step(rng: random.Random) -> Step:
    fault = _weighted(rng, FAULTS)
    return Step(
        act=_weighted(rng, ACTS),
        who=rng.randrange(60),
        where=rng.randrange(60),
        dice=rng.randrange(2**31),
        fault=fault,
        nth=rng.choice((0, 0, 1, 1, 1, 1, 2, 2, 3, 5)) if fault else 0,
        twin=_weighted(rng, TWINS),
    )


def _weighted(rng: random.Random, choices: dict[str, int]) -> str:
    return rng.choices(list(choices), list(choices.values()))[0]


def chunks(length: int) -> Sequence[tuple[int, int]]:
    """Stretches of a schedule to leave out in turn when it is shrunk: halves first, single steps last."""
    found: list[tuple[int, int]] = []
    size = length // 2
    while size >= 1:
        found += [(first, min(first + size, length)) for first in range(0, length, size)]
        size //= 2
    return found
