"""A trial is the same trial whether or not it was interrupted, and ends as it says it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import model.step
import model.train
from model import evaluate, strokes
from model.checkpoint import CheckpointError, Checkpoints, State
from model.drawings import DataError
from model.episode import draw
from model.spec import config
from model.train import FitResult, Signal, fit
from tests.unit.siamese import POINT, TINY, dataset, drawings

DATA = dataset()
TIMING = {"seconds", "pairs_per_s"}


class Listener:
    """Keeps what is reported, and answers with a signal at an epoch if told to."""

    def __init__(self, **signals: Signal) -> None:
        self.epochs: list[tuple[int, dict[str, float]]] = []
        self.signals = {int(epoch.removeprefix("at")): signal for epoch, signal in signals.items()}

    def __call__(self, epoch: int, metrics: dict[str, float]) -> Signal | None:
        self.epochs.append((epoch, {name: value for name, value in metrics.items() if name not in TIMING}))
        return self.signals.get(epoch)


class Crash(Exception):
    """The process dies here: nothing is saved any more."""


def after(questions: int, crash: bool = False) -> Callable[[], bool]:
    """An interrupt that comes at the given question."""
    left = questions

    def interrupt() -> bool:
        nonlocal left
        left -= 1
        if left < 0 and crash:
            raise Crash
        return left < 0

    return interrupt


def recipe(seed: int = 0, **settings: Any) -> Any:
    return config(POINT, {**TINY, **settings}, seed)


def weights(store: Checkpoints) -> dict[str, torch.Tensor]:
    return dict(store.read_last().tensors)


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def essence(result: FitResult) -> tuple[Any, ...]:
    return result.outcome, result.value, result.best_epoch, result.epochs, result.reason


def unbroken(folder: Path, **settings: Any) -> tuple[FitResult, Listener, Checkpoints]:
    store, listener = Checkpoints(folder), Listener()
    return fit(recipe(**settings), DATA, listener, store=store), listener, store


SHAPES: dict[str, dict[str, Any]] = {
    "ramp and distortion": {},
    "bf16": {"precision": "bf16"},
    "plain, no momentum at first": {"distort": False, "momentum_start": 0.0, "same_alphabet": False, "init": "paper"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_interrupted_at_any_step_it_resumes_bit_for_bit(tmp_path: Path, shape: str) -> None:
    """4 steps and an evaluation in each of 3 epochs: an interrupt at every question that is asked."""
    settings = SHAPES[shape]
    every = range(100) if not settings else [*range(1, 18, 4), 18]
    whole, heard, store = unbroken(tmp_path / "whole", **settings)
    assert whole.epochs == 3
    for questions in every:
        broken, listener = Checkpoints(tmp_path / f"{questions}"), Listener()
        stopped = fit(recipe(**settings), DATA, listener, store=broken, interrupt=after(questions))
        if stopped.outcome == "complete":
            break
        assert stopped.outcome == "stopped"
        resumed = fit(recipe(**settings), DATA, listener, store=broken)
        assert essence(resumed) == essence(whole)
        assert resumed.warnings == ()
        assert listener.epochs == heard.epochs
        assert identical(weights(broken), weights(store))
        assert identical(dict(broken.read_best().weights), dict(store.read_best().weights))
    assert questions == 3 * (4 + 2), "every step, and two questions in every evaluation"


def test_interrupted_over_and_over_it_still_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, heard, store = unbroken(tmp_path / "whole")
    broken, listener = Checkpoints(tmp_path / "broken"), Listener()
    for _ in range(100):
        result = fit(recipe(), DATA, listener, store=broken, interrupt=after(3))
        if result.outcome == "complete":
            break
    assert essence(result) == essence(whole)
    assert listener.epochs == heard.epochs
    assert identical(weights(broken), weights(store))


@pytest.mark.parametrize("questions", [6, 9, 12, 17])
def test_a_best_epoch_before_the_break_stays_the_best(tmp_path: Path, questions: int) -> None:
    """L2 so strong that it wears the network away: the first epoch is the best, and its weights are no later one's."""
    fading = config({"eta": 0.05, "mu": 0.0, "lambda": 2.0}, {**TINY, "momentum_start": 0.0}, 0)
    store, heard = Checkpoints(tmp_path / "whole"), Listener()
    whole = fit(fading, DATA, heard, store=store)
    assert whole.best_epoch == 0
    broken, listener = Checkpoints(tmp_path / "broken"), Listener()
    fit(fading, DATA, listener, store=broken, interrupt=after(questions))
    resumed = fit(fading, DATA, listener, store=broken)
    assert essence(resumed) == essence(whole)
    assert listener.epochs == heard.epochs
    assert identical(dict(broken.read_best().weights), dict(store.read_best().weights))
    assert not torch.equal(broken.read_best().weights["fc.weight"], weights(broken)["net.fc.weight"])


def test_an_interrupt_within_a_large_batch_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the full network takes many seconds on a slow core: it is worked off in pieces."""
    monkeypatch.setitem(model.step._PIECE_FLOPS, "cpu", 6 * recipe().net.flops * 3)
    whole, heard, store = unbroken(tmp_path / "whole")
    asked = set()
    for questions in [*range(16), 41, 42]:
        broken, listener = Checkpoints(tmp_path / f"{questions}"), Listener()
        stopped = fit(recipe(), DATA, listener, store=broken, interrupt=after(questions))
        if stopped.outcome == "complete":
            break
        asked.add((broken.read_last().epoch, broken.read_last().step))
        resumed = fit(recipe(), DATA, listener, store=broken)
        assert essence(resumed) == essence(whole)
        assert listener.epochs == heard.epochs
        assert identical(weights(broken), weights(store))
    assert questions == 3 * (4 * 3 + 2)
    assert asked == {(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 4)}


def test_a_batch_in_pieces_takes_the_step_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, whole = unbroken(tmp_path / "whole", epochs=1)
    monkeypatch.setitem(model.step._PIECE_FLOPS, "cpu", 6 * recipe().net.flops * 3)
    _, _, pieces = unbroken(tmp_path / "pieces", epochs=1)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("questions", [0, 1, 3, 5, 6, 11, 17])
def test_killed_at_any_step_it_resumes_from_its_last_checkpoint(tmp_path: Path, questions: int) -> None:
    """Nothing is saved at a kill; what was saved in passing gives the same end, and no epoch is left out."""
    whole, heard, store = unbroken(tmp_path / "whole", checkpoint_every_s=0)
    broken, listener = Checkpoints(tmp_path / "broken"), Listener()
    with pytest.raises(Crash):
        fit(recipe(checkpoint_every_s=0), DATA, listener, store=broken, interrupt=after(questions, crash=True))
    done = questions // 6 * 4 + min(questions % 6, 4)
    state, _ = broken.load_last()
    assert (state.epoch * 4 + state.step if state else 0) == done
    resumed = fit(recipe(checkpoint_every_s=0), DATA, listener, store=broken)
    assert essence(resumed) == essence(whole)
    assert listener.epochs == heard.epochs
    assert identical(weights(broken), weights(store))


def test_checkpoints_are_written_no_oftener_than_asked(tmp_path: Path) -> None:
    class Counting(Checkpoints):
        saved = 0

        def save_last(self, state: State) -> None:
            self.saved += 1
            super().save_last(state)

    every, rarely = Counting(tmp_path / "every"), Counting(tmp_path / "rarely")
    fit(recipe(checkpoint_every_s=0), DATA, Listener(), store=every)
    fit(recipe(checkpoint_every_s=3600), DATA, Listener(), store=rarely)
    assert every.saved == 3 * (4 + 1) + 1
    assert rarely.saved == 1, "at the end"


def test_a_seed_gives_the_same_trial_again_and_another_one_another(tmp_path: Path) -> None:
    _, one, first = unbroken(tmp_path / "1")
    _, again, second = unbroken(tmp_path / "2")
    other = Listener()
    fit(recipe(seed=2**32), DATA, other)
    zero = Listener()
    fit(recipe(seed=0), DATA, zero)
    assert one.epochs == again.epochs == zero.epochs
    assert identical(weights(first), weights(second))
    assert other.epochs != zero.epochs, "the upper half of a seed counts too"


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fit(recipe(epochs=1), DATA, Listener())
    assert torch.equal(before, torch.get_rng_state())


def test_a_report_says_what_the_plan_promises() -> None:
    heard: list[dict[str, float]] = []
    result = fit(recipe(), DATA, lambda epoch, metrics: heard.append(metrics))
    assert len(heard) == 3
    for metrics in heard:
        assert metrics.keys() == {"accuracy", "accuracy_320", "loss", "pairs_per_s", "seconds"}
        assert 0 <= metrics["accuracy"] <= 1
        assert metrics["loss"] > 0
        assert metrics["pairs_per_s"] > 0
    assert result.value == max(metrics["accuracy"] for metrics in heard)
    assert heard[-1]["seconds"] <= result.seconds


def test_the_paper_s_320_tasks_are_spread_over_all_of_them() -> None:
    assert model.train._spread(torch.arange(2000), 320).tolist() == [i * 2000 // 320 for i in range(320)]
    assert model.train._spread(torch.arange(40), 320).tolist() == list(range(40))


def test_the_best_epoch_is_kept_and_scores_what_was_reported(tmp_path: Path) -> None:
    result, heard, store = unbroken(tmp_path, epochs=12)
    accuracies = [metrics["accuracy"] for _, metrics in heard.epochs]
    assert result.value == max(accuracies)
    assert result.best_epoch == accuracies.index(max(accuracies))
    for path in (tmp_path, tmp_path / "best.safetensors", tmp_path / "best.json"):
        net, saved, metrics, _ = evaluate.load(path)
        assert saved == recipe(epochs=12)
        assert metrics["accuracy"] == result.value
        tasks = draw(DATA.validation, saved.validation_tasks, saved.way, saved.validation_seed)
        assert evaluate.one_shot(net, DATA.validation, tasks).accuracy == result.value
    net, _, metrics, _ = evaluate.load(tmp_path / "last.json")
    assert metrics["accuracy"] == accuracies[-1]
    assert torch.equal(net.fc.weight, weights(store)["net.fc.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    unbroken(tmp_path)
    best = Checkpoints(tmp_path).read_best()
    Checkpoints(tmp_path).save_best(
        type(best)(config(POINT, {**TINY, "fc": 9}, 0), best.epoch, best.metrics, best.weights)
    )
    with pytest.raises(CheckpointError, match="not those of the network"):
        evaluate.load(tmp_path)


def test_it_stops_when_patience_is_over() -> None:
    """With a rate too small to change an answer the first epoch stays the best."""
    point = {"eta": 1e-12, "mu": 0.5, "lambda": 0}
    settings = {**TINY, "epochs": 50, "patience": 4}
    heard = Listener()
    result = fit(config(point, settings, 0), DATA, heard)
    assert essence(result) == ("complete", heard.epochs[0][1]["accuracy"], 0, 5, "no better for 4 epochs")


def test_a_run_that_was_done_stays_done(tmp_path: Path) -> None:
    """Its worker died between the last epoch and telling of it."""
    whole, _, store = unbroken(tmp_path)
    listener = Listener()
    assert essence(fit(recipe(), DATA, listener, store=store)) == essence(whole)
    assert listener.epochs == []
    further = fit(recipe(epochs=4), DATA, listener, store=store)
    assert [epoch for epoch, _ in listener.epochs] == [3]
    assert further.epochs == 4


def test_told_to_stop_it_can_be_resumed(tmp_path: Path) -> None:
    whole, heard, _ = unbroken(tmp_path / "whole")
    store, listener = Checkpoints(tmp_path / "broken"), Listener(at1=Signal.STOP)
    assert fit(recipe(), DATA, listener, store=store).outcome == "stopped"
    assert essence(fit(recipe(), DATA, listener, store=store)) == essence(whole)
    assert listener.epochs == heard.epochs


def test_told_to_prune_it_ends_with_its_best_so_far() -> None:
    listener = Listener(at0=Signal.GO_ON, at1=Signal.PRUNE)
    result = fit(recipe(), DATA, listener)
    assert (result.outcome, result.epochs) == ("pruned", 2)
    assert result.value == max(metrics["accuracy"] for _, metrics in listener.epochs)


def test_max_seconds_end_a_run_with_what_it_has(tmp_path: Path) -> None:
    listener = Listener()
    result = fit(recipe(max_seconds=1e-6, epochs=50), DATA, listener, store=Checkpoints(tmp_path))
    assert (result.outcome, result.epochs) == ("complete", 1)
    assert "max_seconds" in result.reason
    assert len(listener.epochs) == 1
    assert Checkpoints(tmp_path).read_best().epoch == 0


@pytest.mark.parametrize("damage", ["half", "tensor", "other run", "other data", "contradiction"])
def test_a_checkpoint_that_cannot_be_used_is_told_of_and_the_run_starts_over(tmp_path: Path, damage: str) -> None:
    whole, heard, _ = unbroken(tmp_path / "whole")
    store = Checkpoints(tmp_path / "broken")
    fit(recipe(seed=1 if damage == "other run" else 0), DATA, Listener(), store=store, interrupt=after(8))
    state = store.read_last()
    if damage == "half":
        (store.folder / "last.safetensors").write_bytes(b"half")
    elif damage == "tensor":
        tensors = {**state.tensors, "net.fc.weight": torch.zeros(2, 2)}
        store.save_last(State(**{**vars(state), "tensors": tensors}))
    elif damage == "other data":
        assert state.data == DATA.name
        store.save_last(State(**{**vars(state), "data": "omniglot"}))
    elif damage == "contradiction":
        store.save_last(State(**{**vars(state), "epoch": 2}))
    listener = Listener()
    result = fit(recipe(), DATA, listener, store=store)
    assert essence(result) == essence(whole)
    assert listener.epochs == heard.epochs
    assert len(result.warnings) == 1
    assert "starting over" in result.warnings[0]


def test_lost_weights_of_the_best_epoch_are_told_of(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    fit(recipe(), DATA, Listener(), store=store, interrupt=after(8))
    (tmp_path / "best.json").unlink()
    (warning,) = fit(recipe(), DATA, Listener(), store=store).warnings
    assert "weights of the best epoch so far (0) are lost" in warning


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    store, faults = Checkpoints(tmp_path), []

    def second(epoch: int, metrics: dict[str, float]) -> None:
        try:
            fit(recipe(), DATA, Listener(), store=Checkpoints(tmp_path))
        except CheckpointError as fault:
            faults.append(str(fault))

    fit(recipe(epochs=1), DATA, second, store=store)
    assert len(faults) == 1
    assert "another run is training" in faults[0]


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="12 pixels a side, the data set has 16"):
        fit(recipe(), dataset(side=16), Listener())
    with pytest.raises(DataError, match="20-way"):
        fit(recipe(way=20), DATA, Listener())


def test_memory_that_runs_out_makes_a_point_infeasible() -> None:
    def exhausted(epoch: int, metrics: dict[str, float]) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    result = fit(recipe(), DATA, exhausted)
    assert result.outcome == "infeasible"
    assert result.reason.startswith("out of memory on cpu")


def test_an_exception_of_the_listener_s_is_not_swallowed() -> None:
    def broken(epoch: int, metrics: dict[str, float]) -> None:
        raise RuntimeError("the listener broke")

    with pytest.raises(RuntimeError, match="the listener broke"):
        fit(recipe(), DATA, broken)


def test_two_runs_in_two_threads_do_not_disturb_each_other() -> None:
    alone = Listener()
    fit(recipe(), DATA, alone)
    heard = [Listener(), Listener()]
    threads = [threading.Thread(target=fit, args=(recipe(), DATA, listener)) for listener in heard]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard[0].epochs == heard[1].epochs == alone.epochs


def test_the_mini_network_learns() -> None:
    data = strokes.generate(28)
    settings = {"net": "mini", "momentum_epochs": 0, "pairs_per_epoch": 2500, "epochs": 2, "batch_pairs": 64}
    settings["validation_tasks"] = 200
    listener = Listener()
    fit(config({"eta": 0.1, "mu": 0.9, "lambda": 1e-5}, settings, 0), data, listener)
    losses = [metrics["loss"] for _, metrics in listener.epochs]
    assert losses[1] < 0.6 < losses[0], "0.69 is to know nothing"


def test_drawings_can_be_told_apart() -> None:
    """Guards the tests above: on drawings that say nothing they could not fail."""
    assert drawings(1).images.float().std() > 0
