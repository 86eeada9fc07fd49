"""A recorded update is the update: what a CUDA graph is made of, made here without one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import capture, optim, step
from model.capture import Captured, Replay, obstacle, rehearse
from model.checkpoint import Checkpoints
from model.init import initialise
from model.net import SiameseNet
from model.spec import TrainConfig, config
from model.step import Updates
from model.train import fit
from tests.unit.siamese import POINT, TINY, dataset

DATA = dataset()
PXK = {"batches": "pxk", "characters": 6, "drawings": 3, "alphabets": 2, "negatives": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, plain": {"distort": False},
    "sigmoid, bf16": {"precision": "bf16"},
    "sigmoid, elastic": {"elastic": 0.1, "strength": 1.5},
    "sigmoid, pxk": PXK,
    "sigmoid, fixed pairs": {"fixed_pairs": 20, "distorted_copies": 2},
    "sigmoid, batch norm": {"norm": "batch"},
    "adam": {"optimizer": "adam"},
    "cosine": {"schedule": "cosine", "epochs": 3},
    "contrastive": {"loss": "contrastive"},
    "contrastive, pxk": {"loss": "contrastive", "distance": "l1", **PXK},
    "triplet": {"loss": "triplet"},
    "triplet, semi-hard": {"loss": "triplet", "mining": "semi-hard"},
    "triplet, pxk": {"loss": "triplet", **PXK},
    "triplet, semi-hard, pxk": {"loss": "triplet", "mining": "semi-hard", "distance": "l1", **PXK},
    "softmax": {"loss": "softmax", **PXK},
    "softmax, l2": {"loss": "softmax", "distance": "l2", **PXK},
    "classes": {"loss": "classes", "classes": 21},
}


def on_cpu(update: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
    """A recording as on CUDA, but for the graph."""
    rehearse(update, changed)
    return update


def recipe(settings: dict[str, Any]) -> TrainConfig:
    point = {"eta": 1e-3, "mu": 0.9, "lambda": 1e-4} if settings.get("optimizer") == "adam" else POINT
    return config(point, {**TINY, **settings}, 0)


def prepared(
    recipe: TrainConfig, kind: type[Updates], device: str = "cpu", **named: Any
) -> tuple[SiameseNet, torch.optim.Optimizer, Updates]:
    net = SiameseNet(recipe.net)
    initialise(net, recipe.init, torch.Generator().manual_seed(0))
    net.on(device)
    optimizer = optim.optimizer(net, recipe, resident=True)
    bf16 = recipe.precision == "bf16"
    given = replace(DATA.train, images=DATA.train.images.to(device))
    updates = kind(net, optimizer, given, recipe, lambda _: torch.Generator().manual_seed(1), bf16=bf16, **named)
    return net, optimizer, updates


@pytest.mark.parametrize("name", RECIPES)
def test_replayed_updates_are_the_updates(name: str) -> None:
    """Bit for bit, over three epochs of the schedules; the rehearsal has left no trace."""
    chosen = recipe(RECIPES[name])
    runs = [prepared(chosen, Updates), prepared(chosen, Captured, record=on_cpu)]
    for number in range(9):
        losses = []
        for _, optimizer, updates in runs:
            optim.schedule(optimizer, chosen, number // 3)
            losses.append(updates.make(number, lambda: False).item())
        assert losses[0] == losses[1], number
    (net, optimizer, updates), (other, other_optimizer, captured) = runs
    for label, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[label], tensor), label
    remembered = optim.memory(other_optimizer, other, chosen)
    for label, tensor in optim.memory(optimizer, net, chosen).items():
        assert torch.equal(remembered[label], tensor), label
    assert torch.equal(captured.generator.get_state(), updates.generator.get_state())


class Rigid(TorchDispatchMode):
    """Refuses what no CUDA graph can hold: a number read back, a shape that depends on data, a copy across devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        indices = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else None
        if indices is None:
            bad = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
            assert not bad, f"{func} depends on data"
        else:
            assert all(index is None or index.dtype == torch.int64 for index in indices), f"{func} by a mask"
        result = func(*args, **named)
        if "copy" in str(func):
            assert len({tensor.device for tensor in (*args, result) if isinstance(tensor, Tensor)}) == 1, func
        return result


def rigidly(update: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
    rehearse(update, changed)  # which makes what is made once and kept
    with Rigid():
        update()
    return update


@pytest.mark.parametrize("name", RECIPES)
def test_an_update_reads_nothing_back_and_has_the_same_shapes_whatever_the_data(name: str) -> None:
    *_, captured = prepared(recipe(RECIPES[name]), Captured, record=rigidly)
    captured.make(0, lambda: False)


@pytest.mark.parametrize("name", [name for name in RECIPES if "bf16" not in name])
def test_an_update_touches_one_device_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's "meta" device stands for the other one: a tensor left on the CPU would not go together with it."""
    autocast = torch.autocast  # which does not know of "meta"
    monkeypatch.setattr(torch, "autocast", lambda device, *given, **named: autocast("cpu", *given, **named))
    *_, captured = prepared(recipe(RECIPES[name]), Captured, "meta", record=rigidly)
    for number in range(2):
        assert captured.make(number, lambda: False).device.type == "meta"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("name", RECIPES)
def test_a_cuda_graph_makes_the_updates_of_its_kernels(name: str) -> None:
    """The same losses over three epochs, but for the order in which the device adds; and it is a graph that does it."""
    chosen = recipe(RECIPES[name])
    (_, *eager), (_, *graph) = prepared(chosen, Updates, "cuda"), prepared(chosen, Captured, "cuda")
    for number in range(9):
        losses = []
        for optimizer, updates in (eager, graph):
            optim.schedule(optimizer, chosen, number // 3)
            losses.append(updates.make(number, lambda: False).clone())
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2 if "bf16" in name else 1e-3, atol=1e-4)
    assert not graph[1].refused


@needs_cuda
def test_a_run_on_cuda_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """As on a CPU, but for the last digits; what its health checks left pending is settled in the checkpoint."""
    chosen = recipe({"pairs_per_epoch": 1600, "epochs": 2})
    store = Checkpoints(tmp_path)
    left = iter([False] * 150)
    stopped = fit(chosen, DATA, lambda *_: None, device="cuda", store=store, interrupt=lambda: next(left, True))
    assert (stopped.outcome, store.read_last().step, store.read_last().tied_at) == ("stopped", 150, None)
    resumed = fit(chosen, DATA, lambda *_: None, device="cuda", store=store)
    whole = fit(chosen, DATA, lambda *_: None, device="cuda")
    assert resumed.outcome == whole.outcome == "complete"
    assert resumed.value == pytest.approx(whole.value, abs=0.25)


def test_where_nothing_can_be_recorded_updates_are_made_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(update: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
        rehearse(update, changed)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")

    chosen = recipe({})
    runs = [prepared(chosen, Updates), prepared(chosen, Captured, record=refuse)]
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            losses = [updates.make(number, lambda: False).item() for *_, updates in runs]
            assert losses[0] == losses[1]
    assert [record.message for record in caplog.records] == [
        "no CUDA graph, so updates are slower: CUDA error: operation not permitted when stream is capturing"
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))


def test_what_cannot_be_recorded_is_known_before() -> None:
    cuda = torch.device("cuda")
    assert obstacle(recipe({}), cuda) == ""
    assert "dropout" in obstacle(recipe({"dropout": 0.5, "fc": [8, 8]}), cuda)
    full = config(POINT, {"net": "paper", "batch_pairs": 65_536, "pairs_per_epoch": 65_536}, 0)
    assert "pieces" in obstacle(full, cuda)


def test_a_run_by_replays_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run on CUDA is put together, and stopped after each seventh question."""

    def replaying(*args: Any, **named: Any) -> Updates:
        return Captured(*args, **named, record=on_cpu)

    resident = optim.optimizer
    monkeypatch.setattr(capture, "updates", replaying)
    monkeypatch.setattr(optim, "optimizer", lambda net, recipe: resident(net, recipe, resident=True))
    chosen = recipe({})
    whole, broken = Checkpoints(tmp_path / "whole"), Checkpoints(tmp_path / "broken")
    fit(chosen, DATA, lambda epoch, metrics: None, store=whole)
    for _ in range(10):
        left = iter([False] * 7)
        result = fit(chosen, DATA, lambda e, m: None, store=broken, interrupt=lambda left=left: next(left, True))
        if result.outcome == "complete":
            break
    one, other = whole.read_last().tensors, broken.read_last().tensors
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_of_another_shape_are_our_own_bug() -> None:
    updates = prepared(recipe({}), Updates)[2]
    slots = step.Slots(updates._draw(0), torch.device("cpu"))
    larger = prepared(recipe({"batch_pairs": 10}), Updates)[2]._draw(0)
    with pytest.raises(AssertionError):
        slots.fill(larger)
