"""The paper's first table: are two drawings of one character? Six training sets, six networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli import plot, scoring, uses
from cli.reproduction_recipe import recipe
from cli.reproduction_report import Report, about, bounds, notes, percent, subtitle, used
from cli.reproduction_run import Bench, Choice
from model import evaluate, published, verification
from model.drawings import Drawings
from model.verification import Pairs

COLUMNS: tuple[str | tuple[str, str], ...] = (
    "training pairs",
    ("copies", "right"),
    ("the paper", "right"),
    ("ours", "right"),
    ("95% interval", "right"),
    ("AUC", "right"),
)


def reproduce(bench: Bench, choice: Choice) -> Report:
    """Train the six, choose each one's threshold on validation pairs, and judge the test pairs by it."""
    plans = []
    for row in published.VERIFICATION:
        sizes = {"fixed_pairs": row.pairs, "pairs_per_epoch": row.pairs, "distort": row.distorted}
        plans.append(recipe("koch2015-verification", choice.scale, seed=choice.seed, data=choice.data, **sizes))
    data = bench.data(plans[0].config)
    parts = (data.validation, data.test)
    known, unseen = (verification.draw(part, verification.PAPER_PAIRS, scoring.FRESH_SEED) for part in parts)
    rows: list[dict[str, Any]] = []
    for row, plan in zip(published.VERIFICATION, plans, strict=True):
        name = f"{row.pairs}-{'distorted' if row.distorted else 'plain'}"
        run = bench.train(plan.config, name)
        how = {"pairs": len(known), "seed": scoring.FRESH_SEED}
        found = bench.scored(name, run, how, lambda run=run: _judge(bench, run, parts, known, unseen))  # type: ignore[misc]
        copies = plan.config.distorted_copies if row.distorted else 0
        asked = {"pairs": row.pairs, "distorted": row.distorted, "paper": row.accuracy}
        rows.append({**asked, "trained_pairs": plan.config.fixed_pairs, "copies": copies, **found, "run": str(run)})
    similar = [verification.pixel_similarities(part, pairs) for part, pairs in zip(parts, (known, unseen), strict=True)]
    bare = verification.verify(similar[0], known, similar[1], unseen)
    pixels = {"accuracy": bare.test.accuracy, "interval": list(bare.test.interval), "auc": bare.auc}
    title, line = "Verification: are two drawings of one character?", subtitle(plans[-1], data.name, choice.seed)
    last = ["bare pixels", "", "", percent(bare.test.accuracy, 2), bounds(bare.test.interval, 2), f"{bare.auc:.4f}"]
    return Report(
        "verification",
        title,
        line,
        COLUMNS,
        [*(_cells(row) for row in rows), last],
        [
            f"Accuracy on {len(unseen):,} test pairs, half of them of one character: guessing gives 50%. Each "
            f"threshold was chosen on {len(known):,} validation pairs.",
            "Copies: distorted copies of each training pair that joined it; bare pixels are compared by their cosine.",
            f"The pairs repeat ({known.distinct:,} and {unseen.distinct:,} distinct), so the intervals are too narrow.",
            "A network is that of the epoch with the best one-shot validation accuracy, as in the paper.",
            f"The paper's figures: {published.KOCH.full}, table 1.",
            *notes(plans[-1], data.name),
            *used(rows),
        ],
        about(plans[-1], data.name, choice.seed, bench.device) | {"rows": rows, "pixels": pixels},
        lambda path: plot.verification(path, title, line, rows, pixels),
    )


def _judge(bench: Bench, run: Path, parts: tuple[Drawings, Drawings], known: Pairs, unseen: Pairs) -> dict[str, Any]:
    loaded = evaluate.load(run, bench.device)
    before = verification.similarities(loaded.net, parts[0], known, interrupt=bench.interrupt)
    with uses.recorded(run, "test_pairs", "whetstone reproduce verification") as use:
        after = verification.similarities(loaded.net, parts[1], unseen, interrupt=bench.interrupt)
        found = verification.verify(before, known, after, unseen)
        use.score(found.test.accuracy, found.test.tasks)
    return {
        "accuracy": found.test.accuracy,
        "interval": list(found.test.interval),
        "test_pairs": found.test.tasks,
        "validation_accuracy": found.validation.accuracy,
        "threshold": found.threshold,
        "auc": found.auc,
        "one_shot_validation": loaded.metrics.get("accuracy"),
        "test_uses": use.count,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    trained, whole = row["trained_pairs"], row["pairs"]
    return [
        f"{whole:,}" if trained == whole else f"{trained:,} for {whole:,}",
        str(row["copies"]),
        percent(row["paper"], 2),
        f"**{percent(row['accuracy'], 2)}**",
        bounds(row["interval"], 2),
        f"{row['auc']:.4f}",
    ]
