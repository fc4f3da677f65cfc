"""The native CPU backend of the convolution ops: a direct convolution in registers with the whole epilogue fused.

Folded weights are packed once for the machine's registers and serve every input size. Activations are channels_last; an image
of few channels (the stem's) is first copied with its padding written out, so that a row of taps is one contiguous run.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import memory_format
from fastres.ops import _fold

FEW_CHANNELS = 16  # with fewer, the copy costs less than taps of a few channels each (7x7 stem of 3 channels)
Pair = tuple[int, int]
MOST_PIXELS_MOVED = 64  # of a contiguous image, which the kernel then takes all the same
_PER_WORD = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # channels in the 32 bits a kernel multiplies at once


def why_not(x: Tensor, weight: Tensor, dilation: tuple[int, int], groups: int) -> str | None:
    """Why the kernel cannot run a call, beyond what all folded backends require."""
    if x.device.type != "cpu":
        return f"it runs on cpu, the tensors are on {x.device.type}"
    reason = native.why_not("cpu_conv_bn_act")
    if reason is not None:
        return reason
    reason = lacks(x.dtype)
    if reason is not None:
        return reason
    if groups != 1 and (reason := why_not_groups(x.shape[1], weight.shape[0], groups, x.dtype)):
        return reason
    if is_padded(x.shape[1], x.dtype) and dilation[1] != 1:
        return f"few or odd channels are convolved without dilation, got dilation={dilation}"
    if x.shape[1] * weight.shape[3] > 16384:
        return f"it reads at most 16384 values a tap, got {x.shape[1]} channels"
    return None


def loses_by_moving(x: Tensor, weight: Sequence[int], groups: int) -> bool:
    """Whether oneDNN convolves a contiguous x in less time than it takes to bring x into channels_last and y back: float32, 1x1
    kernels on all but the smallest images (0.3 to 0.9 of the time), and groups, except those of two channels, for which oneDNN
    has no fast kernel (Intel Xeon, 1 thread, 2026-11-29).
    """
    if x.dtype != torch.float32 or is_padded(x.shape[1], x.dtype):
        return False
    return weight[1] != 2 if groups > 1 else tuple(weight[2:]) == (1, 1) and x.shape[2] * x.shape[3] > MOST_PIXELS_MOVED


def why_not_groups(channels: int, out_channels: int, groups: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot convolve in several groups; see groups_lack of csrc/cpu/conv_host.h."""
    if dtype == torch.int8:
        return f"8-bit integers are convolved in one group, got groups={groups}"
    if channels != out_channels or channels // groups % _PER_WORD[dtype] != 0 or is_padded(channels, dtype):
        what = f"as many output as input channels, {FEW_CHANNELS} or more, in whole words of 32 bits"
        return f"groups must have {what}, got {channels} to {out_channels} channels in {groups} groups"
    return None


@functools.cache
def _lanes() -> int:
    """Channels in a vector of sums."""
    return 16 if native.cpu_features()["level"] >= 4 else 8


def lacks(dtype: torch.dtype) -> str | None:
    """Why the native library, once loaded, has no convolution in a dtype for this processor."""
    if dtype not in _PER_WORD:
        return f"it has no {str(dtype).removeprefix('torch.')} kernel"
    features = native.cpu_features()
    if features["level"] < 3:
        return "this processor has no AVX2 and FMA"
    if dtype == torch.bfloat16 and not features["bf16_dot"]:
        return "this processor has no AVX-512 BF16"
    if dtype == torch.int8 and not features["int8_dot"]:
        return "this processor has no AVX-512 VNNI"
    return None


@functools.cache
def why_not_amx() -> str | None:
    """Why tile registers cannot be used, once the native library is loaded."""
    return None if native.op("cpu_has_amx")() else "this processor has no AMX, or Linux does not let this process use it"


class Packed:
    """Folded weights in the order the kernel reads them, transformed for Winograd's algorithm if asked to."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, winograd: bool = False, groups: int = 1) -> None:
        channels = weight.shape[1] * groups
        self.padded, self.channels = is_padded(channels, dtype), whole_words(channels, dtype)
        self.weight = pack(weight.to(dtype), groups, winograd)
        self.bias = bias.float().contiguous()
        self.finite = is_finite(weight)


def pack(weight: Tensor, groups: int = 1, winograd: bool = False, out: Tensor | None = None) -> Tensor:
    """Weights in the order the kernel reads them, in their dtype, in ``out`` if that is given."""
    channels = whole_words(weight.shape[1] * groups, weight.dtype)
    if out is None:
        taps = _POINTS if winograd else weight.shape[2] * weight.shape[3]
        out = torch.empty(_packed_rows(len(weight), groups) * taps * (channels // groups), dtype=weight.dtype, device="cpu")
    native.op("cpu_conv_pack")(weight, out, channels, groups, winograd)
    return out


def _packed_rows(out_channels: int, groups: int) -> int:
    """Rows of packed weights, whole vectors for each slice; see Slices of csrc/cpu/conv_host.h."""
    lanes, own = _lanes(), out_channels // groups
    channels = lanes if groups > 1 and lanes % own == 0 else own
    return -(-out_channels // channels) * -(-channels // lanes) * lanes


_POINTS = 16  # of a kernel transformed for F(2x2, 3x3)


def is_finite(weight: Tensor) -> bool:
    """Whether all values are: then so is their sum, unless it overflows, which takes a tenth of the time of their extremes."""
    return bool(weight.sum().isfinite()) or all(extreme.isfinite() for extreme in weight.aminmax())


def suits_winograd(weight: Sequence[int], dtype: torch.dtype, stride: Pair, dilation: Pair, out: Pair) -> bool:
    """Whether Winograd's F(2x2, 3x3), 16 multiplications for four outputs instead of 36, is faster for weights of this shape
    and outputs of this size.
    """
    out_channels, channels, *kernel = weight
    if kernel != [3, 3] or (*stride, *dilation) != (1, 1, 1, 1) or dtype != torch.float32:
        return False
    return channels % 16 == 0 and min(out_channels, channels) >= 32 and min(out) >= 4


def is_padded(channels: int, dtype: torch.dtype) -> bool:
    """Whether an input with this many channels is first copied with its padding."""
    return channels < FEW_CHANNELS or channels != whole_words(channels, dtype)


def whole_words(channels: int, dtype: torch.dtype) -> int:
    """The channels rounded up to words of 32 bits."""
    return -(-channels // _PER_WORD[dtype]) * _PER_WORD[dtype]


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor | None:
    """The convolution with its epilogue, in x's memory format; None for weights that are not finite, which the kernel would
    multiply by the zeros of the padding."""
    dtype = x.dtype
    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    out = (x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2)  # of a 3x3 convolution with stride 1
    winograd = groups == 1 and suits_winograd(weight.shape, dtype, stride, dilation, out)
    kind = ("cpu", dtype, winograd, groups)
    packed = _fold.folded(parameters, eps, kind, lambda w, b: Packed(w, b, dtype, winograd, groups))
    if not packed.finite:
        return None
    layout = memory_format(x)
    if not packed.padded:
        x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = native.op("cpu_conv_bn_act")(
        x, residual, packed.weight, packed.bias, weight.shape[2:], stride, padding, dilation, groups,
        packed.channels, packed.padded, winograd, act,
    )  # fmt: skip
    return y.contiguous(memory_format=layout)
