"""Convolution, 2 x 2 max-pooling and ReLU of one layer as a single step of backpropagation, for training on a CPU.

Promise: forward gives what `conv2d`, `max_pool2d` and `relu` give, bit for bit while activations are finite; backward
gives their gradients, up to the order of additions and to which of several equal maxima of a window gets the gradient.

Images go through in pieces whose feature maps fit the cache. The sign of a rectified float is clear, so floats compare
like the integers of their bits: pooling is two rounds of integer maxima, and each round keeps a mask of all ones where
the second of two values won, which routes the gradient by `and` and `xor`. oneDNN is slow at the weight gradient of one
input channel and of small maps; there it is a matrix product with the images' patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_POOL_BYTES = 2**21
"""A convolution's output is pooled while that much of it is in the cache."""
_GRADIENT_BYTES = 2**23
"""Gradients of feature maps held at once: larger blocks of memory come fresh from the operating system each time."""
_IMAGES = 16
"""At least so many go through a convolution of several channels at once."""
_SMALL = 6
"""Pixels a side of a map up to which its weight gradient is faster as a matrix product."""


class ConvBlock(torch.autograd.Function):
    """(B, C, S, S), weight (F, C, k, k), bias (F), pool of `Conv` -> (B, F, s, s), all channels-last inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, pool: str) -> Tensor:
        assert weight.shape[1] > 1 or x.is_contiguous()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
            if pool == "none":
                result = F.relu_(F.conv2d(x, weight, bias)).permute(0, 2, 3, 1)
                ctx.save_for_backward(x, weight, result)
            else:
                result, rows, columns = _convolve_and_pool(x, weight, bias, pool == "ceil")
                ctx.save_for_backward(x, weight, result, rows, columns)
        return result.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, result, *masks = ctx.saved_tensors
        grad = grads[0].permute(0, 2, 3, 1)  # (B, s, s, F)
        count, filters, side = len(x), len(weight), x.shape[2] - weight.shape[2] + 1
        flat = weight.shape[1] == 1 and not ctx.needs_input_grad[0]
        limit = _POOL_BYTES if flat else _GRADIENT_BYTES
        step = _even(count, limit, side * side * filters * x.element_size())
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] and step < count else None
        dw: Tensor | None = None
        piece: tuple[Tensor | None, Tensor, Tensor]
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            g = torch.ops.aten.threshold_backward(grad[part], result[part], 0)
            if masks:
                g = _unpool(g, masks[0][part], masks[1][part], side)
            if flat:
                piece = None, *_patch_gradient(g, x[part], weight)
            else:
                piece = _gradients(g, x[part], weight, ctx.needs_input_grad[0])
            if dx is not None and piece[0] is not None:
                dx[part] = piece[0]
            if dw is None:
                dw, db = piece[1].float(), piece[2].float()
            else:
                dw += piece[1]
                db += piece[2]
        assert dw is not None
        return dx if dx is not None else piece[0], dw, db, None


def _even(count: int, limit: int, each: int) -> int:
    """Size of the pieces, all but the last one equal, of `count` images of `each` bytes: about `limit` bytes."""
    pieces = -(-count // max(1, limit // each))
    return -(-count // pieces)


def _convolve_and_pool(x: Tensor, weight: Tensor, bias: Tensor, ceil: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled (B, s, s, F), and where the lower row (B, s, 2s, F), the right column (B, s, s, F) won, as masks."""
    bits, sign = _BITS[x.dtype], 8 * x.element_size() - 1
    count, filters, side = len(x), len(weight), x.shape[2] - weight.shape[2] + 1
    half = (side + 1) // 2 if ceil else side // 2
    result = torch.empty(count, half, half, filters, dtype=x.dtype)
    rows = torch.empty(count, half, 2 * half, filters, dtype=bits)
    columns = torch.empty(count, half, half, filters, dtype=bits)
    step = _even(count, _POOL_BYTES, side * side * filters * x.element_size())
    if weight.shape[1] > 1:
        step = max(step, _IMAGES)
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        y = F.conv2d(x[part], weight, bias)
        if 2 * half > side:
            y = F.pad(y, (0, 1, 0, 1))  # a zero never beats what is rectified
        z = y.permute(0, 2, 3, 1).view(bits).clamp_min_(0)
        upper, lower = z[:, 0 : 2 * half : 2, : 2 * half], z[:, 1 : 2 * half : 2, : 2 * half]
        torch.sub(upper, lower, out=rows[part]).bitwise_right_shift_(sign)
        z = torch.maximum(upper, lower)
        left, right = z[:, :, 0::2], z[:, :, 1::2]
        torch.sub(left, right, out=columns[part]).bitwise_right_shift_(sign)
        torch.maximum(left, right, out=result[part].view(bits))
    return result, rows, columns


def _unpool(grad: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """The gradient (b, s, s, F) of pooled values where they came from: (b, side, side, F)."""
    count, half, _, filters = grad.shape
    between = torch.empty_like(rows)  # (b, s, 2s, F)
    bits, right = grad.view(rows.dtype), between[:, :, 1::2]
    torch.bitwise_and(bits, columns, out=right)
    torch.bitwise_xor(bits, right, out=between[:, :, 0::2])
    whole = max(side, 2 * half)
    out = torch.empty(count, whole, whole, filters, dtype=rows.dtype)
    if whole > 2 * half:
        out[:, -1] = 0
        out[:, :, -1] = 0
    lower = out[:, 1 : 2 * half : 2, : 2 * half]
    torch.bitwise_and(between, rows, out=lower)
    torch.bitwise_xor(between, lower, out=out[:, 0 : 2 * half : 2, : 2 * half])
    return out[:, :side, :side].contiguous().view(grad.dtype)


def _patch_gradient(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias, for one input channel: patches (b, k k + 1, s s), the last row ones, times g (b, s s, F)."""
    count, side, kernel, filters = len(x), x.shape[2], weight.shape[2], len(weight)
    out = side - kernel + 1
    patches = torch.empty(count, kernel * kernel + 1, out * out, dtype=x.dtype)
    shifted = x.as_strided((count, kernel, kernel, out, out), (side * side, side, 1, side, 1), x.storage_offset())
    patches[:, :-1].view(count, kernel, kernel, out, out).copy_(shifted)
    patches[:, -1] = 1
    total = torch.bmm(patches, g.view(count, out * out, filters)).sum(0, dtype=torch.float32)
    return total[:-1].t().reshape(weight.shape), total[-1]


def _gradients(g: Tensor, x: Tensor, weight: Tensor, for_x: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of the images (None unless asked for), the weight and the bias, from g (b, s, s, F)."""
    filters, channels, kernel, _ = weight.shape
    count, out, side = len(x), g.shape[1], x.shape[2]
    product = out <= _SMALL
    dx, dw, db = torch.ops.aten.convolution_backward(
        g.permute(0, 3, 1, 2), x, weight, [filters], (1, 1), (0, 0), (1, 1), False, (0, 0), 1,
        (for_x, not product, not product),
    )  # fmt: skip
    if product:
        x = x.permute(0, 2, 3, 1)
        row = side * channels
        shape, strides = (count, out, out, kernel, kernel * channels), (side * row, row, channels, row, 1)
        patches = x.as_strided(shape, strides, x.storage_offset()).reshape(count * out * out, -1)
        g = g.reshape(-1, filters)
        dw = (g.t() @ patches).view(filters, kernel, kernel, channels).permute(0, 3, 1, 2)
        db = g.sum(0, dtype=torch.float32)
    return dx, dw, db
