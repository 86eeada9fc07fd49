"""How good is what the samplers suggest? `python -m benchmarks.search --json FILE`

Every sampler searches each problem of benchmarks/problems.py with 8 trials pending and 100 in all, from each of 20
seeds. Promise: points come from the coordinator's own `choose`; the best so far is the best true value among the trials
told, without noise; and a call with the same FILE goes on with the searches that an earlier one left beside it, unless
anything that they rest on has changed since. docs/benchmarks.md says how each figure is defined.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import problems, trainings
from benchmarks.child import cores
from benchmarks.measure import Figure, Results, machine, median, say, show, write
from benchmarks.simulation import Search, search

GOALS: dict[str, tuple[str, str]] = {
    "auto_behind": ("problems", "<= 0"),
    "trials_to_random_100": ("trials", "<= 35"),
    "trainings_r2": ("", ">= 0.6"),
}
SINGLE = ("random", "qmc", "tpe", "gp", "cmaes")
SLOW = ("gp", "auto")
"""Samplers whose searches take seconds rather than tenths of one; they begin first."""
SIGNIFICANT = 0.01
RESTS_ON = (
    *(f"hpo/{name}.py" for name in ("auto", "board", "cma_state", "document", "gp", "samplers", "suggest", "tpe")),
    *(f"benchmarks/{name}.py" for name in ("forest", "problems", "simulation", "trainings")),
)
"""What a search that was kept rests on, beside the libraries."""


@dataclass(frozen=True)
class Scale:
    """How many seeds and trials, and the moments of the table."""

    seeds: int
    trials: int
    moments: tuple[int, ...]


FULL = Scale(seeds=20, trials=100, moments=(25, 50, 100))
QUICK = Scale(seeds=2, trials=12, moments=(6, 12))
"""Only shows that everything runs."""


@dataclass(frozen=True, order=True)
class Job:
    """One search to be made."""

    problem: str
    sampler: str
    seed: int
    trials: int


@cache
def _problem(name: str) -> problems.Problem:
    return problems.PROBLEMS[name]()


def _work(job: Job) -> tuple[Job, Search, float]:
    """Make one search, in a process of the pool; also the seconds it took."""
    began = time.process_time()
    found = search(_problem(job.problem), job.sampler, job.seed, job.trials)
    return job, found, time.process_time() - began


class Kept:
    """Finished searches, a line each, in a file beside the results; those of other code are left alone and unused."""

    def __init__(self, path: Path) -> None:
        self._path = path
        root = Path(__file__).parent.parent
        parts = [(root / name).read_bytes() for name in RESTS_ON]
        data = {"trainings": trainings.RECORDED.read_bytes()}
        self._code = {name: _digest([*parts, data.get(name, b"")]) for name in problems.PROBLEMS}
        self.searches: dict[Job, Search] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            job = Job(**row["job"])
            if row["code"] == self._code.get(job.problem):
                self.searches[job] = Search(row["truths"], row["picks"])

    def add(self, job: Job, found: Search) -> None:
        self.searches[job] = found
        row = {"code": self._code[job.problem], "job": asdict(job), **asdict(found)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def run(jobs: Sequence[Job], kept: Kept) -> None:
    """Make the searches that are not kept yet, two at a time, the slow ones first."""
    left = sorted(
        (job for job in jobs if job not in kept.searches), key=lambda job: (job.sampler not in SLOW, job.seed)
    )
    if not left:
        return
    # Threads of the libraries are counted when a process starts, so this is said before any does.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    say.print(f"{len(left)} searches to make, {len(jobs) - len(left)} kept")
    spent: dict[str, float] = {}
    pool = ProcessPoolExecutor(min(2, len(cores())), mp_context=multiprocessing.get_context("spawn"))
    try:
        for done, future in enumerate(as_completed([pool.submit(_work, job) for job in left]), start=1):
            job, found, seconds = future.result()
            kept.add(job, found)
            spent[job.sampler] = spent.get(job.sampler, 0.0) + seconds
            if done % 20 == 0 or done == len(left):
                say.print(f"  {done} of {len(left)}; processor seconds: " + _listing(spent))
    finally:
        pool.shutdown(cancel_futures=True)  # who stops the run waits for the two searches in progress, not for all


def _listing(spent: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.0f}" for name, seconds in sorted(spent.items()))


class Comparison:
    """The best so far of all samplers on one problem."""

    def __init__(self, name: str, searches: dict[Job, Search]) -> None:
        self.name = name
        self.curves = {
            sampler: np.array([found.best() for job, found in sorted(searches.items())
                               if (job.problem, job.sampler) == (name, sampler)])
            for sampler in (*SINGLE, "auto")
        }  # fmt: skip

    def at(self, sampler: str, trial: int) -> list[float]:
        """The best after so many trials, for each seed."""
        values: list[float] = self.curves[sampler][:, trial - 1].tolist()
        return values

    @property
    def winner(self) -> str:
        """The single sampler with the highest median after the last trial."""
        return max(SINGLE, key=lambda sampler: median(self.curves[sampler][:, -1].tolist()))

    @property
    def p_behind(self) -> float:
        """One-sided Mann-Whitney: how likely `auto` ends so low if it were no worse than the winner."""
        ours, theirs = self.curves["auto"][:, -1], self.curves[self.winner][:, -1]
        return float(stats.mannwhitneyu(ours, theirs, alternative="less").pvalue)

    def details(self) -> dict[str, Any]:
        return {
            "winner": self.winner,
            "p_behind": self.p_behind,
            "samplers": {sampler: _curve(curves) for sampler, curves in self.curves.items()},
        }


def _curve(curves: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Median and interval of each trial's best so far, and every seed's last."""
    low, high = interval(np.sort(curves, axis=0))
    return {
        "median": np.median(curves, axis=0).round(5).tolist(),
        "low": low.round(5).tolist(),
        "high": high.round(5).tolist(),
        "last": curves[:, -1].round(5).tolist(),
    }


def interval(ranked: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The values between which the median lies with 95%, whatever their distribution; `ranked` along the first axis."""
    count = len(ranked)
    outside = max(int(stats.binom.ppf(0.025, count, 0.5)) - 1, 0)
    return ranked[outside], ranked[count - 1 - outside]


def behind(values: Sequence[float]) -> int:
    """How many of these p-values stand after Holm's correction."""
    stands = 0
    for place, p in enumerate(sorted(values)):
        if p >= SIGNIFICANT / (len(values) - place):
            break
        stands += 1
    return stands


def reached(curve: Sequence[float], target: float) -> int:
    """The number of trials after which a best so far is at `target`; one more than there are if it never is."""
    return next((place for place, value in enumerate(curve, start=1) if value >= target), len(curve) + 1)


def _jobs(wanted: Sequence[str], scale: Scale) -> Iterator[Job]:
    names: dict[str, Sequence[str]] = {}
    if "trials_to_random_100" in wanted:
        names["trainings"] = ("random", "auto")
    if "auto_behind" in wanted:
        names = dict.fromkeys(problems.PROBLEMS, (*SINGLE, "auto"))
    for problem, samplers in names.items():
        for sampler in samplers:
            yield from (Job(problem, sampler, seed, scale.trials) for seed in range(scale.seeds))


def measure(wanted: Sequence[str], scale: Scale, kept: Kept) -> Results:
    """The figures wanted."""
    results = Results()

    def add(name: str, value: float, note: str) -> None:
        unit, goal = GOALS[name]
        results.figures.append(Figure(name, value, unit, goal, note))

    jobs = list(_jobs(wanted, scale))
    run(jobs, kept)
    searches = {job: kept.searches[job] for job in jobs}
    if "auto_behind" in wanted:
        compared = [Comparison(name, searches) for name in problems.PROBLEMS]
        table(compared, scale)
        results.details["problems"] = {each.name: each.details() for each in compared}
        note = ", ".join(f"{each.name}: {each.winner} best, p {each.p_behind:.2g}" for each in compared)
        add("auto_behind", behind([each.p_behind for each in compared]), f"{note}; {scale.seeds} seeds each")
    if "trials_to_random_100" in wanted:
        curves = {
            sampler: [found.best() for job, found in sorted(searches.items())
                      if (job.problem, job.sampler) == ("trainings", sampler)]
            for sampler in ("random", "auto")
        }  # fmt: skip
        target = median(curve[-1] for curve in curves["random"])
        each = sorted(reached(curve, target) for curve in curves["auto"])
        low, high = interval(np.array(each))
        note = f"95% interval {low} to {high}; random's best of {scale.trials}: {100 * target:.1f}% (median of seeds)"
        add("trials_to_random_100", median(each), f"{note}; {scale.seeds} seeds")
        results.details["trials_to_random_100"] = each
    if "trainings_r2" in wanted:
        recorded = trainings.read()
        points = len({one.point for one in recorded})
        r2 = problems.held_out(recorded)
        add("trainings_r2", r2, f"ten folds of {points} points ({len(recorded)} trainings of the mini preset)")
        deviation = problems.noise(recorded)
        results.also.append(Figure("trainings_noise", 100 * deviation, "points", note="deviation between seeds"))
    results.details["picks"] = {
        f"{job.problem} {job.seed}": found.picks for job, found in searches.items() if job.sampler == "auto"
    }
    return results


def table(compared: Sequence[Comparison], scale: Scale) -> None:
    """Best so far on stdout: medians, and between which values the last one lies with 95%."""
    shown = Table(title="Best so far (true value; median of seeds)")
    shown.add_column("problem")
    shown.add_column("sampler")
    for moment in scale.moments:
        shown.add_column(f"{moment} trials", justify="right")
    shown.add_column("95% interval", justify="right")
    for each in compared:
        for sampler in (*SINGLE, "auto"):
            medians = [f"{median(each.at(sampler, moment)):.3f}" for moment in scale.moments]
            low, high = interval(np.sort(each.at(sampler, scale.trials)))
            best = " (best single one)" if sampler == each.winner else ""
            shown.add_row(each.name, sampler + best, *medians, f"{low:.3f} to {high:.3f}")
        shown.add_section()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"some figures of {', '.join(GOALS)}")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, its figures mean nothing")
    chosen = parser.parse_args(arguments)
    wanted = chosen.only.split(",") if chosen.only else list(GOALS)
    if unknown := [name for name in wanted if name not in GOALS]:
        parser.error(f"no figure named {', '.join(unknown)}; there are {', '.join(GOALS)}")
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pool goes with us
    facts, began = machine(), time.monotonic()
    results = measure(wanted, QUICK if chosen.quick else FULL, Kept(chosen.json.with_suffix(".searches.jsonl")))
    about = {"quick": chosen.quick, "seconds": round(time.monotonic() - began)}
    write(chosen.json, results, machine=facts, **about)
    show(results, facts | about)


if __name__ == "__main__":
    main()
