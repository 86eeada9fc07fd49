import os
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from model import baseline, episode
from model.drawings import Drawings
from model.episode import Episodes

REAL = os.environ.get("WHETSTONE_DATA")


def pictures(*rows: list[int]) -> Drawings:
    images = torch.tensor(rows, dtype=torch.uint8).view(len(rows), 1, 2, 2)
    return Drawings(images, torch.zeros(len(rows), dtype=torch.int64), ("A",), tuple(f"c{i}" for i in range(len(rows))))


def one(query: int, support: list[int], target: int) -> Episodes:
    return Episodes(torch.tensor([query]), torch.tensor([support])[:, :, None], torch.tensor([target]))


def test_the_nearest_support_image_answers() -> None:
    drawings = pictures([255, 200, 0, 0], [0, 0, 255, 255], [255, 255, 0, 0], [0, 255, 255, 0])
    assert baseline.nearest_neighbour(drawings, one(0, [1, 2, 3], target=1)) == 1
    assert baseline.nearest_neighbour(drawings, one(0, [1, 2, 3], target=0)) == 0


def test_the_nearest_of_several_drawings_answers_and_two_of_the_true_one_are_no_tie() -> None:
    drawings = pictures([255, 200, 0, 0], [0, 0, 255, 255], [255, 255, 0, 0], [0, 255, 255, 0], [255, 255, 0, 0])
    tasks = Episodes(torch.tensor([0]), torch.tensor([[[1, 3], [2, 4]]]), torch.tensor([1]))
    assert baseline.nearest_neighbour(drawings, tasks) == 1
    split = Episodes(torch.tensor([0]), torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([1]))
    assert baseline.nearest_neighbour(drawings, split) == 0


def test_a_tie_is_wrong_wherever_the_true_one_stands() -> None:
    same = [255, 255, 0, 0]
    drawings = pictures(same, same, same, [0, 255, 0, 255], [0, 0, 0, 0])
    for target in (0, 1):
        assert baseline.nearest_neighbour(drawings, one(0, [1, 2, 3], target)) == 0
        assert baseline.nearest_neighbour(drawings, one(4, [1, 3, 4], target)) == 0  # an empty query is like nothing


def test_more_tasks_than_fit_in_one_piece_are_all_counted() -> None:
    drawings = pictures([255, 0, 0, 0], [0, 255, 0, 0], [250, 5, 0, 0])
    tasks = Episodes(
        torch.full((300,), 2), torch.tensor([[[0], [1]]]).expand(300, 2, 1), torch.arange(300).remainder(3).clamp_max(1)
    )
    assert baseline.nearest_neighbour(drawings, tasks) == 100


@pytest.mark.skipif(not REAL, reason="WHETSTONE_DATA is not set: no real Omniglot")
def test_lakes_400_tasks_give_the_published_figure_of_the_nearest_neighbour() -> None:
    assert REAL is not None
    drawings, tasks = episode.lake_runs(Path(REAL), 105)
    assert baseline.nearest_neighbour(drawings, tasks) == 87  # 21.7%


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (1100, 2000), (87, 400)])
def test_the_interval_is_wilsons(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert baseline.interval(successes, n) == pytest.approx(tuple(expected), abs=1e-12)


def test_the_interval_holds_the_truth_19_times_of_20() -> None:
    n, p = 2000, 0.22
    counts = torch.distributions.Binomial(n, torch.tensor(p)).sample((4000,)).int().tolist()
    held = sum(low <= p <= high for low, high in (baseline.interval(k, n) for k in counts))
    assert held / 4000 == pytest.approx(0.95, abs=0.015)


def test_without_a_trial_nothing_is_known_and_nonsense_is_refused() -> None:
    assert baseline.interval(0, 0) == (0.0, 1.0)
    for successes, n in ((3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes of"):
            baseline.interval(successes, n)
    assert baseline.chance(20) == 0.05
