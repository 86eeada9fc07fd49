"""Which device a worker trains on, and what the machine has.

"auto" asks the coordinator for a CUDA device of its own among those the machine shows, by UUID, so that two workers
on one machine (or in two of its containers) never share one by accident; a machine without CUDA trains on its CPU.
Workers that are to share one, for trials too small to fill it, are each started with its name, `--device cuda:0`.
Invariant: `candidates` never falls back silently from a GPU to the CPU.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("whetstone.worker")
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Where the driver lists the machine's GPUs."""


class DeviceUnusable(Exception):
    """The device that was asked for is not here, or does not work: one line with the remedy."""

    is_user_error = True


@dataclass(frozen=True)
class Device:
    """`name` is torch's ("cpu", "cuda:0"), `title` for people, `id` the coordinator's: "cpu", "GPU-" and a UUID, or,
    where the driver gives none, torch's name, which counts within its host."""

    name: str
    id: str
    title: str
    memory_bytes: int | None


def cpu() -> Device:
    return Device("cpu", "cpu", "cpu", _memory())


def cuda_devices() -> list[Device]:
    """Every CUDA device this process can see, in torch's order; empty without CUDA. Raises `DeviceUnusable`."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    try:
        for index in range(torch.cuda.device_count()):
            about, name = torch.cuda.get_device_properties(index), f"cuda:{index}"
            uuid = str(getattr(about, "uuid", ""))
            found.append(Device(name, f"GPU-{uuid}" if uuid else name, about.name, int(about.total_memory)))
    except RuntimeError as error:  # a GPU that fell off the bus
        raise DeviceUnusable(f"CUDA does not work here ({_first_line(error)}): check it with nvidia-smi") from None
    return found


def candidates(wanted: str) -> list[Device]:
    """The devices that `--device` allows, best first; for "auto" the machine's CUDA devices, or its CPU.

    Raises `DeviceUnusable` for an unknown name, and for CUDA where there is none.
    """
    if wanted == "cpu":
        return [cpu()]
    if wanted != "auto" and not re.fullmatch(r"cuda(:\d{1,3})?", wanted):
        raise DeviceUnusable("--device must be auto, cpu, cuda or cuda:N")
    found = cuda_devices()
    if wanted == "auto":
        if not found and NVIDIA.is_dir() and any(NVIDIA.iterdir()):
            log.warning("this machine has an NVIDIA GPU that PyTorch cannot use (%s): training on the CPU", _build())
        return found or [cpu()]
    if not found:
        raise DeviceUnusable(
            f"--device {wanted}: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build of torch "
            "(TORCH_INDEX_URL) and check the driver with nvidia-smi"
        )
    if wanted == "cuda":
        return found
    chosen = [device for device in found if device.name == wanted]
    if not chosen:
        raise DeviceUnusable(f"--device {wanted}: there is none; PyTorch sees cuda:0 to cuda:{len(found) - 1}")
    return chosen


def probe(device: Device) -> None:
    """Do one small thing there, so that a broken device is known before it takes a trial. Raises `DeviceUnusable`."""
    import torch

    try:
        with torch.inference_mode():
            ones = torch.ones(64, 64, device=device.name)
            healthy = float((ones @ ones).sum()) == 64.0**3
    except RuntimeError as error:
        raise DeviceUnusable(f"{device.name} ({device.title}) does not work: {_first_line(error)}") from None
    if not healthy:
        raise DeviceUnusable(f"{device.name} ({device.title}) computes wrong results")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _build() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}, so look at the driver" if torch.version.cuda else "the CPU"
    return f"torch {torch.__version__} is built for {built}"


def _memory() -> int | None:
    """Bytes of memory this process may use: the machine's, or its container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup of our own, or "max"
        return total
    return min(total, limit)
