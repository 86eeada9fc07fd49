"""How fast is the coordinator, beside stock Optuna? `python -m benchmarks.coordinator --json FILE`

Promise: what is compared is measured in the same run, by turns, on a PostgreSQL that brings every commit to the disk;
medians are quoted with the lowest and the highest. Everything that the figures rest on is in the file.
docs/benchmarks.md says how each figure is measured.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna

from benchmarks import inside, served
from benchmarks.measure import machine, say, show, write
from benchmarks.place import Place
from benchmarks.sheet import FULL, QUICK, Sheet

GOALS: dict[str, tuple[str, str]] = {
    "ask_vs_stock": ("x", ">= 8"),
    "ask_overhead_ms": ("ms", "<= 5"),
    "ask_overhead_growth": ("x", "<= 1.3"),
    "ask_round_trips": ("", "<= 2"),
    "tell_round_trips": ("", "<= 2"),
    "report_round_trips": ("", "<= 2"),
    "ask_commits": ("", "<= 1"),
    "tell_commits": ("", "<= 1"),
    "report_commits": ("", "<= 1"),
    "ask_busy_vs_idle": ("x", "<= 1.2"),
    "http_trials_vs_stock_tpe": ("x", ">= 2.5"),
    "http_trials_vs_stock_random": ("x", ">= 7"),
    "paced_ask_p95_ms": ("ms", "<= 100"),
    "fleet_report_p99_ms": ("ms", "<= 250"),
    "fleet_errors": ("", "<= 0"),
    "held_claims_tell_ms": ("ms", "<= 100"),
    "list_ms": ("ms", "<= 10"),
    "page_ms": ("ms", "<= 10"),
    "best_ms": ("ms", "<= 10"),
    "cold_start_s": ("s", "<= 2"),
}
"""Unit and goal of each figure, in the order of the table."""

BEND = "bend"
"""Not a figure: more and more workers, until it bends. Only where it is asked for."""
COSTS = tuple(f"{call}_{what}" for what in ("round_trips", "commits") for call in ("ask", "tell", "report"))

PARTS: list[tuple[str, Callable[[Sheet], None], tuple[str, ...]]] = [
    ("asks, by turns with stock Optuna", inside.versus_stock, ("ask_vs_stock",)),
    ("what an ask costs beside its sampler", inside.overhead, ("ask_overhead_ms", "ask_overhead_growth")),
    ("round trips and commits", inside.costs, COSTS),
    ("asks beside busy trials", inside.busy, ("ask_busy_vs_idle",)),
    ("trials over HTTP, by turns with stock Optuna", served.http, tuple(served.HTTP.values())),
    ("paced asks", served.paced, ("paced_ask_p95_ms",)),
    ("claims and streams that wait", served.held, ("held_claims_tell_ms",)),
    ("a big study", served.big, ("cold_start_s", *served.READS)),
    ("the fleet", served.workers, ("fleet_report_p99_ms", "fleet_errors")),
    ("until the fleet bends", served.bend, (BEND,)),
]


def run(sheet: Sheet) -> bool:
    """Everything that is wanted; whether all of it could be measured."""
    whole = True
    for what, measure, names in PARTS:
        if not sheet.wants(*names):
            continue
        with sheet.told(what):
            try:
                measure(sheet)
            except Exception as fault:  # the others' minutes are not to be lost
                say.print_exception()
                whole = False
                have = {figure.name for figure in sheet.results.figures}
                why = f"{type(fault).__name__}: {fault}"[:200]
                sheet.results.skipped |= {name: why for name in names if sheet.wants(name) and name not in have}
    order = list(GOALS)
    sheet.results.figures.sort(key=lambda figure: order.index(figure.name))
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coordinator", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some figures of {', '.join(GOALS)}; or {BEND}")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, its figures mean nothing")
    chosen = parser.parse_args(arguments)
    wanted = [name for given in chosen.only for name in given.split(",")] if chosen.only else list(GOALS)
    if unknown := [name for name in wanted if name not in (*GOALS, BEND)]:
        parser.error(f"no figure named {', '.join(unknown)}; there are {', '.join(GOALS)}, and {BEND}")
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files go with us
    _many_files()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    facts, began = machine(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="whetstone-bench-") as folder, Place(Path(folder)) as place:
        facts |= {"postgresql": place.version, "optuna": optuna.__version__}
        sheet = Sheet(QUICK if chosen.quick else FULL, wanted, place, GOALS)
        whole = run(sheet)
    about = {"quick": chosen.quick, "seconds": round(time.monotonic() - began)}
    write(chosen.json, sheet.results, machine=facts, **about)
    show(sheet.results, facts | about)
    if not whole:
        raise SystemExit(1)


def _many_files() -> None:
    """A thousand connections are as many open files, here and in the API process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
