"""What a process remembers of a study's trials in order to judge one of them: values by step, rungs, and no more.

A judgement is one call of `whetstone.judging`, which brings what the judged trial has reported and what has ended since
the last one. Invariant: what is remembered of an ended trial is what is stored, since it never changes; where a
revision says that it did, everything is forgotten and read anew. What running trials have reached is read each time.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from hpo import database
from hpo.errors import NotFound
from hpo.snapshot import CANCELLED

RESOURCE = "whetstone:pruner_resource"
"""The study attribute that keeps what "auto" was resolved to, so that rungs and brackets stay where they are."""
RUNG = "completed_rung_"
"""Begins the attributes in which Optuna's successive halving keeps the value that a trial had at each rung."""

JUDGING = """
    SELECT whetstone.judging(%(study)s, %(trial)s, %(step)s, %(newest)s, %(open)s::integer[], %(revision)s,
                             %(behind)s::integer[], %(rungs)s, %(longest)s)
"""

Rung = tuple[int, float]
"""The number of a trial, and its value at a rung."""


@dataclass(frozen=True)
class Rivals:
    """A trial's own reports, and what the others have shown.

    Attributes:
        study_name: Optuna's.
        reports: the judged trial's, by step.
        reached: its values at the rungs it has reached, by rung.
        complete: how many trials are complete and feasible.
        at_step: the values of those at the judged trial's last step.
        longest: the last step of the longest of those.
        resource: what "auto" stands for, if that was settled.
        rungs: by rung the values of other trials that were not cancelled.
    """

    study_name: str
    reports: Mapping[int, float]
    reached: Mapping[int, float] = field(default_factory=dict)
    complete: int = 0
    at_step: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    longest: int | None = None
    resource: int | None = None
    rungs: Mapping[int, Iterable[Rung]] = field(default_factory=dict)


@dataclass
class _Step:
    """Values of complete, feasible trials at one step: of the first `covered` of those that are known."""

    covered: int = 0
    values: array[float] = field(default_factory=lambda: array("d"))


@dataclass
class _Memory:
    """All that is known of trials that have ended."""

    newest: int = -1
    open: set[int] = field(default_factory=set)
    revision: int = 0
    ended: set[int] = field(default_factory=set)
    complete: list[int] = field(default_factory=list)  # and feasible, in the order in which they became known
    steps: dict[int, _Step] = field(default_factory=dict)
    rungs: dict[int, list[Rung]] = field(default_factory=dict)
    longest: int | None = None


class Pruning:
    """One study's memory for its pruner. Safe to share between threads; no lock is held while PostgreSQL is asked."""

    def __init__(self, engine: Engine, study_id: int) -> None:
        self.engine = engine
        self.study_id = study_id
        self._lock = threading.Lock()
        self._memory = _Memory()

    def look(self, trial_id: int, reports: Mapping[int, float], *, rungs: bool, longest: bool) -> Rivals:
        """Learn what there is to know about a trial and its rivals, in one round trip.

        Args:
            trial_id: the judged trial.
            reports: its new reports, at least one; they are added to those that are stored.
            rungs: whether rungs are wanted, instead of values at the trial's last step.
            longest: whether the length of the longest trial is wanted.

        Raises:
            NotFound: the study is gone.
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        step = max(reports)
        while True:
            with self._lock:
                memory = self._memory
                covered = memory.steps[step].covered if step in memory.steps else 0
                asked = {
                    "newest": memory.newest,
                    "open": list(memory.open),
                    "revision": memory.revision,
                    "behind": [] if rungs else memory.complete[covered:] if covered else None,
                }
                known = len(memory.complete)
            found = database.call(
                self.engine,
                JUDGING,
                asked | {"study": self.study_id, "trial": trial_id, "step": step, "rungs": rungs, "longest": longest},
            )
            if found is None:
                raise NotFound(f"there is no study {self.study_id}")
            with self._lock:
                if self._memory is not memory or found["revision"] < memory.revision:
                    continue  # another thread knows better
                if not memory.ended.isdisjoint(found["revised"]):
                    self._memory = _Memory(revision=found["revision"])
                    continue
                running = self._learn(memory, found)
                if found["step"] != step:  # a later report than these is stored: that one is judged
                    step = found["step"]
                    continue
                if not rungs:
                    self._cover(memory, step, covered, known, found)
                return _rivals(memory, trial_id, reports, running, found)

    def _learn(self, memory: _Memory, found: Mapping[str, Any]) -> dict[int, list[tuple[int, int, float]]]:
        """Take in what has ended; return the rungs of trials that have not, as (trial id, number, value)."""
        fresh = [trial for trial in found["ended"] if trial not in memory.ended]
        cancelled, infeasible = set(), set()
        for trial, key, text in found["marks"] or ():
            if key == CANCELLED:
                cancelled.add(trial)
            elif _violated(text):
                infeasible.add(trial)
        complete = set(found["complete"] or ()) - infeasible
        memory.complete += [trial for trial in fresh if trial in complete]
        for trial, step in found["longest"] or ():
            if trial in complete:
                memory.longest = step if memory.longest is None else max(memory.longest, step)
        ended = set(fresh)
        running: dict[int, list[tuple[int, int, float]]] = {}
        still = set(found["open"])
        for trial, number, key, text in found["rungs"] or ():
            rung, value = int(key.removeprefix(RUNG)), float(json.loads(text))
            if trial in ended and trial not in cancelled:
                memory.rungs.setdefault(rung, []).append((number, value))
            elif trial in still:
                running.setdefault(rung, []).append((trial, number, value))
        memory.ended |= ended
        memory.open = (memory.open | still) - memory.ended
        memory.newest = max(memory.newest, *found["ended"], *found["open"], -1)
        memory.revision = max(memory.revision, found["revision"])
        return running

    def _cover(self, memory: _Memory, step: int, covered: int, known: int, found: Mapping[str, Any]) -> None:
        """Take in values at a step, unless another thread has done so since `covered` of the `known` were."""
        here = memory.steps.setdefault(step, _Step())
        if here.covered != covered:
            return
        told = set(found["ended"])
        values = dict(zip(found["at"]["ids"] or (), found["at"]["vals"] or (), strict=True))
        for place, trial in enumerate(memory.complete[covered:], covered):
            if place >= known and trial not in told:
                break  # another thread learnt of it: its value was not asked for
            if trial in values:
                here.values.append(float(values[trial]))
            here.covered = place + 1


def _rivals(
    memory: _Memory,
    trial_id: int,
    reports: Mapping[int, float],
    running: Mapping[int, Sequence[tuple[int, int, float]]],
    found: Mapping[str, Any],
) -> Rivals:
    own = found["own"]
    stored = {step: float(value) for step, value in zip(own["steps"] or (), own["vals"] or (), strict=True)}
    resource = None if found["resource"] is None else json.loads(found["resource"])
    return Rivals(
        study_name=found["name"],
        reports={**stored, **reports},
        reached={rung: value for rung, of in running.items() for trial, _, value in of if trial == trial_id},
        complete=len(memory.complete),
        at_step=np.array(memory.steps.get(found["step"], _Step()).values),
        longest=memory.longest,
        resource=resource if isinstance(resource, int) and resource >= 1 else None,
        rungs={
            rung: list(
                chain(
                    memory.rungs.get(rung, ()),
                    ((number, value) for trial, number, value in running.get(rung, ()) if trial != trial_id),
                )
            )
            for rung in memory.rungs.keys() | running.keys()
        },
    )


def _violated(text: str) -> bool:
    """Whether a constraint is: one number, or in older studies a list of them."""
    found = json.loads(text)
    return any(value > 0 for value in (found if isinstance(found, list) else [found]) if isinstance(value, int | float))
