"""Accuracy against the number of characters to choose among, on alphabets that were trained on and on others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import output, plot, scoring, uses
from cli.evaluate import trained_with
from cli.reproduction_oneshot import plan_of, trained
from cli.reproduction_report import Report, about, notes, subtitle, told, used
from cli.reproduction_run import Bench, Choice
from model import baseline, episode, evaluate
from model.drawings import Drawings
from model.evaluate import Score
from model.net import SiameseNet

WITHIN = (2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55)
ACROSS = (2, 5, 10, 20, 30, 40, 50, 60)
PARTS = ("training", "validation", "test")
COLUMNS: tuple[str | tuple[str, str], ...] = (
    "from",
    ("ways", "right"),
    ("alphabets", "right"),
    *((what, "right") for part in PARTS for what in (part, "1-NN")),
)


def reproduce(bench: Bench, choice: Choice) -> Report:
    """Score the one-shot network, or the checkpoint that was given, at every number of ways."""
    plan = plan_of(choice)
    run = trained(bench, choice, plan)
    loaded = evaluate.load(run, bench.device)
    data = bench.load(**trained_with(loaded.config, loaded.data))
    parts = dict(zip(PARTS, (data.train, data.validation, data.test), strict=True))
    how = {"tasks": choice.tasks, "seed": scoring.FRESH_SEED}
    found = bench.scored("ways", run, how, lambda: _measure(bench, run, loaded.net, parts, choice.tasks))
    title, line = "Accuracy against the number of ways", told(loaded)
    if plan:
        line = subtitle(plan, loaded.data, choice.seed)
    curves = found["curves"]
    return Report(
        "ways",
        title,
        line,
        COLUMNS,
        list(_cells(curves)),
        [
            f"Accuracy in per cent on {choice.tasks:,} tasks each, with half the width of its 95% interval; 1-NN: the "
            "nearest neighbour on bare pixels, on the same tasks. Chance is 1 in the number of ways.",
            "Characters are from one alphabet or from all. Alphabets: how many of the training, validation and test "
            "part have so many characters.",
            "Training alphabets, by drawers that were trained on: the gap to the others is what was learnt by heart.",
            *notes(plan, loaded.data),
            *used([found]),
        ],
        about(plan, loaded.data, choice.seed, bench.device)
        | {"run": str(run), "tasks": choice.tasks, "curves": curves},
        lambda path: plot.ways(path, title, line, curves),
    )


def _measure(bench: Bench, run: Path, net: SiameseNet, parts: Mapping[str, Drawings], tasks: int) -> dict[str, Any]:
    curves = []
    for part in PARTS[:2]:
        output.say(f"Scoring on {part} alphabets")
        curves += list(_curves(bench, net, part, parts[part], tasks))
    output.say("Scoring on test alphabets")
    with uses.recorded(run, "test_tasks", "whetstone reproduce ways") as use:
        seen = list(_curves(bench, net, "test", parts["test"], tasks))
        at_20 = [p["accuracy"] for curve in seen for p in curve["points"] if p["way"] == 20 and not curve["across"]]
        use.score(at_20[0] if at_20 else seen[0]["points"][-1]["accuracy"], tasks)
    return {"curves": curves + seen, "test_uses": use.count}


def _curves(bench: Bench, net: SiameseNet, part: str, drawings: Drawings, tasks: int) -> Iterator[dict[str, Any]]:
    """Within alphabets and across them; all images are embedded once."""
    sizes = drawings.alphabet.bincount().tolist()
    plans = [(False, way) for way in within(max(sizes))]
    plans += [(True, way) for way in ACROSS if way <= len(drawings.characters)]
    drawn = [episode.draw(drawings, tasks, way, scoring.FRESH_SEED, across=across) for across, way in plans]
    right = evaluate.answer_each(net, drawings, drawn, interrupt=bench.interrupt)
    placed = drawings.to(bench.device)
    for across in (False, True):
        points = []
        for (crossing, way), asked, answers in zip(plans, drawn, right, strict=True):
            if crossing != across:
                continue
            if bench.interrupt():
                raise evaluate.Interrupted
            score = Score.of(answers)
            points.append(
                {
                    "way": way,
                    "accuracy": score.accuracy,
                    "interval": list(score.interval),
                    "nearest": baseline.nearest_neighbour(placed, asked) / tasks,
                    "alphabets": len(sizes) if across else sum(size >= way for size in sizes),
                }
            )
        yield {"part": part, "across": across, "points": points}


def within(largest: int) -> list[int]:
    """Ways within one alphabet: round numbers, and all the characters of the largest one."""
    return sorted({way for way in WITHIN if way <= largest} | {largest})


def _cells(curves: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for across in (False, True):
        points = {
            (curve["part"], point["way"]): point
            for curve in curves
            if curve["across"] == across
            for point in curve["points"]
        }
        for way in sorted({way for _, way in points}):
            row = ["all" if across else "one", str(way)]
            row.append(
                "/".join(str(points[part, way]["alphabets"]) if (part, way) in points else "0" for part in PARTS)
            )
            for part in PARTS:
                point = points.get((part, way))
                if point is None:
                    row += ["", ""]
                    continue
                low, high = point["interval"]
                row += [f"{100 * point['accuracy']:.1f} ±{50 * (high - low):.1f}", f"{100 * point['nearest']:.1f}"]
            yield row
