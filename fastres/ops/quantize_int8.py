"""quantize_int8: y = saturate(round(x * scale + zero)), images in 8-bit integers; and NaN for each that is not finite.

x: (N, C, H, W) float32, padded with zeros. y: (N, channels, H + 2 padding, W + 2 padding) int8 in channels_last whatever x is,
a byte less 128 (``_int8``), multiplication and addition rounded once, as the CPU's plans do (csrc/cpu/plan_int8_kernel.cpp);
channels beyond C hold a byte of 0, so that a convolution of few channels reads aligned 4-byte words without bounds checks. A
NaN gives 0 too. The second output, (N,) float32, is a flag: NaN for an image with a value that is not finite, else 0. It is
added to the image's results, so the host never synchronises to check. (In float64 where x is: the truth that kernels are
compared with.) There is no gradient. Bytes moved: x once, one byte of y per element.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastres.errors import must, must_type
from fastres.kernels.layout import why_not_dense
from fastres.kernels.triton import why_not_device
from fastres.ops import _check, _int8
from fastres.ops._backends import triton_module
from fastres.ops._op import Backend, Op, Sample

NAME = "quantize_int8"
SCHEMA = "(Tensor x, float scale, int zero, int channels, int[2] padding) -> (Tensor, Tensor)"
WORD, MOST_PIXELS = 4, 2**28  # what the kernel writes of a pixel, and takes of an image


def reference(x, scale, zero, channels, padding):
    y, nonfinite = fake(x, scale, zero, channels, padding)
    bias = torch.full((), float(zero), dtype=x.dtype, device=x.device)
    down, right = padding
    y[:, x.shape[1] :] = -_int8.SHIFT
    y[:, : x.shape[1]] = _int8.stored(_int8.fused(F.pad(x, (right, right, down, down)), scale, bias).nan_to_num_(0.0))
    return y, torch.sum(x, (1, 2, 3), dtype=torch.float64).mul_(0.0).abs_().to(nonfinite.dtype)


def check(x, scale, zero, channels, padding):
    _check.strided(NAME, "x", x)
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        raise must(NAME, "x", "float32 of shape (N, C, H, W)", f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise must_type(NAME, "scale", "a finite float above 0", scale)
    if type(zero) is not int or not 0 <= zero <= _int8.LEVELS:
        raise must(NAME, "zero", f"a byte: a whole number of 0..{_int8.LEVELS}", zero)
    if type(channels) is not int or not x.shape[1] <= channels <= x.shape[1] + WORD:
        raise must(NAME, "channels", f"those of x, {x.shape[1]}, or up to {WORD} more", channels)
    _check.pair(NAME, "padding", padding, 0)


def fake(x, scale, zero, channels, padding):
    size = (len(x), channels, *_padded(x, padding))
    return torch.empty(size, dtype=torch.int8, device=x.device, memory_format=torch.channels_last), x.new_empty(len(x))


def _padded(x, padding):
    return [size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)]


def samples(device, dtype):
    """Images of one to four channels, with padding and without, and what has more channels; the same in whatever dtype."""
    generator, found = torch.Generator().manual_seed(0), []
    for n, c, size, scale, zero, channels, padding in (
        (2, 3, (32, 32), 57.3, 118, 4, (0, 0)), (2, 3, (32, 32), 57.3, 118, 4, (3, 3)), (3, 3, (7, 9), 40.0, 0, 4, (1, 2)),
        (1, 3, (70, 61), 1 / 3, 255, 4, (0, 0)), (2, 1, (8, 8), 100.0, 128, 4, (1, 1)), (1, 2, (5, 4), 60.1, 100, 4, (0, 0)),
        (2, 4, (6, 6), 50.0, 120, 4, (0, 0)), (1, 3, (4, 4), 50.0, 120, 3, (0, 0)), (1, 6, (4, 4), 50.0, 120, 8, (1, 1)),
    ):  # fmt: skip
        x, label = torch.randn((n, c, *size), generator=generator).to(device), f"{c} to {channels} channels"
        found.append(Sample(f"{label}, {'x'.join(map(str, size))} and {padding}", (x, scale, zero, channels, padding)))
    return found


def cost(x, scale, zero, channels, padding):
    return x.numel() * x.element_size() + len(x) * channels * math.prod(_padded(x, padding)), 2 * x.numel()


def why_not_triton(x, scale, zero, channels, padding) -> str | None:
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if channels != WORD:
        return f"it makes images of {WORD} channels, got {channels}"
    if math.prod(_padded(x, padding)) > MOST_PIXELS:
        return f"images must have at most {MOST_PIXELS} pixels, got {'x'.join(map(str, _padded(x, padding)))}"
    return why_not_device(x.device) or why_not_dense(x)


def load_triton() -> Callable:
    return triton_module(NAME).quantize_int8


QUANTIZE_INT8 = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("triton", why_not_triton, load_triton)],
)
