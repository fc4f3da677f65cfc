"""Triton kernels of add_act and add_act_backward: flat, bound by memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton import configs
from fastres.kernels.triton.device import activate, launch, mask_gradient


@triton.jit
def _add_act_kernel(x_ptr, residual_ptr, y_ptr, numel, ACT: tl.constexpr, BLOCK: tl.constexpr):
    # y = act(x + residual)
    # flat: program i owns elements i * BLOCK and up, whatever the (common, dense) strides mean
    # 3 accesses of the element size per output
    # fp32, rounded once
    # the block's base is int64, offsets within it int32: any size, vector accesses
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    valid = offset < numel - base
    x = tl.load(x_ptr + base + offset, mask=valid).to(tl.float32)
    residual = tl.load(residual_ptr + base + offset, mask=valid).to(tl.float32)
    y = activate(x + residual, ACT)
    tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _add_act_backward_kernel(grad_y_ptr, y_ptr, grad_ptr, numel, ACT: tl.constexpr, BLOCK: tl.constexpr):
    # grad = y <= 0 ? 0 : grad_y, the gradient of x and of residual alike
    # flat, as the forward
    # 3 accesses of the element size per output
    # no arithmetic, no rounding
    # the block's base is int64, offsets within it int32
    base = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    valid = offset < numel - base
    grad_y = tl.load(grad_y_ptr + base + offset, mask=valid)
    y = tl.load(y_ptr + base + offset, mask=valid)
    tl.store(grad_ptr + base + offset, mask_gradient(grad_y, y, ACT), mask=valid)


def add_act(x: Tensor, residual: Tensor, act: str, config: configs.FlatConfig = configs.FLAT[0]) -> Tensor:
    return _launch(_add_act_kernel, x, residual, act, config)


def add_act_backward(grad_y: Tensor, y: Tensor, act: str, config: configs.FlatConfig = configs.FLAT[0]) -> Tensor:
    return _launch(_add_act_backward_kernel, grad_y, y, act, config)


def _launch(kernel, first: Tensor, second: Tensor, act: str, config: configs.FlatConfig) -> Tensor:
    first, second = first.resolve_neg(), second.resolve_neg()
    out, numel = torch.empty_like(first), first.numel()
    grid = (triton.cdiv(numel, config.block),)
    launch(kernel, grid, first, first, second, out, numel, act, config.block, num_warps=config.num_warps)
    return out
