"""What can be known of the CUDA path on a machine without one: what is asked of torch, and of which device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.distortion import distort
from model.pairs import PairSampler
from model.precision import wants_bf16
from tests.unit.siamese import drawings
from workers import device
from workers.device import DeviceUnusable, candidates


class Copies(TorchDispatchMode):
    """Notes every copy from one device to another, and whether it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten._to_copy.default and named.get("device", args[0].device) != args[0].device:
            self.blocking.append(not named.get("non_blocking", False))
        return func(*args, **named)


def test_a_training_step_never_waits_for_the_device() -> None:
    """Drawings on another device (here torch's "meta"): what a batch needs is copied there without waiting."""
    there = drawings(1).to("meta")
    sampler = PairSampler(drawings(1), 8)
    sampler.device = torch.device("meta")
    generator = torch.Generator().manual_seed(0)
    with Copies() as copies:
        sampler.draw(generator)
        distort(there.flat, generator)
    assert copies.blocking == [False] * 4


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
