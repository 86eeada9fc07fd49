"""The statistics of two trials on the same tasks, against counting by hand, SciPy and published figures."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import binomtest

from hpo import comparison
from hpo.comparison import Paired, difference_interval, interval, mcnemar, pair, verdict


def packed(right: list[bool]) -> bytes:
    return np.packbits(np.array(right)).tobytes()


@pytest.mark.parametrize("tasks", [1, 7, 8, 9, 320, 2000])
def test_every_task_is_counted_where_it_belongs(tasks: int) -> None:
    draw = random.Random(tasks)
    a = [draw.random() < 0.7 for _ in range(tasks)]
    b = [draw.random() < 0.5 for _ in range(tasks)]
    found = pair(packed(a), packed(b), tasks)
    sides = list(zip(a, b, strict=True))
    kinds = ((True, True), (True, False), (False, True), (False, False))
    assert found == Paired(*(sides.count(kind) for kind in kinds))
    assert found.tasks == tasks
    assert comparison.count(packed(a)) == sum(a)
    assert found.difference == pytest.approx((sum(a) - sum(b)) / tasks)


def test_the_p_value_is_the_exact_binomial_one() -> None:
    for only_a, only_b in [(0, 0), (1, 0), (0, 6), (5, 5), (9, 2), (121, 59), (200, 230), (3000, 2800)]:
        expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
        assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9), (only_a, only_b)
        assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)
    assert mcnemar(1_000_000, 0) == 0.0
    assert 0.0 < mcnemar(500_500, 499_500) < 1.0


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    for correct, n in [(0, 20), (20, 20), (1, 1), (263, 320), (1426, 2000)]:
        expected = binomtest(correct, n).proportion_ci(method="wilson")
        assert interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
        low, high = interval(correct, n)
        assert low <= correct / n <= high


def test_the_interval_of_a_difference_is_that_of_agresti_and_min() -> None:
    # With half a task added to each count: n 22, b 8.5, c 1.5; (8.5 - 1.5) / 22, and its standard error.
    low, high = difference_interval(Paired(6, 8, 1, 5))
    middle, reach = 7 / 22, 1.959964 * (10 - 49 / 22) ** 0.5 / 22
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=1e-6)
    swapped = difference_interval(Paired(6, 1, 8, 5))
    assert swapped == pytest.approx((-high, -low))
    assert difference_interval(Paired(0, 1, 0, 0))[1] == 1.0


def test_the_interval_of_a_difference_covers_it_in_19_of_20_samples() -> None:
    draw = np.random.default_rng(5)
    shares = np.array([0.6, 0.13, 0.09, 0.18])
    tries = [Paired(*map(int, row)) for row in draw.multinomial(320, shares, 4000)]
    covered = sum(low <= 0.04 <= high for low, high in map(difference_interval, tries)) / len(tries)
    assert 0.94 < covered < 0.96


def test_the_sentence_says_who_is_ahead_and_whether_it_is_noise() -> None:
    ahead = verdict(Paired(1300, 121, 59, 520), "trial 3", "trial 7")
    assert ahead.startswith(
        "Trial 3 is 3.1 points ahead of trial 7 on the same 2,000 tasks (95% interval 1.8 to 4.4, p "
    )
    assert ahead.endswith(": more than noise.")
    behind = verdict(Paired(1300, 59, 121, 520), "trial 3", "trial 7")
    assert behind == ahead.replace("Trial 3", "Trial 7").replace("of trial 7", "of trial 3")
    noise = verdict(Paired(1300, 90, 80, 530), "trial 3", "trial 7")
    assert noise.endswith("p = 0.49): no more than noise would give.")
    assert "equally many of the 4 tasks" in verdict(Paired(2, 1, 1, 0), "trial 3", "trial 7")
