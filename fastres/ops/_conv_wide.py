"""The second CUDA backend of the convolution ops, by Hopper's widest products (csrc/cuda/sm90_conv_wide_kernel.cu), batch norm
folded; and of ``conv_statistics``, for training.

Where windows keep the image's size it reads x once for all their taps; blocks share what they read. It takes what the kernel of
the backend ``cuda`` takes. Compiled, and executed on the CPU by the tests; chosen by default only where a device of the
architecture validated it.
"""

from typing import Any

from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import aligned
from fastres.ops import _conv_cuda

OP, STATISTICS = "sm90_conv_wide", "sm90_conv_wide_statistics"


def why_not(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """Why the kernel cannot run a convolution, beyond what all folded backends ask."""
    return _why_not(OP, x, weight, stride, padding, dilation, groups)


def why_not_statistics(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """The same of its form without bias, which finds the statistics of what it computes."""
    return _why_not(STATISTICS, x, weight, stride, padding, dilation, groups)


def _why_not(op: str, x: Tensor, *rest: Any) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    reason = _conv_cuda.why_not_device(x.device) or native.why_not(op)
    return reason or why_not_arguments(x, *rest)


def why_not_arguments(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """What it asks of the arguments, on any device."""
    if reason := _conv_cuda.why_not_arguments(x, weight, stride, padding, dilation, groups):
        return reason
    if x.shape[0] * (x.shape[2] + 2 * padding[0]) * (x.shape[3] + 2 * padding[1]) >= 2**30:
        return f"x must have less than 2^30 pixels, padded, got {tuple(x.shape)}"
    return None


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    """One launch over packed weights, those of the backend ``cuda``."""
    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    w, b = _conv_cuda.packed(x, parameters, eps)
    residual = None if residual is None else aligned(residual)
    return native.op(OP)(aligned(x), w, b, residual, stride, padding, dilation, act)


def run_statistics(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, then the merge of what it found; the weight is copied where it is not channels_last."""
    packed = aligned(weight).permute(0, 2, 3, 1).contiguous()
    return native.op(STATISTICS)(aligned(x), packed, stride, padding, dilation)
