"""How well the small network does after a minute or three of one core, from each of several seeds.

Promise: a run is given the processor's time, counted over all of `fit` and over all threads of a process pinned to one
core; its last weights answer tasks that no run has seen, and the figure is the mean over seeds, none left out. Runs go
side by side, one a core. The recipes stand in benchmarks/recipes, as `whetstone train` takes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from benchmarks.child import Child, children
from benchmarks.measure import say

RECIPES = Path(__file__).parent / "recipes"
TIMED = {
    "mini_accuracy_1min": ("pairs-1min.yaml", 1),
    "mini_accuracy_3min": ("pairs-3min.yaml", 3),
    "mini_accuracy_pk_1min": ("pk-1min.yaml", 1),
    "mini_accuracy_pk_3min": ("pk-3min.yaml", 3),
}
"""Recipe and minutes of each figure that has a budget."""
GAP = "bf16_accuracy_gap"
NAMES = (*TIMED, GAP)


@dataclass(frozen=True)
class Scale:
    """How many seeds and tasks, how long a minute is, and how long both precisions train."""

    seeds: int
    tasks: int
    minute: float
    gap: dict[str, int]
    """Settings laid over the recipe where both precisions train for as long: their epochs."""


@dataclass(frozen=True)
class Score:
    """A figure, what it rests on, and the runs it is made of."""

    value: float
    note: str
    runs: list[dict[str, Any]]


def measure(names: Sequence[str], scale: Scale, data: str, cores: Sequence[int]) -> dict[str, Score]:
    """These figures, the runs of all of them spread over `cores`, the longest first."""
    jobs: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        for seed in range(scale.seeds):
            jobs += [(name, request | {"seed": seed, "tasks": scale.tasks}) for request in _requests(name, scale)]
    jobs.sort(key=lambda job: -job[1].get("cpu_seconds", 2 * scale.minute))
    finished = _run(jobs, data, cores)
    runs = {name: [run for job, run in finished if job == name] for name in names}
    return {name: (_gap if name == GAP else _mean)(runs[name]) for name in names}


def _requests(name: str, scale: Scale) -> list[dict[str, Any]]:
    """What a figure needs of each seed."""
    if name == GAP:
        recipe = str(RECIPES / TIMED["mini_accuracy_1min"][0])
        return [{"recipe": recipe, "settings": scale.gap | {"precision": each}} for each in ("fp32", "bf16")]
    file, minutes = TIMED[name]
    return [{"recipe": str(RECIPES / file), "cpu_seconds": minutes * scale.minute}]


def _run(
    jobs: Sequence[tuple[str, dict[str, Any]]], data: str, cores: Sequence[int]
) -> list[tuple[str, dict[str, Any]]]:
    """Work the jobs off, one at a time on each core; each with what was asked and what came of it."""
    waiting: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lanes = {f"core{core}": Child("training", core=core, data=data, huge_pages=True) for core in cores[: len(jobs)]}

    def work(child: Child) -> list[tuple[str, dict[str, Any]]]:
        done: list[tuple[str, dict[str, Any]]] = []
        while True:
            try:
                name, request = waiting.get_nowait()
            except Empty:
                return done
            run = request | child.ask(**request)
            run["recipe"] = Path(run["recipe"]).name
            done.append((name, run))
            which = f"{name}, seed {run['seed']} {run.get('settings', {}).get('precision', '')}".rstrip()
            say.print(f"  {which}: {_percent(run):.1f}% in {run['cpu_seconds']:.0f} s")

    with children(**lanes) as each, ThreadPoolExecutor(len(each)) as pool:
        return [one for lane in pool.map(work, each.values()) for one in lane]


def _percent(run: dict[str, Any]) -> float:
    return 100.0 * float(run["correct"]) / float(run["tasks"])


def _mean(runs: list[dict[str, Any]]) -> Score:
    """The mean over seeds. Each has tasks of its own, so Student's interval between seeds holds their noise too."""
    values = [_percent(run) for run in runs]
    each = ", ".join(f"{value:.1f}" for value in values)
    seconds = max(run["cpu_seconds"] for run in runs)
    note = f"{_reach(values)}seeds {each}; {runs[0]['tasks']:,} tasks each, {seconds:.0f} s of one core"
    return Score(statistics.fmean(values), note, runs)


def _gap(runs: list[dict[str, Any]]) -> Score:
    """How far apart the precisions end after the same steps, seed by seed."""
    by = {(run["settings"]["precision"], run["seed"]): _percent(run) for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    gaps = [by["fp32", seed] - by["bf16", seed] for seed in seeds]
    each = ", ".join(f"{gap:+.1f}" for gap in gaps)
    note = f"{_reach(gaps)}fp32 less bf16, seeds {each}; {runs[0]['epochs']} epochs, {runs[0]['tasks']:,} tasks each"
    return Score(abs(statistics.fmean(gaps)), note, runs)


_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Student's t at 97.5%, by the number of seeds."""


def _reach(values: Sequence[float]) -> str:
    """The half-width of the mean's 95% interval, as text; "" for a single value."""
    if len(values) not in _STUDENT:
        return ""
    reach = _STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"± {reach:.1f} (95% over seeds); "
