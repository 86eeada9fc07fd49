import hashlib
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
    assert tasks.support.shape == (3000, 20, 1)
    characters, drawers = tasks.support[:, :, 0] // 4, tasks.support[:, :, 0] % 4
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


def test_frozen_tasks_stay_the_same_tasks(drawings: Drawings) -> None:
    """Trials of a study are compared on tasks that a later version must draw again."""
    tasks = episode.draw(drawings, 100, 20, seed=0)
    content = b"".join(part.contiguous().numpy().tobytes() for part in (tasks.query, tasks.support, tasks.target))
    assert hashlib.sha256(content).hexdigest() == "f5bb1ec44a469f74e2f012170616470fb9d7520e0a5be9aff3e089f1281c0b38"


def test_shots_are_further_drawings_by_further_people(drawings: Drawings) -> None:
    one, three = (episode.draw(drawings, 2000, 20, seed=1, shot=shot) for shot in (1, 3))
    assert (three.support.shape, three.shot, three.way) == ((2000, 20, 3), 3, 20)
    assert torch.equal(three.query, one.query)
    assert torch.equal(three.support[:, :, :1], one.support)
    assert (three.support // 4 == three.support[:, :, :1] // 4).all()
    people = torch.cat([three.support[:, 0] % 4, three.query[:, None] % 4], 1)
    assert (people.sort(1).values == torch.arange(4)).all()  # all four, each once
    two = episode.draw(drawings, 2000, 20, seed=1, shot=2).support[:, 0] % 4
    step = (two[:, 1] - two[:, 0]) % 4
    assert set(step.tolist()) == {1, 2, 3}  # the second is any of those left


def test_across_alphabets_any_characters_stand_side_by_side(
    drawings: Drawings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = episode.draw(drawings, 5000, 60, seed=1, across=True)
    characters = tasks.support[:, :, 0] // 4
    assert (characters.sort(1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(characters.flatten(), minlength=97)
    expected = 5000 * 60 / 97
    assert counts.sub(expected).abs().max() < 5 * (expected * (1 - 60 / 97)) ** 0.5
    assert torch.equal(characters.gather(1, tasks.target[:, None])[:, 0], tasks.query // 4)
    monkeypatch.setattr("model.episode._KEYS", 97 * 700)  # drawn in pieces, as millions of tasks are
    assert (
        (episode.draw(drawings, 5000, 60, seed=1, across=True).support[:, :, 0] // 4).sort(1).values.diff().gt(0).all()
    )


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
    with pytest.raises(DataError, match=r"tasks of 4 shots need drawings by at least 5 people, .* these are by 4"):
        episode.draw(drawings, 10, 20, seed=0, shot=4)
    with pytest.raises(DataError, match="97 characters in all, too few for a 98-way task"):
        episode.draw(drawings, 10, 98, seed=0, across=True)
    for tasks, way, shot in ((0, 20, 1), (10, 1, 1), (10, 20, 0)):
        with pytest.raises(ValueError, match="at least"):
            episode.draw(drawings, tasks, way, seed=0, shot=shot)


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
        assert [fake_omniglot.number_of(flat[s]) for s in tasks.support[t, :, 0]] == [
            1000 * run + k for k in range(1, 21)
        ]
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
    true = tasks.support[:, :, 0].gather(1, tasks.target[:, None])[:, 0]
    assert [character[q] for q in tasks.query] == [character[s] for s in true]
