"""How sure an accuracy is, and whether two networks that answered the same tasks differ by more than noise.

Tasks are the sample: an interval says where the accuracy on all tasks of this kind would lie. It does not speak of
other seeds of the same hyperparameters, nor of the favour that the best of many trials has had. Answers are packed bits
(`hpo.protocol.TaskAnswers`), so a million tasks are counted in a millisecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""Of 95%."""
LEVEL = 0.05
"""A difference is more than noise where noise alone would give one like it less often than this."""


@dataclass(frozen=True)
class Paired:
    """Tasks that both answered rightly, only one of them, or neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def tasks(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of a less that of b."""
        return (self.only_a - self.only_b) / self.tasks


def count(bits: bytes) -> int:
    """Tasks answered rightly."""
    return int.from_bytes(bits, "big").bit_count()


def pair(a: bytes, b: bytes, tasks: int) -> Paired:
    """Lay two sets of answers to the same `tasks` side by side.

    >>> pair(bytes([0b11010000]), bytes([0b10110000]), 4)
    Paired(both=2, only_a=1, only_b=1, neither=0)
    """
    assert len(a) == len(b) == (tasks + 7) // 8, "the answers are of other tasks"
    first, second = int.from_bytes(a, "big"), int.from_bytes(b, "big")
    both, only_a, only_b = ((first & second).bit_count(), (first & ~second).bit_count(), (second & ~first).bit_count())
    return Paired(both, only_a, only_b, tasks - both - only_a - only_b)


def interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95% (1927): never outside [0, 1], sound near 0 and 1."""
    p = correct / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # At the ends the bound is exact: rounding must not leave 0 of n outside of its own interval.
    return (0.0 if correct == 0 else max(0.0, middle - reach)), (1.0 if correct == n else min(1.0, middle + reach))


def difference_interval(found: Paired) -> tuple[float, float]:
    """The 95% interval of the difference between two proportions of the same tasks.

    Wald's, with half a task added to each of the four counts (Agresti and Min 2005, "Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24), which keeps its 95% in small samples too.
    """
    n, b, c = found.tasks + 2, found.only_a + 0.5, found.only_b + 0.5
    middle = (b - c) / n
    reach = Z * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: the p-value of so uneven a split of the tasks on which the two differ.

    If neither is better each such task falls to either with probability 1/2 (McNemar 1947; exact: the binomial law).
    """
    n, few = only_a + only_b, min(only_a, only_b)
    if 2 * few == n:
        return 1.0
    term = total = math.exp(math.lgamma(n + 1) - math.lgamma(few + 1) - math.lgamma(n - few + 1) - n * math.log(2))
    for k in range(few, 0, -1):  # from the largest term down: P(k - 1) = P(k) k / (n - k + 1)
        term *= k / (n - k + 1)
        if term < total * 1e-17:
            break
        total += term
    return min(1.0, 2 * total)


def verdict(found: Paired, a: str, b: str) -> str:
    """One sentence for people; `a` and `b` name the two."""
    if found.only_a == found.only_b:
        return f"No difference: {a} and {b} are right on equally many of the {found.tasks:,} tasks."
    ahead, behind, sign = (a, b, 1) if found.only_a > found.only_b else (b, a, -1)
    low, high = sorted(100 * sign * end for end in difference_interval(found))
    p = mcnemar(found.only_a, found.only_b)
    name = ahead[:1].upper() + ahead[1:]
    by = f"{name} is {_points(100 * abs(found.difference))} points ahead of {behind}"
    sure = f"95% interval {_points(low)} to {_points(high)}, p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}"
    word = "more than noise" if p < LEVEL else "no more than noise would give"
    return f"{by} on the same {found.tasks:,} tasks ({sure}): {word}."


def _points(value: float) -> str:
    """Points with one decimal, or as many more as a small one needs to be told from none."""
    return f"{value:.1f}" if abs(value) >= 0.05 or value == 0 else f"{value:.2g}"
