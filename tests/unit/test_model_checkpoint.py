"""A checkpoint is whole or refused, whatever happened while it was written and whoever wrote it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Best, CheckpointError, Checkpoints, State, open_checkpoint
from model.spec import config
from tests.unit.siamese import POINT, TINY

RECIPE = config(POINT, TINY, 7)


def state(epoch: int) -> State:
    tensors = {
        "net.fc.weight": torch.full((3, 2), float(epoch)),
        "generator": torch.Generator().manual_seed(epoch).get_state(),
        "loss_sum": torch.tensor(epoch / 3, dtype=torch.float64),
    }
    history = tuple({"accuracy": 0.1 * e} for e in range(epoch))
    return State(RECIPE, epoch, 2, 1.5, 0.5, 0 if epoch else None, 0.25 if epoch else None, None, history, tensors)


def same(one: State, other: State) -> bool:
    equal = all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors | other.tensors)
    return equal and replace(one, tensors={}) == replace(other, tensors={})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "new" / "folder")
    assert store.load_last() == (None, "")
    for epoch in (0, 1, 2):
        store.save_last(state(epoch))
        loaded, warning = store.load_last()
        assert loaded is not None
        assert same(loaded, state(epoch))
        assert warning == ""
    assert sorted(path.name for path in store.folder.iterdir()) == ["last.json", "last.safetensors"]


def test_the_best_carries_its_recipe_and_metrics(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save_best(Best(RECIPE, 4, {"accuracy": 0.5}, {"fc.weight": torch.ones(2)}))
    best = store.read_best()
    assert (best.config, best.epoch, best.metrics) == (RECIPE, 4, {"accuracy": 0.5})
    assert torch.equal(best.weights["fc.weight"], torch.ones(2))
    assert store.best_epoch() == 4
    for name in ("best.json", "best.safetensors", ""):
        assert isinstance(open_checkpoint(tmp_path / name), Best)


class PowerCut(BaseException):
    """Nothing after it happens."""


@pytest.mark.parametrize("survives", range(12))
@pytest.mark.parametrize("again", [False, True])
def test_a_power_cut_at_any_point_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int, again: bool
) -> None:
    """Every change of the folder (open for writing, rename, unlink) is one moment at which the power may fail."""
    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    left = survives

    def until_it_fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise PowerCut
            left -= 1
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_it_fails(os.replace))
        patch.setattr(os, "fsync", until_it_fails(os.fsync))
        patch.setattr(Path, "unlink", until_it_fails(Path.unlink))
        try:
            store.save_last(state(2))
            finished = True
        except PowerCut:
            finished = False
    if again and not finished:  # the next process meets what is left, and its power fails too
        left = survives
        with monkeypatch.context() as patch, contextlib.suppress(PowerCut):
            patch.setattr(os, "replace", until_it_fails(os.replace))
            patch.setattr(os, "fsync", until_it_fails(os.fsync))
            patch.setattr(Path, "unlink", until_it_fails(Path.unlink))
            store.save_last(state(2))
    loaded, warning = store.load_last()
    assert warning == ""
    assert loaded is not None
    assert same(loaded, state(2) if finished else state(loaded.epoch))
    assert loaded.epoch in (1, 2)
    store.save_last(state(3))
    assert same(store.read_last(), state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "last.safetensors"]


def test_the_moments_of_the_power_cut_cover_a_whole_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return real(*args, **kwargs)

        return step

    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    store.save_last(state(2))
    assert 5 <= count < 12


def test_a_half_written_or_flipped_weights_file_is_refused(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    path = tmp_path / "last.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damage in (whole[: len(whole) // 2], b"", flipped, whole + b"x"):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged or incomplete: its SHA-256"):
            store.read_last()
        loaded, warning = store.load_last()
        assert loaded is None
        assert "starting over" in warning
    path.unlink()
    with pytest.raises(CheckpointError, match="it is missing, though last"):
        store.read_last()


def test_a_half_written_json_is_refused(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    path = tmp_path / "last.json"
    whole = path.read_bytes()
    for damage in (whole[:-20], b"", b"[]", b"\xff\xfe", b"[" * 200_000, whole.replace(b"0.5", b"NaN", 1)):
        path.write_bytes(damage)
        assert damage != whole
        with pytest.raises(CheckpointError, match=r"last\.json is damaged"):
            store.read_last()
        assert store.load_last()[0] is None


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": True},
        {"step": 1.5},
        {"seconds": "long"},
        {"best_epoch": None},
        {"history": {}},
        {"history": [3]},
        {"history": [{"accuracy": "high"}]},
        {"config": {}},
        {"config": {"params": {}, "settings": {"net": "mini"}, "seed": 0}},
        {"sha256": None},
        {"whetstone": "recipe"},
        {"tied_at": "now"},
    ],
)
def test_a_json_that_says_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    edit(tmp_path / "last.json", **change)
    with pytest.raises(CheckpointError, match=r"last\.json is damaged"):
        store.read_last()


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    edit(tmp_path / "last.json", version=2)
    with pytest.raises(CheckpointError, match="another version; this Whetstone reads version 1"):
        store.read_last()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "best.safetensors", "last.safetensors/..", 7])
def test_a_json_cannot_point_at_another_file(tmp_path: Path, name: Any) -> None:
    outside = tmp_path / "secret.safetensors"
    store = Checkpoints(tmp_path / "trial")
    store.save_last(state(1))
    outside.write_bytes((store.folder / "last.safetensors").read_bytes())
    edit(store.folder / "last.json", weights=name)
    with pytest.raises(CheckpointError, match="does not name last"):
        store.read_last()


@pytest.mark.parametrize("name", ["last.json", "last.safetensors"])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path / "trial")
    store.save_last(state(1))
    os.replace(store.folder / name, tmp_path / name)
    (store.folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="symbolic link"):
        store.read_last()


def test_a_pickle_is_not_even_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    store = Checkpoints(tmp_path)
    store.save_last(state(1))
    torch.save({"net": Bomb()}, tmp_path / "last.safetensors")
    digest = hashlib.sha256((tmp_path / "last.safetensors").read_bytes()).hexdigest()
    edit(tmp_path / "last.json", sha256=digest)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        store.read_last()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nothing", "other.json", "last.pt"])
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "last.pt").write_text("")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    store.save_last(state(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.save_last(state(2))
    assert same(store.read_last(), state(1))


def test_metrics_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.save_best(Best(RECIPE, 0, {"accuracy": float("nan")}, {"fc.weight": torch.ones(2)}))
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    second = Checkpoints(tmp_path).locked()
    with Checkpoints(tmp_path).locked(), pytest.raises(CheckpointError, match="another run"):
        second.__enter__()
    with Checkpoints(tmp_path).locked():
        pass


def test_an_earlier_attempt_s_checkpoints_are_adopted_whole(tmp_path: Path) -> None:
    earlier, later = Checkpoints(tmp_path / "1"), Checkpoints(tmp_path / "2")
    earlier.save_last(state(2))
    earlier.save_best(Best(RECIPE, 1, {"accuracy": 0.5}, {"fc.weight": torch.ones(2)}))
    assert later.adopt(earlier.folder) == ""
    assert same(later.read_last(), state(2))
    assert later.read_best().epoch == 1
    earlier.save_last(state(3))
    later.adopt(earlier.folder)
    assert later.read_last().epoch == 2, "what a folder has of its own is newer"


def test_a_damaged_earlier_checkpoint_is_left_behind_with_its_reason(tmp_path: Path) -> None:
    earlier, later = Checkpoints(tmp_path / "1"), Checkpoints(tmp_path / "2")
    earlier.save_last(state(2))
    (earlier.folder / "last.safetensors").write_bytes(b"half")
    assert "SHA-256" in later.adopt(earlier.folder)
    assert later.load_last() == (None, "")
    assert later.adopt(tmp_path / "never was") == ""
