import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import episode, omniglot
from model.drawings import DataError, Drawings
from tests.unit import fake_omniglot
from tests.unit.test_model_pairs import make

REAL = os.environ.get("WHETSTONE_DATA")
needs_omniglot = pytest.mark.skipif(not REAL, reason="WHETSTONE_DATA is not set: no real Omniglot")


@pytest.fixture
def drawings() -> Drawings:
    return make((25, 12, 20, 40), drawers=4)


def test_a_task_shows_different_characters_of_one_alphabet_by_one_person_and_asks_by_another(
    drawings: Drawings,
) -> None:
    tasks = episode.draw(drawings, 3000, 20, seed=1)
    characters, drawers = tasks.support // 4, tasks.support % 4
    assert tasks.support.shape == (3000, 20)
    assert (characters.sort(1).values.diff(dim=1) > 0).all()
    alphabets = drawings.alphabet[characters]
    assert (alphabets == alphabets[:, :1]).all()
    assert (drawers == drawers[:, :1]).all()
    assert (tasks.query % 4 != drawers[:, 0]).all()
    assert torch.equal(characters.gather(1, tasks.target[:, None])[:, 0], tasks.query // 4)


def test_the_true_character_stands_anywhere_equally_often(drawings: Drawings) -> None:
    tasks = episode.draw(drawings, 20_000, 20, seed=2)
    assert torch.bincount(tasks.target, minlength=20).sub(1000).abs().max() < 160  # five standard deviations
    # And the support set is in no order that would give it away.
    assert tasks.support[:, 0].gt(tasks.support[:, 1]).float().mean().sub(0.5).abs() < 0.02


def test_all_characters_and_drawers_of_the_large_enough_alphabets_are_used_and_no_others(drawings: Drawings) -> None:
    tasks = episode.draw(drawings, 20_000, 20, seed=3)
    used = drawings.alphabet[tasks.query // 4]
    assert set(used.tolist()) == {0, 2, 3}
    assert torch.bincount(used)[[0, 2, 3]].sub(20_000 / 3).abs().max() < 400
    assert len(tasks.query.unique()) == (25 + 20 + 40) * 4
    assert len(tasks.support.unique()) == (25 + 20 + 40) * 4


def test_the_same_seed_gives_the_same_tasks_and_another_seed_others(drawings: Drawings) -> None:
    one, again, other = (episode.draw(drawings, 100, 5, seed) for seed in (7, 7, 8))
    assert torch.equal(one.query, again.query)
    assert torch.equal(one.support, again.support)
    assert torch.equal(one.target, again.target)
    assert not torch.equal(one.support, other.support)


def test_five_thousand_tasks_draw_in_well_under_a_second(drawings: Drawings) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        episode.draw(drawings, 5000, 20, seed=0)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5


def test_what_makes_no_task_is_refused_with_the_reason(drawings: Drawings) -> None:
    with pytest.raises(DataError, match=r"no alphabet has 41 characters .* the largest has 40"):
        episode.draw(drawings, 10, 41, seed=0)
    with pytest.raises(DataError, match="2 people"):
        episode.draw(make((30,), drawers=1), 10, 20, seed=0)
    for tasks, way in ((0, 20), (10, 1)):
        with pytest.raises(ValueError, match="at least"):
            episode.draw(drawings, tasks, way, seed=0)


def test_the_first_tasks_are_a_prefix(drawings: Drawings) -> None:
    tasks = episode.draw(drawings, 50, 5, seed=0)
    head = tasks.first(20)
    assert (len(head), head.way) == (20, 5)
    assert torch.equal(head.support, tasks.support[:20])


def test_lakes_runs_ask_each_item_against_the_twenty_classes_of_its_run(tmp_path: Path) -> None:
    drawings, tasks = episode.lake_runs(fake_omniglot.root(tmp_path), omniglot.SIDE)
    assert len(tasks) == 400
    assert tasks.way == 20
    flat = drawings.flat.numpy()
    for t in range(0, 400, 7):
        run, item = t // 20 + 1, t % 20 + 1
        shown = (7 * item + run) % 20 + 1
        assert fake_omniglot.number_of(flat[tasks.query[t]]) == 1000 * run + 100 + shown
        assert [fake_omniglot.number_of(flat[s]) for s in tasks.support[t]] == [1000 * run + k for k in range(1, 21)]
        assert tasks.target[t] == shown - 1


@needs_omniglot
def test_the_real_runs_pair_drawings_of_the_same_character() -> None:
    assert REAL is not None
    drawings, tasks = episode.lake_runs(Path(REAL), omniglot.SIDE)
    source = omniglot.find(Path(REAL), "images_evaluation")
    assert source is not None
    rows = {row.tobytes(): i // 20 for i, row in enumerate(omniglot.read(source))}
    packed = torch.from_numpy(np.packbits(drawings.flat.flatten(1).numpy() > 0, axis=1))
    character = [rows[row.numpy().tobytes()] for row in packed]
    true = tasks.support.gather(1, tasks.target[:, None])[:, 0]
    assert [character[q] for q in tasks.query] == [character[s] for s in true]
