"""A layer's block computes what its parts compute, forward and backward, on the CPU it was made for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.block import ConvBlock


def parts(x: Tensor, weight: Tensor, bias: Tensor, pool: str) -> Tensor:
    """What the block stands for."""
    y = F.conv2d(x, weight, bias)
    return F.relu(y if pool == "none" else F.max_pool2d(y, 2, ceil_mode=pool == "ceil"))


@pytest.mark.parametrize("pool", ["none", "floor", "ceil"])
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "side", "count"),
    [(1, 4, 5, 12, 3), (3, 4, 3, 13, 5), (8, 6, 2, 6, 70), (2, 3, 4, 9, 1), (1, 8, 3, 40, 130), (16, 32, 3, 30, 40)],
)
def test_a_block_gives_the_values_and_gradients_of_its_parts(
    channels: int, filters: int, kernel: int, side: int, count: int, pool: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, kernel, kernel, generator=generator) / kernel
    bias = torch.randn(filters, generator=generator) / 10
    results = []
    for compute in (parts, ConvBlock.apply):
        x = images.clone(memory_format=torch.channels_last).requires_grad_(channels > 1)  # as in a first layer
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        y = compute(x, w, b, pool)
        slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
        y.backward(slope)
        results.append((y.detach(), w.grad, b.grad, x.grad))
    for theirs, ours in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert torch.equal(results[0][0], results[1][0])


def test_under_bf16_the_gradient_is_as_near_to_the_exact_one_as_that_of_the_parts() -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(64, 8, 14, 14, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 8, 3, 3, generator=generator) / 9, torch.zeros(16)
    grads = []
    for compute, bf16 in ((parts, False), (parts, True), (ConvBlock.apply, True)):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = compute(images, w, bias, "floor")
        (y.float() ** 2).sum().backward()
        grads.append(w.grad)
    exact, of_parts, of_block = grads
    assert (of_block - exact).norm() < 1.2 * (of_parts - exact).norm() + 1e-6 * exact.norm()
