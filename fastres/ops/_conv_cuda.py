"""The CUDA backend of the convolution ops, batch norm folded: one kernel for sm_90a (csrc/cuda/sm90_conv_bn_act_kernel.cu), and
for few input channels those of ``conv`` (_conv_rows.py). Chains of two and three convolutions have a kernel of their own
(csrc/cuda/sm90_conv_bn_act_conv_bn_add_act_kernel.cu).

fp16 and bf16, channels_last, one group, any small window.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import aligned, memory_format
from fastres.ops import _conv_rows, _fold

OP = "sm90_conv_act"
CHAIN, CHAIN_OF_THREE = "sm90_conv_act_conv_act", "sm90_conv_act_conv_act_conv_act"
CHAIN_CHANNELS = (64, 128)  # of x, and between two convolutions
CHAIN_REACH = 8192  # of a window along the padded rows, in pixels times channels: what shared memory holds beyond a tile
DTYPES = (torch.float16, torch.bfloat16)
ARCH = "90a"


def why_not(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, adds: bool = False) -> str | None:
    """Why no kernel can run a convolution, with or without an addition, beyond what all folded backends require."""
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    if _conv_rows.is_few(x):
        reason = _conv_rows.why_not(x, weight.shape, stride, padding, dilation, groups)
        return reason or ("with few input channels it supports no addition" if adds else None)
    return why_not_device(x.device) or why_not_arguments(x, weight, stride, padding, dilation, groups)


@functools.cache
def why_not_device(device: torch.device) -> str | None:
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"it is written for compute capability 9.0, got {'.'.join(map(str, capability))}"
    if reason := native.why_not(OP):
        return reason
    archs = native.build_info()["cuda_archs"]
    return None if ARCH in archs else f"the native library was built for {archs}, without {ARCH}"


def why_not_arguments(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str | None:
    """What it requires of the arguments, on any device."""
    if x.dtype not in DTYPES:
        return f"it has float16 and bfloat16 kernels, got {x.dtype}"
    if x.numel() == 0 or x.numel() // x.shape[1] >= 2**31:
        return f"x must have from 1 to 2^31 - 1 pixels, got {tuple(x.shape)}"
    if groups != 1:
        return f"it has no grouped convolution, got groups={groups}"
    if memory_format(x) is not torch.channels_last:
        return f"x must be channels_last, got strides {tuple(x.stride())}"
    if x.shape[1] % 8 or weight.shape[0] % 8:
        return f"channels in and out must be multiples of 8, got {x.shape[1]} and {weight.shape[0]}"
    reach = max((k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True))
    if reach > 127 or max(padding) > 127 or max(stride) > 8:
        shape = tuple(weight.shape[2:])
        return f"its windows are smaller, got {shape}, stride {stride}, padding {padding}, dilation {dilation}"
    return None


def packed(x: Tensor, parameters: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:
    """The folded weight as (C_out, KH, KW, C_in) in x's dtype, and the bias in float32."""

    def finish(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w.to(x.dtype).permute(0, 2, 3, 1).contiguous(), b.float()

    return _fold.folded(parameters, eps, (OP, x.dtype), finish)


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    """One launch over packed weights."""
    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    if _conv_rows.is_few(x):
        return _conv_rows.run_folded(x, parameters, eps, stride, padding, act)
    w, b = packed(x, parameters, eps)
    residual = None if residual is None else aligned(residual)
    return native.op(OP)(aligned(x), w, b, residual, None, None, None, stride, padding, dilation, (1, 1), act)


def run_joined(main: tuple[Any, ...], own: tuple[Any, ...], act: str) -> Tensor:
    """The same with the products of a projected shortcut added in the accumulators; main and own are what ``run`` takes for
    each convolution, without residual and act.
    """
    (x, *parameters, eps, stride, padding, dilation, _), (shortcut, *others, own_eps, own_stride) = main, own
    w, b = packed(x, tuple(parameters), eps)
    second = (aligned(shortcut), *packed(x, tuple(others), own_eps))
    return native.op(OP)(aligned(x), w, b, None, *second, stride, padding, dilation, own_stride, act)


def why_not_chain(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, last_weight: Tensor) -> str | None:
    """Why no kernel can run a convolution and a 1x1 one in one launch, beyond what all folded backends require."""
    if x.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {x.device.type}"
    reason = why_not_device(x.device) or native.why_not(CHAIN)
    return reason or why_not_chain_arguments(x, weight, stride, padding, dilation, groups, last_weight)


def why_not_chain_arguments(
    x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, last_weight: Tensor
) -> str | None:
    """What it requires of the arguments, on any device."""
    if reason := why_not_arguments(x, weight, stride, padding, dilation, groups):
        return reason
    channels = x.shape[1]
    if channels not in CHAIN_CHANNELS or weight.shape[0] != channels or last_weight.shape[0] % 64:
        shapes = f"{channels} to {weight.shape[0]} to {last_weight.shape[0]}"
        return f"it takes 64 or 128 channels, as many between the convolutions and a multiple of 64 out, got {shapes}"
    window = list(zip(weight.shape[2:], padding, dilation, strict=True))
    if stride != (1, 1) or any(2 * p != (k - 1) * d for k, p, d in window):
        geometry = f"{tuple(weight.shape[2:])}, stride {stride}, padding {padding}, dilation {dilation}"
        return f"its windows keep the image's size, got {geometry}"
    height, width = (size + p for size, p in zip(x.shape[2:], padding, strict=True))
    (rows, _, down), (columns, _, right) = window
    reach = (rows - 1) * down * width + (columns - 1) * right
    if reach * channels > CHAIN_REACH:
        return f"with {channels} channels its windows reach over at most {CHAIN_REACH // channels} pixels of rows, got {reach}"
    if x.shape[0] * height * width >= 2**30:
        return f"x must have less than 2^30 pixels, padded, got {tuple(x.shape)}"
    return None


def run_chain(
    x: Tensor, first: tuple[Any, ...], residual: Tensor, last: tuple[Any, ...], following: tuple[Any, ...] | None
) -> Any:
    """One launch; returns the output of the last convolution, and that of the following one where there is one. ``first`` is
    what ``conv_bn_act`` takes after x; ``last`` and ``following`` are parameters, eps and act of a 1x1 convolution each."""
    *parameters, eps, _, _, dilation, _, act = first
    tensors = aligned(x), *packed(x, tuple(parameters), eps), *packed(x, *last[:2]), aligned(residual)
    if following is None:
        return native.op(CHAIN)(*tensors, dilation, act, last[2])
    return native.op(CHAIN_OF_THREE)(*tensors, *packed(x, *following[:2]), dilation, act, last[2], following[2])
