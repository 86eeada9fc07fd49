"""bf16 where it pays: matrix products in bfloat16 by autocast, weights and updates always in fp32.

Promise: "auto" takes bf16 on CUDA devices and on CPUs that multiply it in hardware (AVX-512 BF16 or AMX), and fp32
where it would only be emulated. fp32 is fp32: never TF32, in which convolutions keep 10 bits of a product's 23 on CUDA
devices unless told otherwise.
"""

from __future__ import annotations

import torch


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Resolve the setting "auto", "fp32" or "bf16" for a device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is of the current one
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private names, and the only ones: where a torch has them no longer, fp32 is right everywhere.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in questions)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """A context in which matrix products run in bf16, or one that changes nothing.

    On CUDA it also sees to it, for the whole process, that those left in fp32 are computed in fp32.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
