"""Many schedules at once, each on a database of its own, and the smallest schedule that still fails.

Most of a schedule's time is waiting for leases to run out, so a few of them share a processor well.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo import database
from tests.faults.schedule import Schedule, chunks
from tests.faults.schedule_play import Broken, play
from tests.integration.leases_harness import deadlocks


@dataclass
class Tally:
    """What came of some schedules. `excused`: late expiries for which the machine had no time."""

    played: int = 0
    excused: int = 0
    broken: list[Broken] = field(default_factory=list)
    smallest: list[Schedule] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.played += other.played
        self.excused += other.excused
        self.broken += other.broken
        self.smallest += other.smallest


def play_all(
    schedules: Sequence[Schedule],
    urls: Sequence[str],
    folder: Path,
    *,
    term_s: float,
    until_broken: int = 1,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Play the schedules, as many at a time as there are databases; stop after `until_broken` broken ones."""
    waiting: queue.SimpleQueue[Schedule] = queue.SimpleQueue()
    for schedule in schedules:
        waiting.put(schedule)
    tally, guard = Tally(), threading.Lock()

    def work(url: str) -> None:
        while len(tally.broken) < until_broken:
            try:
                schedule = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                excused, broken = play(schedule, url, folder, term_s=term_s), None
            except Broken as error:
                excused, broken = 0, error
            with guard:
                tally.played += 1
                tally.excused += excused
                if broken is not None:
                    tally.broken.append(broken)
                    tally.smallest.append(schedule)
                progress(tally)

    threads = [threading.Thread(target=work, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for url in urls:
        engine = database.connect(url)
        if deadlocks(engine):
            tally.broken.append(Broken(f"PostgreSQL broke {deadlocks(engine)} deadlocks"))
        engine.dispose()
    return tally


def shrink(schedule: Schedule, url: str, folder: Path, *, term_s: float, tries: int = 60) -> tuple[Schedule, Broken]:
    """Leave out steps for as long as the rest still breaks a promise (a step is kept if two tries without it pass).

    Raises:
        ValueError: it did not break one again.
    """
    broken = _breaks(schedule, url, folder, term_s)
    if broken is None:
        raise ValueError("the schedule passes when it is played again")
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for first, last in chunks(len(schedule.steps)):
            tries -= 1
            found = _breaks(schedule.without(first, last), url, folder, term_s)
            if found is not None:
                schedule, broken, smaller = schedule.without(first, last), found, True
                break
            if tries <= 0:
                break
    return schedule, broken


def _breaks(schedule: Schedule, url: str, folder: Path, term_s: float) -> Broken | None:
    for _ in range(2):
        try:
            play(schedule, url, folder, term_s=term_s)
        except Broken as broken:
            return broken
    return None
