"""quantize_int8: y = saturate(round(x * scale + zero)), images in 8-bit integers; and NaN for each that is not finite.

x: (N, C, H, W) float32. y: (N, channels, H, W) int8 in channels_last whatever x is, a byte less 128 (``_int8``), multiplication
and addition rounded once, as the CPU's plans do (csrc/cpu/plan_int8_kernel.cpp); channels beyond C hold a byte of 0, for
convolutions that read whole words. A NaN gives a byte of 0. The second output, (N,) float32, is NaN for an image with a value
that is not finite, else 0: what is added to the image's results, and nobody has to wait for the answer. (In float64 where x is:
the truth that kernels are held against.) There is no gradient. Bytes moved: x once, one of y an element.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastres.errors import must, must_type
from fastres.kernels.layout import why_not_dense
from fastres.kernels.triton import why_not_device
from fastres.ops import _int8
from fastres.ops._backends import triton_module
from fastres.ops._op import Backend, Op, Sample

NAME = "quantize_int8"
SCHEMA = "(Tensor x, float scale, int zero, int channels) -> (Tensor, Tensor)"
WORD, MOST_PIXELS = 4, 2**28  # what the kernel writes of a pixel, and takes of an image


def reference(x, scale, zero, channels):
    y, strange = fake(x, scale, zero, channels)
    bias = torch.full((), float(zero), dtype=x.dtype, device=x.device)
    y[:, x.shape[1] :] = -_int8.SHIFT
    y[:, : x.shape[1]] = _int8.stored(_int8.fused(x, scale, bias).nan_to_num_(0.0))
    return y, torch.sum(x, (1, 2, 3), dtype=torch.float64).mul_(0.0).abs_().to(strange.dtype)


def check(x, scale, zero, channels):
    if not isinstance(x, Tensor):
        raise must_type(NAME, "x", "a torch.Tensor", x)
    if x.is_nested or x.layout is not torch.strided:
        raise must(NAME, "x", "a strided tensor", "another kind", "call .to_dense() or pad it")
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        raise must(NAME, "x", "float32 of shape (N, C, H, W)", f"{str(x.dtype)[6:]} of shape {tuple(x.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise must_type(NAME, "scale", "a finite float above 0", scale)
    if type(zero) is not int or not 0 <= zero <= _int8.LEVELS:
        raise must(NAME, "zero", f"a byte: a whole number of 0..{_int8.LEVELS}", zero)
    if type(channels) is not int or not x.shape[1] <= channels <= x.shape[1] + WORD:
        raise must(NAME, "channels", f"those of x, {x.shape[1]}, or up to {WORD} more", channels)


def fake(x, scale, zero, channels):
    y = torch.empty((len(x), channels, *x.shape[2:]), dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(len(x))


def samples(device, dtype):
    """Images of one to four channels, an odd size, a large one, and what has more channels; the same in whatever dtype."""
    generator, found = torch.Generator().manual_seed(0), []
    for n, c, size, scale, zero, channels in (
        (2, 3, (32, 32), 57.3, 118, 4), (3, 3, (7, 9), 40.0, 0, 4), (1, 3, (70, 61), 1 / 3, 255, 4),
        (2, 1, (8, 8), 100.0, 128, 4), (1, 2, (5, 4), 60.1, 100, 4), (2, 4, (6, 6), 50.0, 120, 4),
        (1, 3, (4, 4), 50.0, 120, 3), (1, 6, (4, 4), 50.0, 120, 8),
    ):  # fmt: skip
        x = torch.randn((n, c, *size), generator=generator).to(device)
        found.append(Sample(f"{c} to {channels} channels, {'x'.join(map(str, size))}", (x, scale, zero, channels)))
    return found


def cost(x, scale, zero, channels):
    return x.numel() * x.element_size() + len(x) * channels * math.prod(x.shape[2:]), 2 * x.numel()


def why_not_triton(x, scale, zero, channels) -> str | None:
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if channels != WORD:
        return f"it makes images of {WORD} channels, got {channels}"
    if math.prod(x.shape[2:]) > MOST_PIXELS:
        return f"images must have at most {MOST_PIXELS} pixels, got {'x'.join(map(str, x.shape[2:]))}"
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
