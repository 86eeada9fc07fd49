"""The four problems on which searches are compared; all are maximized, and each stands in for something that trains.

Promise: `evaluate` costs a millisecond at most, and tells what a study would be told (`value`, with noise where the
real thing has some) apart from how good the point is (`truth`). A point that diverges is infeasible and counts as
`worst`, as the coordinator counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import forest
from benchmarks.trainings import CHANCE, DIMENSIONS, GROUPS, RANGES, Training, read

LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc", "output")
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """What came of a point."""

    value: float
    truth: float
    feasible: bool = True


@dataclass(frozen=True)
class Problem:
    """A search space, as a study's document writes it, and what becomes of its points."""

    name: str
    space: list[dict[str, Any]]
    evaluate: Callable[[Point, np.random.Generator], Told]


def hartmann() -> Problem:
    """Three Hartmann functions of six dimensions each, added; the maximum is 9.967."""
    weights = np.array([1.0, 1.2, 3.0, 3.2])
    scales = np.array(
        [
            [10, 3, 17, 3.5, 1.7, 8],
            [0.05, 10, 17, 0.1, 8, 14],
            [3, 3.5, 1.7, 10, 17, 8],
            [17, 8, 0.05, 10, 0.1, 14],
        ]
    )
    centres = 1e-4 * np.array(
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ]
    )

    def evaluate(point: Point, rng: np.random.Generator) -> Told:
        x = np.array([point[f"x{place}"] for place in range(18)]).reshape(3, 1, 6)
        value = float((weights * np.exp(-(scales * (x - centres) ** 2).sum(axis=-1))).sum())
        return Told(value, value)

    return Problem("hartmann", [_float(f"x{place}", 0.0, 1.0) for place in range(18)], evaluate)


def levy() -> Problem:
    """Levy's function of 18 dimensions, upside down, its maximum of 0 moved away from the middle."""
    shift = np.random.default_rng(18).uniform(-5.0, 5.0, 18)

    def evaluate(point: Point, rng: np.random.Generator) -> Told:
        x = np.array([point[f"x{place}"] for place in range(18)]) - shift
        w = 1 + x / 4  # its maximum is where w is 1
        inner = (w[:-1] - 1) ** 2 * (1 + 10 * np.sin(math.pi * w[:-1] + 1) ** 2)
        last = (w[-1] - 1) ** 2 * (1 + np.sin(2 * math.pi * w[-1]) ** 2)
        value = -float(np.sin(math.pi * w[0]) ** 2 + inner.sum() + last)
        return Told(value, value)

    return Problem("levy", [_float(f"x{place}", -10.0, 10.0) for place in range(18)], evaluate)


def diverging() -> Problem:
    """Rates of six layers, nine tenths of whose points diverge: where any layer's eta / (1 - mu) is above its limit.

    The best rates lie not far below the limits, which differ from layer to layer; mu and lambda have their best too.
    The middle of the space diverges.
    """
    limits = np.array([-0.2, -1.0, 0.2, -0.6, -1.4, 0.6])  # log10 of eta / (1 - mu)
    rates = limits - np.array([0.3, 0.5, 0.4, 0.2, 0.3, 0.4])
    decays, momenta = np.array([-5.5, -3.5, -4.5, -5.0, -3.0, -4.0]), np.array([0.9, 0.5, 0.7, 0.4, 0.8, 0.6])

    def evaluate(point: Point, rng: np.random.Generator) -> Told:
        eta, mu, decay = (np.array([point[f"{name}[{each}]"] for each in LAYERS]) for name in ("eta", "mu", "lambda"))
        rate = np.log10(eta / (1 - mu))
        if (rate > limits).any():
            return Told(CHANCE, CHANCE, feasible=False)
        miss = (rate - rates) ** 2 + 0.15 * (np.log10(decay) - decays) ** 2 + (mu - momenta) ** 2
        value = CHANCE + (0.95 - CHANCE) * math.exp(-0.8 * float(miss.mean()))
        return Told(value, value)

    labels = list(LAYERS)
    space = [
        _float("eta", 1e-3, 1.0, log=True, labels=labels),
        _float("mu", 0.0, 0.99, labels=labels),
        _float("lambda", 1e-6, 1e-1, log=True, labels=labels),
    ]
    return Problem("diverging", space, evaluate)


def trainings() -> Problem:
    """Recorded trainings of the small network: a forest's mean, with the noise between seeds."""
    recorded = read()
    rows = _rows([one.params for one in recorded])
    value = forest.fit(rows, _values(recorded), columns=COLUMNS)
    deviation = noise(recorded)

    def evaluate(point: Point, rng: np.random.Generator) -> Told:
        given = _rows(
            [{name: point[f"{name[: -len(g) - 1]}[{g}]"] for name, g in zip(DIMENSIONS, _CYCLE, strict=True)}]
        )
        truth = float(value.predict(given)[0])
        return Told(truth + deviation * float(rng.standard_normal()), truth)

    space = [_float(name, low, high, log=log, labels=list(GROUPS)) for name, (low, high, log) in RANGES.items()]
    return Problem("trainings", space, evaluate)


COLUMNS = 4
"""Of those of the forest's rows that a split chooses from."""
_CYCLE = [group for _ in RANGES for group in GROUPS]


def _rows(points: Sequence[Mapping[str, float]]) -> forest.Floats:
    """Points as the forest sees them: on their scales, and beside them the logarithm of each group's eta / (1 - mu)."""
    columns = []
    for name, (_, _, log) in RANGES.items():
        for group in GROUPS:
            values = np.array([point[f"{name}_{group}"] for point in points])
            columns.append(np.log10(values) if log else values)
    for group in GROUPS:
        eta, mu = (np.array([point[f"{name}_{group}"] for point in points]) for name in ("eta", "mu"))
        columns.append(np.log10(eta / (1 - mu)))
    return np.stack(columns, axis=1)


def _values(recorded: Sequence[Training]) -> forest.Floats:
    """What a study would hold: a failed training counts at chance."""
    return np.array([CHANCE if one.outcome == "infeasible" else one.value for one in recorded], dtype=float)


def noise(recorded: Sequence[Training]) -> float:
    """The standard deviation between seeds of the same point, pooled over the points that were repeated."""
    by_point: dict[int, list[float]] = {}
    for one in recorded:
        if one.outcome == "complete" and one.value is not None:
            by_point.setdefault(one.point, []).append(one.value)
    groups = [np.array(values) for values in by_point.values() if len(values) > 1]
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return math.sqrt(squares / sum(len(values) - 1 for values in groups))


def held_out(recorded: Sequence[Training], folds: int = 10) -> float:
    """R2 of the forest on points that it has not seen: each point stands in one of `folds`, with all its seeds."""
    rows, values = _rows([one.params for one in recorded]), _values(recorded)
    places = np.random.default_rng(0).permutation(max(one.point for one in recorded) + 1)
    fold = np.array([places[one.point] % folds for one in recorded])
    predicted = np.empty_like(values)
    for each in range(folds):
        seen = fold != each
        predicted[~seen] = forest.fit(rows[seen], values[seen], columns=COLUMNS).predict(rows[~seen])
    return 1.0 - float(((values - predicted) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def _float(name: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "float", "low": low, "high": high, **more}


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "hartmann": hartmann,
    "levy": levy,
    "diverging": diverging,
    "trainings": trainings,
}
