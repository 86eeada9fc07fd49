"""The best accuracy on Lake's 400 trials that an hour of one core can buy: `python -m benchmarks.record --json FILE`

Trains the recipe (benchmarks/record.yaml unless another is given) for so many minutes of the processor's time, over all
threads. Promise: the epoch, and whether images are looked at once or in several distorted views, are chosen on
validation tasks alone; then, once, the chosen network answers the official trials, and that use of test data is
recorded with the checkpoint. A folder that holds a run is refused, for its time would not be counted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.child import HUGE_PAGES, cores
from benchmarks.measure import Figure, Results, machine, say, show, write

RECIPE = Path(__file__).parent / "record.yaml"
VIEWS = 15
VALIDATION_TASKS, VALIDATION_SEED = 4000, 20260611
"""Fresh tasks on which the chosen network is scored once more: what chose it flatters it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures are written")
    parser.add_argument("--minutes", type=float, default=60.0, help="of one core; two cores take half as long")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="as `whetstone train` takes it")
    parser.add_argument("-o", "--output", type=Path, default=Path("record"), help="folder for the checkpoints")
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--no-test", action="store_true", help="stop after validation: for trying recipes out")
    chosen = parser.parse_args(arguments)
    if not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    if (chosen.output / "last.json").exists() or (chosen.output / "best.json").exists():
        parser.error(f"--output: {chosen.output} holds a run; choose another folder or remove it")
    os.environ.setdefault(HUGE_PAGES, "1")  # as `whetstone train` does, before torch is loaded
    results, facts = Results(), machine()
    about = _train(chosen.recipe, chosen.output, 60.0 * chosen.minutes, chosen.threads, results)
    if not chosen.no_test:
        _test(chosen.output, about["views"], results)
    write(chosen.json, results, machine=facts, **about)
    show(results, facts | about)


def _train(recipe: Path, into: Path, seconds: float, threads: int, results: Results) -> dict[str, Any]:
    """Train, and score the epoch that validation chose; what is spent on finding the number of epochs counts."""
    import torch

    from benchmarks import budget
    from benchmarks.parts import load
    from model import episode, evaluate, spec
    from model.recipe import load_recipe

    torch.set_num_threads(threads)
    config = spec.config(*load_recipe(recipe))
    data = load(config.net.input, config.data)
    began = time.process_time()
    if config.schedule == "cosine":
        whole = budget.epochs_within(config, data, seconds, trials=2)
        left = 1.0 - (time.process_time() - began) / seconds
        config = replace(config, epochs=max(1, int(whole * left)))
    planning = time.process_time() - began

    def report(epoch: int, metrics: dict[str, float]) -> None:
        spent = (time.process_time() - began) / 60
        say.print(
            f"epoch {epoch:>4}   loss {metrics['loss']:.4f}   accuracy {100 * metrics['accuracy']:.1f}%   "
            f"{metrics['pairs_per_s']:,.0f} pairs/s   {spent:.1f} core-minutes"
        )

    run = budget.train(config, data, into, seconds - planning, report)
    if run.result.best_epoch is None:
        raise SystemExit("The budget ended before the first epoch did: give it more --minutes, or smaller epochs.")
    minutes = (run.cpu_seconds + planning) / 60
    results.also.append(
        Figure("training", minutes, "core-minutes", note=f"{run.result.epochs} epochs of {recipe.name}")
    )
    net = evaluate.load(into / "best.json").net
    tasks = episode.draw(data.validation, VALIDATION_TASKS, 20, VALIDATION_SEED)
    scores = {views: evaluate.one_shot(net, data.validation, tasks, views=views) for views in (0, VIEWS)}
    for views, score in scores.items():
        seen = f"{views} distorted views beside each image" if views else "each image once"
        note = f"{_bounds(score.interval)}; {score.tasks:,} fresh tasks, {seen}, epoch {run.result.best_epoch}"
        name = f"record_validation_{views}_views" if views else "record_validation"
        results.also.append(Figure(name, 100 * score.accuracy, "%", note=f"{note}, seed {config.seed}"))
    views = max(scores, key=lambda views: scores[views].correct)
    return {
        "data": data.name,
        "threads": threads,
        "views": views,
        "wall_minutes": round(run.wall_seconds / 60, 1),
    }


def _test(folder: Path, views: int, results: Results) -> None:
    """Lake's official trials, once, beside what others published."""
    from cli import settings, uses
    from model import episode, evaluate, published

    net = evaluate.load(folder / "best.json").net
    drawings, episodes = episode.lake_runs(settings.load().data_root, net.config.input)
    with uses.recorded(folder, "lake_runs", "python -m benchmarks.record") as use:
        score = evaluate.one_shot(net, drawings, episodes, views=views)
        use.score(score.accuracy, score.tasks)
    note = f"{_bounds(score.interval)}; {score.correct} of Lake's {score.tasks} trials"
    results.figures.append(Figure("record_lake_accuracy", 100 * score.accuracy, "%", "", note))
    for other in published.ONE_SHOT:
        results.also.append(
            Figure(other.who, 100 * other.accuracy, "%", note="; ".join(filter(None, (other.cited, other.caveat))))
        )


def _bounds(interval: tuple[float, float]) -> str:
    return f"95% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


if __name__ == "__main__":
    main()
