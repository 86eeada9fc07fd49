"""torchvision, also where its compiled operators cannot load.

A CPU build of torch beside a CUDA build of torchvision makes ``import torchvision`` fail for want of two operators that
data sets never call. Promise: `datasets()` is the real ``torchvision.datasets``; the operators are declared (and stay
without a body) only where the real ones are missing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

_MISSING = "operator torchvision::"
_declared: list[Any] = []
"""The declarations live as long as this does."""


def datasets() -> ModuleType:
    """The module ``torchvision.datasets``."""
    try:
        return importlib.import_module("torchvision.datasets")
    except RuntimeError as fault:
        if _declared or _MISSING not in str(fault):
            raise
    # A half-imported package must not be taken for a whole one.
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _declared.append(library)
    return importlib.import_module("torchvision.datasets")
