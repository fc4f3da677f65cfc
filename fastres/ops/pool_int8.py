"""pool_int8: y = the largest of each window, or saturate(round(mean * scale + bias)), of 8-bit integers.

x: (N, C, H, W) int8, a byte less 128 (``_int8``); y: int8 alike, in x's memory format. ``kernel`` (0, 0) is all pixels;
``ceil`` as ``ceil_mode`` of ``torch.nn.functional.max_pool2d``; padding counts for nothing. Without scale and bias, the largest
byte. With both, sums are exact, divided by the number of pixels of the window and scaled in float32, each division and each
multiplication with its addition rounded once, as the CPU's plans do (csrc/cpu/plan_int8_kernel.cpp): the same bytes. There is
no gradient. Bytes moved: x and y.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastres.errors import must, must_type
from fastres.kernels.layout import memory_format, pooled, why_not_channels_last
from fastres.kernels.triton import why_not_device
from fastres.ops import _check, _int8
from fastres.ops._backends import triton_module
from fastres.ops._op import Backend, Op, Sample

NAME = "pool_int8"
SCHEMA = "(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil, float? scale, float? bias) -> Tensor"
WORD = 4  # channels that the kernel reads at once


def reference(x, kernel, stride, padding, ceil, scale, bias):
    kernel, _ = pooled(x.shape[2:], kernel, stride, padding, ceil)
    if scale is None:
        y = F.max_pool2d(x.half(), kernel, stride, padding, ceil_mode=ceil).to(torch.int8)  # which holds all bytes
    else:
        mean = F.avg_pool2d(_int8.byte(x), kernel, stride, padding, ceil, count_include_pad=False)
        y = _int8.stored(_int8.fused(mean, scale, torch.full((), bias, dtype=mean.dtype, device=x.device)))
    return y.contiguous(memory_format=memory_format(x))


def check(x, kernel, stride, padding, ceil, scale, bias):
    _check.strided(NAME, "x", x)
    if x.dtype != torch.int8 or x.dim() != 4 or 0 in x.shape[1:]:
        raise must(NAME, "x", "int8 of shape (N, C, H, W)", f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}")
    for name, pair, least in (("kernel", kernel, 0), ("stride", stride, 1), ("padding", padding, 0)):
        _check.pair(NAME, name, pair, least)
    if 0 in kernel and any(kernel):
        raise must(NAME, "kernel", "of at least one pixel, or (0, 0) for all of them", tuple(kernel))
    _check.flag(NAME, "ceil", ceil)
    window, size = pooled(x.shape[2:], kernel, stride, padding, ceil)
    if any(2 * pad > k for pad, k in zip(padding, window, strict=True)):
        raise must(NAME, "padding", f"at most half of the window {tuple(window)}", tuple(padding))
    if min(size) < 1:
        padded = tuple(s + 2 * p for s, p in zip(x.shape[2:], padding, strict=True))
        raise must(NAME, "kernel", f"at most x's padded size {padded}", tuple(kernel))
    for name, value in (("scale", scale), ("bias", bias)):
        if (value is None) != (scale is None):
            raise must(NAME, name, "given where the other is", value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise must_type(NAME, name, "a finite float or None", value)


def fake(x, kernel, stride, padding, ceil, scale, bias):
    _, size = pooled(x.shape[2:], kernel, stride, padding, ceil)
    return x.new_empty((*x.shape[:2], *size)).contiguous(memory_format=memory_format(x))


def samples(device, dtype):
    """The pools of a residual network at a small size, and the corners; the same in whatever dtype of real numbers."""
    generator, found = torch.Generator().manual_seed(0), []
    for label, n, c, size, window, scale, bias in (
        ("3x3 stride 2", 2, 64, (12, 12), ((3, 3), (2, 2), (1, 1), False), None, None),
        ("3x3 stride 2, odd", 1, 20, (7, 9), ((3, 3), (2, 2), (1, 1), False), None, None),
        ("2x3, counted upwards", 2, 8, (8, 7), ((2, 3), (3, 2), (1, 0), True), None, None),
        ("all pixels", 3, 72, (7, 7), ((0, 0), (1, 1), (0, 0), False), 1.37, -20.5),
        ("the largest of all pixels", 2, 32, (3, 5), ((0, 0), (1, 1), (0, 0), False), None, None),
        ("a mean of windows", 2, 12, (9, 8), ((3, 3), (2, 1), (1, 1), True), 0.9, 13.0),
        ("odd channels", 1, 7, (6, 6), ((2, 2), (2, 2), (0, 0), False), None, None),
    ):
        x = torch.randint(-128, 128, (n, c, *size), generator=generator, dtype=torch.int8).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        found.append(Sample(label, (x, *window, scale, bias)))
    return found


def cost(x, kernel, stride, padding, ceil, scale, bias):
    window, size = pooled(x.shape[2:], kernel, stride, padding, ceil)
    y = len(x) * x.shape[1] * math.prod(size)
    return x.numel() + y, y * math.prod(window)


def why_not_triton(x, kernel, stride, padding, ceil, scale, bias) -> str | None:
    if x.numel() == 0:
        return "the input is empty"
    if x.shape[1] % WORD:
        return f"it reads {WORD} channels at once, got {x.shape[1]}"
    return why_not_channels_last("x", x) or why_not_device(x.device)


def load_triton() -> Callable:
    return triton_module(NAME).pool_int8


POOL_INT8 = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("triton", why_not_triton, load_triton)],
)
