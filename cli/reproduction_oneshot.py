"""One-shot recognition beside the figures of others: Lake's 400 official trials, and MNIST's digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import plot, scoring, uses
from cli.evaluate import LAKE
from cli.reproduction_recipe import Recipe, recipe
from cli.reproduction_report import Report, about, bounds, notes, percent, subtitle, told, used
from cli.reproduction_run import Bench, Choice
from model import baseline, episode, evaluate, published
from model.drawings import Drawings
from model.episode import Episodes


def plan_of(choice: Choice) -> Recipe | None:
    """The recipe of the one-shot network, None where a checkpoint was given."""
    if choice.checkpoint:
        return None
    return recipe("koch2015-oneshot", choice.scale, seed=choice.seed, data=choice.data)


def trained(bench: Bench, choice: Choice, plan: Recipe | None) -> Path:
    """The network's checkpoint: the given one, or one that is trained now."""
    if plan:
        return bench.train(plan.config, "oneshot")
    assert choice.checkpoint is not None
    return choice.checkpoint


def reproduce_lake(bench: Bench, choice: Choice) -> Report:
    """20-way one-shot recognition on Lake's 400 trials; with strokes on as many tasks of theirs."""
    plan = plan_of(choice)
    net = plan.config.net if plan else evaluate.load(trained(bench, choice, plan)).config.net
    if choice.data == "omniglot":  # read before anything is trained: what is missing is told at once
        drawings, tasks = episode.lake_runs(bench.settings.data_root, net.input)
        what, key = LAKE, "lake_runs"
    else:
        drawings, what = bench.load(net.input, choice.data).test, "400 tasks of stroke characters' test alphabets"
        key = "test_tasks"
        tasks = episode.draw(drawings, 400, 20, scoring.FRESH_SEED)
    others = published.ONE_SHOT if what == LAKE else ()
    nearest = scoring.row(baseline.nearest_neighbour(drawings, tasks), len(tasks))
    if net.channels == 3:
        drawings = drawings.coloured()
    run = trained(bench, choice, plan)
    loaded = evaluate.load(run)
    found = bench.scored("oneshot", run, {"tasks": what}, lambda: _score(bench, "oneshot", run, drawings, tasks, key))
    rows = _rows(found, nearest, tasks.way, net.input, others)
    title = "One-shot recognition: which of 20 characters?"
    line = subtitle(plan, loaded.data, choice.seed) if plan else told(loaded)
    return Report(
        "oneshot",
        title,
        line,
        COLUMNS,
        [_cells(row) for row in rows],
        [f"Accuracy on {what}.", *notes(plan, loaded.data), *used([found]), *_sources(others)],
        about(plan, loaded.data, choice.seed, bench.device) | {"run": str(run), "tasks_from": what, "rows": rows},
        lambda path: plot.ranking(path, title, line, rows),
    )


def reproduce_mnist(bench: Bench, choice: Choice) -> Report:
    """10-way one-shot recognition of MNIST's test images by a network that has seen no digit."""
    plan = recipe("koch2015-mnist", choice.scale, seed=choice.seed, data=choice.data)
    net, way = plan.config.net, 10
    digits = bench.load(net.input, "mnist").test
    tasks = episode.draw(digits, choice.tasks, way, scoring.FRESH_SEED)
    run = bench.train(plan.config, "mnist")
    how, what = {"tasks": choice.tasks, "seed": scoring.FRESH_SEED}, "mnist_tasks"
    found = bench.scored("mnist", run, how, lambda: _score(bench, "mnist", run, digits, tasks, what))
    nearest = scoring.row(baseline.nearest_neighbour(digits, tasks), len(tasks))
    rows = _rows(found, nearest, way, net.input, published.MNIST)
    data = bench.data(plan.config).name
    title, line = "MNIST: which of 10 digits, none ever seen before?", subtitle(plan, data, choice.seed)
    filters = ", ".join(f"{layer.filters} of {layer.kernel} x {layer.kernel}" for layer in net.conv)
    return Report(
        "mnist",
        title,
        line,
        COLUMNS,
        [_cells(row) for row in rows],
        [
            f"Accuracy on {len(tasks):,} tasks drawn from MNIST's test images, {digits.drawers} of each digit.",
            "The paper does not say how its nearest neighbour compared, nor on which tasks; ours compares cosines.",
            f"Filters: {filters}. The paper's own run out of pixels, and which it took here it does not say.",
            *notes(plan, data),
            *used([found]),
            *_sources(published.MNIST),
        ],
        about(plan, data, choice.seed, bench.device) | {"run": str(run), "rows": rows},
        lambda path: plot.ranking(path, title, line, rows),
    )


COLUMNS = ("", ("accuracy", "right"), ("95% interval", "right"), "source")


def _score(bench: Bench, name: str, run: Path, drawings: Drawings, tasks: Episodes, what: str) -> dict[str, Any]:
    net = evaluate.load(run, bench.device).net
    with uses.recorded(run, what, f"whetstone reproduce {name}") as use:
        score = evaluate.one_shot(net, drawings.to(bench.device), tasks, interrupt=bench.interrupt)
        use.score(score.accuracy, score.tasks)
    return {**scoring.row(score.correct, score.tasks), "test_uses": use.count}


def _rows(
    found: dict[str, Any], nearest: dict[str, Any], way: int, side: int, others: Sequence[published.Figure]
) -> list[dict[str, Any]]:
    """Ours, the yardsticks, and what others published."""
    pixels = f"measured here, {side} x {side} pixels, cosine"
    return [
        {"who": "this network", **found, "ours": True, "source": "measured here"},
        {"who": "pixel 1-nearest neighbour", **nearest, "ours": False, "source": pixels},
        {"who": f"chance, 1 in {way}", "accuracy": baseline.chance(way), "interval": None, "ours": False, "source": ""},
        *(
            {
                "who": other.who,
                "accuracy": other.accuracy,
                "interval": None,
                "ours": False,
                "source": other.cited,
            }
            for other in others
        ),
    ]


def _sources(others: Sequence[published.Figure]) -> list[str]:
    """Caveats, and the publications in full."""
    cited = dict.fromkeys(source for other in others for source in (other.source, other.quoted) if source)
    caveats = [f"{other.who} ({other.source.short}): {other.caveat}." for other in others if other.caveat]
    return [*caveats, *(f"{source.short}: {source.full}." for source in cited)]


def _cells(row: dict[str, Any]) -> list[str]:
    bold = "**" if row["ours"] else ""
    interval = bounds(row["interval"]) if row["interval"] else ""
    return [f"{bold}{row['who']}{bold}", f"{bold}{percent(row['accuracy'])}{bold}", interval, row["source"]]
