"""How fast is the trainer, and how much does a minute of it learn? `python -m benchmarks.trainer --json FILE`

Compared with the textbook implementation beside it (benchmarks/textbook.py) and with the matrix products of the same
core (benchmarks/gemm.py). Promise: contestants take turns on one core, one thread each, and a ratio is the median over
turns; accuracies are means over seeds on tasks that no run has seen, with their interval, and count all the processor's
time that `fit` took. docs/benchmarks.md says how each figure is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import accuracy, memory
from benchmarks.child import Broken, Child, children, cores
from benchmarks.measure import Figure, Results, machine, median, say, show, spread, write

GOALS: dict[str, tuple[str, str]] = {
    "step_vs_textbook": ("x", ">= 2.5"),
    "step_vs_bf16_gemm_peak": ("", ">= 0.65"),
    "evaluation_vs_pairwise": ("x", ">= 10"),
    "evaluation_5000_vs_320": ("x", "<= 1.2"),
    "evaluation_disagreements_fp32": ("tasks", "<= 0"),
    "input_share_of_step_full": ("", "<= 0.1"),
    "input_share_of_step_mini": ("", "<= 0.1"),
    "mini_rss_over_dataset_mb": ("MB", "<= 300"),
    "mini_accuracy_1min": ("%", ">= 65"),
    "mini_accuracy_3min": ("%", ">= 72"),
    "mini_accuracy_pk_1min": ("%", ">= 74"),
    "mini_accuracy_pk_3min": ("%", ">= 77"),
    "bf16_speed_vs_fp32": ("x", ">= 1.5"),
    "bf16_accuracy_gap": ("points", "<= 2"),
}
"""Unit and goal of each figure, in the order of the table."""


@dataclass(frozen=True)
class Scale:
    """How much of everything is measured."""

    data: str
    batch: int
    steps: int
    """Of the trainer's full network at a turn; the slower contestants take one."""
    turns: int
    mini_steps: int
    gemm_sizes: tuple[int, ...]
    gemm_seconds: float
    tasks: int
    many: int
    pairwise_chunk: int
    pairwise_seconds: float
    memory: dict[str, int]
    """Settings laid over the recipe whose memory is measured."""
    training: accuracy.Scale


FULL = Scale(
    data="auto",
    batch=128,
    steps=2,
    turns=5,
    mini_steps=60,
    gemm_sizes=(512, 1024, 2048, 4096),
    gemm_seconds=0.5,
    tasks=320,
    many=5000,
    pairwise_chunk=64,
    pairwise_seconds=180.0,
    memory={"epochs": 3, "validation_tasks": 2000},
    training=accuracy.Scale(seeds=3, tasks=4000, minute=60.0, gap={"epochs": 14}),
)
QUICK = Scale(
    data="small",
    batch=2,
    steps=1,
    turns=1,
    mini_steps=2,
    gemm_sizes=(256,),
    gemm_seconds=0.01,
    tasks=2,
    many=3,
    pairwise_chunk=1,
    pairwise_seconds=180.0,
    memory={"epochs": 1, "pairs_per_epoch": 512, "validation_tasks": 20},
    training=accuracy.Scale(seeds=1, tasks=40, minute=0.5, gap={"epochs": 1, "pairs_per_epoch": 512}),
)
"""Only shows that everything runs."""


class Bench:
    """One run: what is wanted, where the data lies, and the results so far."""

    def __init__(self, scale: Scale, wanted: Sequence[str], folder: Path) -> None:
        self.scale, self.wanted, self.folder = scale, wanted, folder
        self.core = cores()[0]
        self.results = Results()
        self.name, self.ours = "", ""
        """The data set's name, and the precision that `fit` chooses on this core."""
        self.bytes: dict[str, int] = {}
        self.started = time.monotonic()
        self.broken = False

    def wants(self, *names: str) -> bool:
        return any(name in self.wanted for name in names)

    def add(self, name: str, value: float, note: str) -> None:
        """A figure of the table, if it is wanted."""
        if name in self.wanted:
            unit, goal = GOALS[name]
            self.results.figures.append(Figure(name, value, unit, goal, note))

    def also(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.results.also.append(Figure(name, value, unit, note=note))

    def child(self, part: str, **arguments: Any) -> Child:
        return Child(part, core=self.core, data=self.scale.data, **arguments)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Say what is being measured, and how long it took."""
        began = time.monotonic()
        say.print(f"{what} ...")
        yield
        say.print(f"  {time.monotonic() - began:.0f} s")

    def prepare(self) -> None:
        full = self.wants(*FULL_NET)
        with children(prepare=self.child("prepare", folder=str(self.folder))) as each:
            answer = each["prepare"].ask(sizes=[28, 105] if full else [28], files=full)
        self.name, self.bytes = answer["name"], answer["bytes"]
        self.ours = "bf16" if answer["bf16"] else "fp32"

    def steps(self) -> None:
        """The full network's step: ours in bf16 and fp32, the textbook's, and the core's peak, turn by turn."""
        scale = self.scale
        contestants = {self.ours: self._step("paper", self.ours, scale.batch, scale.steps)}
        if self.wants("bf16_speed_vs_fp32"):
            for other in {"bf16", "fp32"} - {self.ours}:
                contestants[other] = self._step("paper", other, scale.batch, 1)
        if self.wants("step_vs_textbook"):
            contestants["textbook"] = self.child("textbook", batch=scale.batch, steps=1, folder=str(self.folder))
        if self.wants("step_vs_bf16_gemm_peak"):
            contestants["gemm"] = Child(
                "gemm", core=self.core, huge_pages=True, sizes=scale.gemm_sizes, seconds=scale.gemm_seconds
            )
        turns = self._turns(contestants, "steps_full")
        ours = turns[self.ours]
        speed = [turn["pairs_per_s"] for turn in ours]
        kind = f"{self.ours}, batches of {scale.batch} pairs at 105 x 105"
        self.also("step_pairs_per_s", median(speed), "pairs/s", f"{spread(speed, 1)}; {kind}")
        if "textbook" in turns:
            theirs = [turn["pairs_per_s"] for turn in turns["textbook"]]
            ratios = [a / b for a, b in zip(speed, theirs, strict=True)]
            self.also("textbook_pairs_per_s", median(theirs), "pairs/s", spread(theirs, 1))
            self.add("step_vs_textbook", median(ratios), f"{spread(ratios)} in {len(ratios)} turns; {kind}")
        if "gemm" in turns:
            work = 6 * ours[0]["flops"]  # two images a pair; backward is twice forward
            shares = [s * work / turn[self.ours] for s, turn in zip(speed, turns["gemm"], strict=True)]
            for dtype in ("fp32", "bf16"):
                peaks = [turn[dtype] / 1e9 for turn in turns["gemm"]]
                self.also(f"gemm_peak_{dtype}", median(peaks), "GFLOP/s", spread(peaks, 0))
            against = "" if self.ours == "bf16" else "; against the fp32 peak: this core has no bf16 hardware"
            self.add("step_vs_bf16_gemm_peak", median(shares), f"{spread(shares)}{against}")
        shares = [turn["input_s"] * turn["pairs_per_s"] / scale.batch for turn in ours]
        self.add("input_share_of_step_full", median(shares), f"{spread(shares, 4)}; draw, gather, distort")
        if {"bf16", "fp32"} <= turns.keys():
            self._bf16("bf16_speed_vs_fp32", turns, "full network")

    def mini_steps(self) -> None:
        """The small network's step in both precisions, and the input's share of it."""
        turns = self._turns({kind: self._step("mini", kind, 128, self.scale.mini_steps) for kind in ("bf16", "fp32")},
                            "steps_mini")  # fmt: skip
        ours = turns[self.ours]
        speed = [turn["pairs_per_s"] for turn in ours]
        self.also("mini_pairs_per_s", median(speed), "pairs/s", f"{spread(speed, 0)}; {self.ours}")
        shares = [turn["input_s"] * turn["pairs_per_s"] / 128 for turn in ours]
        self.add("input_share_of_step_mini", median(shares), f"{spread(shares, 4)}; draw, gather, distort")
        self._bf16("mini_bf16_speed_vs_fp32", turns, "mini")

    def _step(self, net: str, precision: str, batch: int, steps: int) -> Child:
        return self.child("step", net=net, precision=precision, batch=batch, steps=steps, huge_pages=True)

    def _bf16(self, name: str, turns: dict[str, list[dict[str, Any]]], what: str) -> None:
        pairs = zip(turns["bf16"], turns["fp32"], strict=True)
        ratios = [a["pairs_per_s"] / b["pairs_per_s"] for a, b in pairs]
        note = f"{spread(ratios)}, {what}"
        if name in GOALS:
            self.add(name, median(ratios), note)
        else:
            self.also(name, median(ratios), "x", note)

    def _turns(self, contestants: dict[str, Child], details: str) -> dict[str, list[dict[str, Any]]]:
        """Each contestant's answers, turn by turn, after two to warm up."""
        with children(**contestants) as each:
            for child in [*each.values()] * (2 if self.scale.turns > 1 else 1):
                child.ask()
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in each}
            for _ in range(self.scale.turns):
                for name, child in each.items():
                    answers[name].append(child.ask())
        self.results.details[details] = answers
        return answers

    def evaluation(self) -> None:
        """One-shot evaluation by the trainer, by turns with the textbook's on the same tasks and weights."""
        scale = self.scale
        times: dict[str, list[float]] = {"ours": [], "many": [], "textbook": []}
        part = self.child("evaluation", tasks=scale.tasks, many=scale.many, folder=str(self.folder))
        with children(evaluation=part) as each:
            child = each["evaluation"]
            child.ask(who="ours")
            theirs: list[bool] = []
            chunks = range(0, scale.tasks, scale.pairwise_chunk)
            pairwise = self.wants("evaluation_vs_pairwise", "evaluation_disagreements_fp32")
            for begin in chunks:
                for who in ("ours", "many"):
                    answer = child.ask(who=who)
                    times[who].append(answer["seconds"])
                    if who == "ours":
                        ours = answer["right"]
                if pairwise and sum(times["textbook"]) < scale.pairwise_seconds:
                    answer = child.ask(who="textbook", begin=begin, end=begin + scale.pairwise_chunk)
                    times["textbook"].append(answer["seconds"])
                    theirs += answer["right"]
        self.results.details["evaluation"] = times
        if pairwise:
            compared = len(theirs)
            whole = sum(times["textbook"]) * scale.tasks / compared
            scaled = "" if compared == scale.tasks else f" (scaled linearly from {compared})"
            note = f"{scale.tasks} tasks: {whole:.0f} s{scaled} a forward per pair, {median(times['ours']):.1f} s ours"
            self.add("evaluation_vs_pairwise", whole / median(times["ours"]), note)
            differing = sum(a != b for a, b in zip(ours, theirs, strict=False))
            self.add("evaluation_disagreements_fp32", differing, f"of {compared} tasks; {sum(ours)} answered rightly")
        ratios = [many / few for many, few in zip(times["many"], times["ours"], strict=True)]
        note = f"{spread(ratios)}; {scale.many:,} tasks: {median(times['many']):.1f} s"
        self.add("evaluation_5000_vs_320", median(ratios), note)

    def memory(self) -> None:
        with_data = self.bytes["28"]
        bare, trained = memory.bare(self.core), memory.training(self.core, self.scale.memory, self.scale.data)
        note = (
            f"peak {trained / 1e6:.0f} MB of `whetstone train`, less {bare / 1e6:.0f} of `import torch` and "
            f"{with_data / 1e6:.0f} of images"
        )
        self.add("mini_rss_over_dataset_mb", (trained - bare - with_data) / 1e6, note)

    def accuracy(self) -> None:
        names = [name for name in accuracy.NAMES if name in self.wanted]
        if self.name != "omniglot" and self.scale is FULL:
            why = "needs Omniglot: set WHETSTONE_DATA to the folder that holds omniglot-py/"
            self.results.skipped |= dict.fromkeys(names, why)
            return
        measured = accuracy.measure(names, self.scale.training, self.scale.data, cores()[:2])
        for name, score in measured.items():
            self.add(name, score.value, score.note)
            self.results.details[name] = score.runs

    def run(self) -> None:
        """Everything that is wanted: speed first and alone, then the accuracies side by side."""
        with self.told("preparing the data"):
            self.prepare()
        parts: list[tuple[str, Callable[[], None], tuple[str, ...]]] = [
            ("training steps of the full network, by turns", self.steps, STEPS),
            ("training steps of mini, by turns", self.mini_steps, ("input_share_of_step_mini",)),
            ("one-shot evaluation, by turns", self.evaluation, EVALUATION),
            ("memory", self.memory, ("mini_rss_over_dataset_mb",)),
            ("accuracies, a core each", self.accuracy, accuracy.NAMES),
        ]
        for what, measure, names in parts:
            if self.wants(*names):
                with self.told(what):
                    try:
                        measure()
                    except Broken as fault:  # the others' minutes are not to be lost
                        say.print(f"[bold red]{fault}[/]")
                        have = {figure.name for figure in self.results.figures}
                        self.broken = True
                        self.results.skipped |= {n: str(fault) for n in names if self.wants(n) and n not in have}
        order = list(GOALS)
        self.results.figures.sort(key=lambda figure: order.index(figure.name))


STEPS = ("step_vs_textbook", "step_vs_bf16_gemm_peak", "input_share_of_step_full", "bf16_speed_vs_fp32")
EVALUATION = ("evaluation_vs_pairwise", "evaluation_5000_vs_320", "evaluation_disagreements_fp32")
FULL_NET = (*STEPS, *EVALUATION)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"some figures of {', '.join(GOALS)}")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, its figures mean nothing")
    chosen = parser.parse_args(arguments)
    wanted = chosen.only.split(",") if chosen.only else list(GOALS)
    if unknown := [name for name in wanted if name not in GOALS]:
        parser.error(f"no figure named {', '.join(unknown)}; there are {', '.join(GOALS)}")
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children and files go with us
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="whetstone-bench-") as folder:
        bench = Bench(QUICK if chosen.quick else FULL, wanted, Path(folder))
        bench.run()
    seconds = time.monotonic() - bench.started
    about = {"data": bench.name, "quick": chosen.quick, "seconds": round(seconds)}
    write(chosen.json, bench.results, machine=facts, **about)
    if bench.name != "omniglot":
        say.print("No Omniglot: speeds are those on the built-in stroke characters.")
    show(bench.results, facts | about)
    if bench.broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
