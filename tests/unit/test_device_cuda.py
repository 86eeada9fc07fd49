"""What can be known of the CUDA path on a machine without one: what is asked of torch, and of which device."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cuda as benchmark
from benchmarks.measure import Results
from model import capture, step, strokes
from model.capture import on_cuda
from model.net import SiameseNet
from model.optim import optimizer
from model.precision import autocast, wants_bf16
from model.spec import config
from model.step import Updates
from model.train import fit
from tests.unit.siamese import POINT, TINY, dataset, drawings
from workers import device
from workers.device import DeviceUnusable, candidates

PXK = {"batches": "pxk", "characters": 6, "drawings": 3, "alphabets": 2, "negatives": 2}


class Copies(TorchDispatchMode):
    """Notes every copy from one device to another, and whether it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten._to_copy.default and named.get("device", args[0].device) != args[0].device:
            self.blocking.append(not named.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.blocking.append(not (args[2] if len(args) > 2 else named.get("non_blocking", False)))
        return func(*args, **named)


@pytest.mark.parametrize("settings", [{}, {"fixed_pairs": 20}, {"loss": "triplet"}, PXK])
def test_a_batch_goes_to_the_device_in_two_transfers_that_nobody_waits_for(settings: dict[str, Any]) -> None:
    """Drawings on another device (here torch's "meta"): the numbers of a batch follow them there, whatever it is."""
    recipe = config(POINT, {**TINY, **settings}, 0)
    there = replace(drawings(1), images=drawings(1).images.to("meta"))
    net = SiameseNet(recipe.net)
    optim = optimizer(net, recipe)
    updates = Updates(net, optim, there, recipe, lambda _: torch.Generator().manual_seed(0), bf16=False)
    with Copies() as copies:
        batch = updates._placed(updates._draw(0))
    assert copies.blocking == [False] * 2
    assert {tensor.device.type for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)} == {"meta"}


def test_what_is_left_in_fp32_on_cuda_is_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lets convolutions take TF32 unless told otherwise, forwards and backwards."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: contextlib.nullcontext())
    try:
        for backend in backends:
            backend.allow_tf32 = True
        with autocast(torch.device("cpu"), False):
            assert [backend.allow_tf32 for backend in backends] == [True, True]
        with autocast(torch.device("cuda"), False):
            assert [backend.allow_tf32 for backend in backends] == [False, False]
            assert "tf32" not in (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class Cuda:
    """Stands for torch.cuda, and notes what is asked of it: which stream is current, and what is done on it."""

    def __init__(self, fails: bool = False) -> None:
        self.current, self.heard, self.fails = "first", list[str](), fails

    def current_stream(self, device: Any = None) -> Any:
        return self._named(self.current)

    def Stream(self) -> Any:
        return self._named("side")

    def _named(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.heard.append(f"{name} waits for {other.name}"))

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.heard.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch's, it leaves its stream behind where the recording fails."""
        before, self.current = self.current, stream.name
        self.heard.append("recording")
        yield
        if self.fails:
            raise RuntimeError("CUDA error: capture invalidated")
        self.heard.append("recorded")
        self.current = before


def test_an_update_is_rehearsed_on_a_side_stream_then_recorded_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that PyTorch's notes on CUDA graphs ask for; what the rehearsal changed is as it was."""
    cuda, weight = Cuda(), torch.ones(3, requires_grad=True)
    for name in ("current_stream", "Stream", "device", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def update() -> None:
        cuda.heard.append(f"update on {cuda.current}")
        if "recording" not in cuda.heard:  # kernels that are recorded do not run
            weight.data.add_(1.0)

    replay = on_cuda(update, [weight])
    replay()
    around = ["side waits for first", *["update on side"] * 3, "first waits for side"]
    assert cuda.heard == [*around, "recording", "update on side", "recorded", "replay"]
    assert weight.tolist() == [1.0] * 3
    assert cuda.current == "first"


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(fails=True)
    for name in ("current_stream", "Stream", "device", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    with pytest.raises(RuntimeError, match="invalidated"):
        on_cuda(lambda: None, [torch.ones(1)])
    assert cuda.current == "first"


def test_a_run_that_is_out_of_memory_leaves_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its recording fails for it or an update: the trial is infeasible with its reason, its memory is free."""
    seen: list[weakref.ref[torch.Tensor]] = []
    calls = [0]

    def starved(*given: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > 3:  # the recording, then an update, then no more
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")
        return real(*given)

    def recorded(update: Callable[[], None], changed: Sequence[torch.Tensor]) -> Callable[[], None]:
        seen.append(weakref.ref(changed[0]))
        update()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def updates(*given: Any, **named: Any) -> Updates:
        return capture.Captured(*given, **named, record=recorded)

    real = step.loss
    monkeypatch.setattr(step, "loss", starved)
    monkeypatch.setattr(capture, "updates", updates)
    result = fit(config(POINT, TINY, 0), dataset(), lambda epoch, metrics: None)
    assert result.outcome == "infeasible"
    assert result.reason == "out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert calls == [4]
    gc.collect()
    assert [kept() for kept in seen] == [None]


def test_bf16_is_asked_of_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with an old and a new GPU the current device is the first, whichever of them is ours."""
    current = [0]

    @contextlib.contextmanager
    def chosen(wanted: torch.device) -> Iterator[None]:
        current[0] = wanted.index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[0] == 1)
    assert wants_bf16("auto", torch.device("cuda:1"))
    assert not wants_bf16("auto", torch.device("cuda:0"))


def pretend(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    about = [SimpleNamespace(uuid=uuid, name="a GPU", total_memory=2**30) for uuid in uuids]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about[index])


def test_a_gpu_is_known_by_its_uuid_however_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES renumbers the devices; their UUIDs stay. Without one a name counts within its host."""
    pretend(monkeypatch, "aaaa", "bbbb", "")
    assert [(found.name, found.id) for found in candidates("auto")] == [
        ("cuda:0", "GPU-aaaa"),
        ("cuda:1", "GPU-bbbb"),
        ("cuda:2", "cuda:2"),
    ]
    assert [found.id for found in candidates("cuda:1")] == ["GPU-bbbb"]


def test_a_gpu_that_fell_off_the_bus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "aaaa")

    def gone(index: int) -> None:
        raise RuntimeError("CUDA error: device unavailable\nCompile with TORCH_USE_CUDA_DSA ...")

    monkeypatch.setattr(torch.cuda, "get_device_properties", gone)
    with pytest.raises(DeviceUnusable, match="nvidia-smi") as caught:
        candidates("auto")
    assert "\n" not in str(caught.value)


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "NVIDIA", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert candidates("auto")[0].name == "cpu"
        assert not caplog.text
        (tmp_path / "0000:01:00.0").mkdir()
        assert candidates("auto")[0].name == "cpu"
    assert "cannot use" in caplog.text


def test_the_benchmark_of_a_device_that_is_not_there_has_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main(["--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["figures"] == []
    assert written["device"] is None
    assert "no CUDA device" in written["skipped"]["cuda_full_pairs_per_s"]


def test_the_benchmark_s_parts_run_and_say_what_is_worth_keeping() -> None:
    """On the CPU, as small as they go: their figures mean nothing."""

    def replaying(*given: Any, **named: Any) -> Updates:
        return capture.Captured(*given, **named, record=lambda update, changed: update)

    results, cpu, data = Results(), torch.device("cpu"), strokes.generate(28, shape=strokes.SMALL)
    benchmark.kernel_by_kernel_and_as_a_graph(results, benchmark.QUICK, cpu, lambda size: data, replaying)
    assert [figure.name for figure in results.figures] == ["cuda_mini_pairs_per_s"]
    assert next(figure.value for figure in results.also if figure.name == "mini_16_loss_gap") == 0.0
    found = benchmark.streams(benchmark.QUICK, cpu, data, replaying)
    assert found.keys() == {1, 2}
    benchmark.together(results, "streams", {1: 100.0, 2: 160.0, 4: 120.0})
    assert (results.figures[-1].value, results.figures[-1].note) == (1.6, "2 at once; worth keeping")
    answers: queue.SimpleQueue[float] = queue.SimpleQueue()
    benchmark._fit(benchmark.QUICK, "cpu", threading.Barrier(1), answers, 0)
    assert answers.get() > 0
