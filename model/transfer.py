"""Convolutions learnt elsewhere: a network begins with those of a checkpoint, as a rule of a classifier.

Promise: all of them, with what normalises them, or none: one that does not fit is refused before anything is copied.
The fully connected layers and the head keep their own start.
"""

from __future__ import annotations

import torch

from model import evaluate
from model.checkpoint import CheckpointError
from model.net import SiameseNet


@torch.no_grad()
def transfer(path: str, net: SiameseNet) -> None:
    """Take the convolutions of a checkpoint over into `net`. Raises CheckpointError where they do not fit."""
    weights = evaluate.load(path).net.state_dict()
    wanted = {
        name: tensor
        for name, tensor in net.state_dict().items()
        if name.split(".")[0].removesuffix("_norm") in net.config.convolutions
    }
    for name, tensor in wanted.items():
        found = weights.get(name)
        if found is None or found.shape != tensor.shape:
            have = "none" if found is None else " x ".join(map(str, found.shape))
            need = " x ".join(map(str, tensor.shape))
            raise CheckpointError(f"transfer from {path}: {name} is {have} there, this network has {need}")
    for name, tensor in wanted.items():
        tensor.copy_(weights[name])
