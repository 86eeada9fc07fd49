"""The fastest matrix product that one core of this machine can do, in floating-point operations a second.

Promise: the best of several square sizes, each the median of repeats with the output in place, in the calling process
and with its threads. It is what a training step of nothing but matrix products could reach at most.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measure import median

SIZES = (512, 1024, 2048, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak(dtype: str, sizes: tuple[int, ...] = SIZES, seconds: float = 1.0) -> float:
    """FLOP/s of the best of `sizes`, each repeated for about `seconds`."""
    return max(_rate(DTYPES[dtype], size, seconds) for size in sizes)


def _rate(dtype: torch.dtype, size: int, seconds: float) -> float:
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    torch.mm(left, right, out=out)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / median(times)
