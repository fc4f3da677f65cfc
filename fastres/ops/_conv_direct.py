"""The direct CUDA backend of the convolution ops: windows that keep the image's size, for sm_90a
(csrc/cuda/sm90_conv_direct_kernel.cu), batch norm folded.

It reads x once for all taps of the window, where the backend ``cuda`` reads it for each. fp16 and bf16, channels_last, one
group. Compiled, and executed on the CPU by the tests; chosen by default only where a device of the architecture validated it.
"""

from math import ceil
from typing import Any

from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import aligned
from fastres.ops import _conv_cuda

OP = "sm90_conv_direct"
LEAST_TAPS = 5
PLACES, MOST_ROWS, BOXES = 512, 640, 4  # of a tile; of a slice of x in shared memory, which so many copies bring


def why_not(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """Why the kernel cannot run a convolution, beyond what all folded backends ask."""
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    reason = _conv_cuda.why_not_device(x.device) or native.why_not(OP)
    return reason or why_not_arguments(x, weight, stride, padding, dilation, groups)


def why_not_arguments(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """What it asks of the arguments, on any device."""
    if reason := _conv_cuda.why_not_arguments(x, weight, stride, padding, dilation, groups):
        return reason
    kernel = tuple(weight.shape[2:])
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if tuple(stride) != (1, 1) or [2 * p for p in padding] != reach or kernel[0] * kernel[1] < LEAST_TAPS:
        geometry = f"{kernel}, stride {tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)}"
        return f"its windows have stride 1, at least {LEAST_TAPS} taps and keep the image's size, got {geometry}"
    if x.shape[0] * (x.shape[2] + padding[0]) * (x.shape[3] + padding[1]) >= 2**30:
        return f"x must have less than 2^30 pixels, padded, got {tuple(x.shape)}"
    rows = PLACES + reach[0] * (x.shape[3] + padding[1]) + reach[1]
    if BOXES * 8 * ceil(rows / (8 * BOXES)) > MOST_ROWS:
        return f"the rows under a window must fit in shared memory, got images {x.shape[3]} wide under {kernel}"
    return None


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    """One launch over packed weights, those of the backend ``cuda``."""
    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    w, b = _conv_cuda.packed(x, parameters, eps)
    residual = None if residual is None else aligned(residual)
    return native.op(OP)(aligned(x), w, b, residual, padding, dilation, act)
