"""The second CUDA backend of the convolution ops, with Hopper's widest products (csrc/cuda/sm90_conv_wide_kernel.cu), batch
norm folded; also that of ``conv_statistics`` and ``conv_backward_bn_act`` in training.

Where windows keep the image's size it reads x once for all their taps, and blocks share what they read. It takes the same
arguments as the kernel of the backend ``cuda``.
"""

from typing import Any

from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import aligned, full_padding, why_not_dense
from fastres.ops import _conv_cuda

OP, STATISTICS, GRADIENT = "sm90_conv_wide", "sm90_conv_wide_statistics", "sm90_conv_wide_gradient"


def why_not(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """Why the kernel cannot run a convolution, beyond what all folded backends require."""
    return _why_not(OP, x, weight, stride, padding, dilation, groups)


def why_not_statistics(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """The same for its form without bias, which finds the statistics of its output."""
    return _why_not(STATISTICS, x, weight, stride, padding, dilation, groups)


def why_not_gradient(grad_y: Tensor, weight: Tensor, x: Tensor, *geometry: Any) -> str | None:
    """The same for its form for gradients, which also reads the batch norm's input."""
    return _why_not_here(GRADIENT, grad_y) or why_not_gradient_arguments(grad_y, weight, x, *geometry)


def _why_not(op: str, x: Tensor, *rest: Any) -> str | None:
    return _why_not_here(op, x) or why_not_arguments(x, *rest)


def _why_not_here(op: str, x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    return _conv_cuda.why_not_device(x.device) or native.why_not(op)


def why_not_arguments(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """What it requires of the arguments, on any device."""
    if reason := _conv_cuda.why_not_arguments(x, weight, stride, padding, dilation, groups):
        return reason
    if x.shape[0] * (x.shape[2] + 2 * padding[0]) * (x.shape[3] + 2 * padding[1]) >= 2**30:
        return f"x must have less than 2^30 pixels, padded, got {tuple(x.shape)}"
    return None


def why_not_gradient_arguments(
    grad_y: Tensor, weight: Tensor, x: Tensor, stride, padding, dilation, groups: int
) -> str | None:
    """As ``why_not_arguments``: the input gradient is a convolution of grad_y with rotated weights."""
    if stride != (1, 1):
        return f"the input gradient is a convolution only where the stride is 1, got {stride}"
    if groups != 1:
        return f"it has no grouped convolution, got groups={groups}"
    turned = full_padding(weight.shape[2:], padding, dilation)
    if min(turned) < 0:
        return f"padding must be less than the window, got {padding}"
    if {weight.dtype, x.dtype} != {grad_y.dtype}:
        return f"it has one dtype, got {grad_y.dtype}, {weight.dtype} and {x.dtype}"
    return why_not_dense(x, grad_y) or why_not_arguments(grad_y, weight.transpose(0, 1), stride, turned, dilation, groups)


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    """One launch over packed weights, those of the backend ``cuda``."""
    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    w, b = _conv_cuda.packed(x, parameters, eps)
    residual = None if residual is None else aligned(residual)
    return native.op(OP)(aligned(x), w, b, residual, stride, padding, dilation, act)


def run_statistics(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, then the merge of its statistics; the weight is copied where it is not channels_last."""
    packed = aligned(weight).permute(0, 2, 3, 1).contiguous()
    return native.op(STATISTICS)(aligned(x), packed, stride, padding, dilation)


def run_gradient(
    grad_y, weight, x, bn_weight, bn_bias, mean, var, eps, act, stride, padding, dilation, groups
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The convolution of grad_y with the rotated weight, the merge of the sums, and the pass that applies them."""
    packed = weight.permute(1, 2, 3, 0).contiguous()  # input channels, window, output channels
    args = aligned(grad_y), packed, aligned(x), bn_weight, bn_bias, mean, var, eps, act
    return native.op(GRADIENT)(*args, full_padding(weight.shape[2:], padding, dilation), dilation)
