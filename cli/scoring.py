"""Scores that commands print: a checkpoint on fresh one-shot tasks, and what to compare it with.

Fresh means drawn with another seed than a study's own tasks have by default, so that choosing the best of many trials
by a noisy score flatters the chosen one less. The drawings are those of the same validation alphabets: what was tuned
on these alphabets stays tuned on them, and only test data says how it does on others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.drawings import Drawings

FRESH_SEED = 20150706
TASKS = 2000
WAY = 20


def row(correct: int, tasks: int) -> dict[str, Any]:
    """A score as JSON: accuracy, Wilson's 95% interval, tasks, right answers."""
    from model import baseline

    return {
        "accuracy": correct / tasks,
        "interval": list(baseline.interval(correct, tasks)),
        "tasks": tasks,
        "correct": correct,
    }


def score_checkpoint(
    folder: Path,
    drawings: Drawings,
    *,
    tasks: int = TASKS,
    way: int = WAY,
    seed: int = FRESH_SEED,
    device: str = "cpu",
) -> dict[str, Any]:
    """One-shot accuracy of a checkpoint on tasks over `drawings`. Raises CheckpointError, DataError."""
    from model import episode, evaluate

    net = evaluate.load(folder, device).net
    score = evaluate.one_shot(net, drawings, episode.draw(drawings, tasks, way, seed))
    return row(score.correct, score.tasks)


def score_baselines(
    drawings: Drawings, net_name: str, *, tasks: int = TASKS, way: int = WAY, seed: int = FRESH_SEED
) -> dict[str, Any]:
    """Chance, pixel 1-nearest neighbour and the untrained network, on the same tasks."""
    import torch

    from model import baseline, episode, evaluate, geometry, init
    from model.net import SiameseNet

    episodes = episode.draw(drawings, tasks, way, seed)
    net = SiameseNet(geometry.NETS[net_name])
    init.initialise(net, "he", torch.Generator().manual_seed(seed))
    return {
        "untrained": row(evaluate.one_shot(net, drawings, episodes).correct, tasks),
        "nearest_neighbour": row(baseline.nearest_neighbour(drawings, episodes), tasks),
        "chance": {"accuracy": baseline.chance(way)},
    }
