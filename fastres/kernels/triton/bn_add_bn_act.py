"""Triton bn_add_bn_act: y = act(batch_norm(x) + batch_norm(residual)), evaluation, training and backward.

Tiles, partitions and reductions are those of batch_norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.kernels.triton import batch_norm, bn_act, configs, relu_mask
from fastres.kernels.triton.batch_norm import _channels, _elements, _offsets, _share, _sum
from fastres.kernels.triton.device import activate, launch, load_affine, load_parameter, normalize
from fastres.kernels.triton.relu_mask import masked, store_packed


@triton.jit
def bn_add_bn_act_kernel(
    x_ptr, r_ptr, y_ptr, mask_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, r_weight_ptr, r_bias_ptr, r_mean_ptr,
    r_var_ptr, elements, channels, plane, tiles, eps, r_eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # y = act(bn(x) + bn(r))
    # grid (channel tiles, programs along elements)
    # 3 accesses of the element size per output; a bit where a mask is given
    # fp32, rounded once
    # tiles go backwards: a statistics pass over the same partition has left the last ones in L2
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    r_mean, _, r_scale, r_bias = load_affine(r_weight_ptr, r_bias_ptr, r_mean_ptr, r_var_ptr, channel, channel_ok, r_eps)
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        v = normalize(x, mean, scale, bias) + normalize(r, r_mean, r_scale, r_bias)
        y = activate(v, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, mask=valid)
        if mask_ptr is not None:
            store_packed(mask_ptr, y, tile, elements, channels, plane, CHANNELS_LAST, INDEX, BLOCK_E, BLOCK_C)


@triton.jit
def bn_add_bn_act_backward_reduce_kernel(
    grad_y_ptr, grad_y2_ptr, mask_ptr, x_ptr, r_ptr, weight_ptr, mean_ptr, var_ptr, r_weight_ptr, r_mean_ptr, r_var_ptr,
    dz_ptr, partial_dz_ptr, partial_dzx_ptr, partial_dzr_ptr,
    elements, channels, plane, tiles, eps, r_eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dz = mask * (grad_y [+ grad_y2]); partial sums of dz, dz * (x - mean) and dz * (r - r_mean), per channel
    # grid and partials as in batch_norm's backward
    # reads grad_y, grad_y2, x and r, and the mask
    # fp32 sums per lane, lanes merged in fp64
    # dz is written where there is a grad_y2; else it is not: the second pass masks grad_y again
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, _, _ = load_affine(weight_ptr, None, mean_ptr, var_ptr, channel, channel_ok, eps)
    r_mean, _, _, _ = load_affine(r_weight_ptr, None, r_mean_ptr, r_var_ptr, channel, channel_ok, r_eps)
    sum_dz = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    sum_dzx = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    sum_dzr = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    tile, end = _share(tiles, INDEX)
    while tile < end:
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offset, mask=valid, other=0.0)
        if grad_y2_ptr is not None:
            grad_y = grad_y.to(tl.float32) + tl.load(grad_y2_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        dz = masked(grad_y, mask_ptr, offset, valid, ACT)
        if dz_ptr is not None:
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=valid)
        dz = dz.to(tl.float32)
        sum_dz += dz
        sum_dzx += dz * tl.where(valid, x - mean, 0.0)
        sum_dzr += dz * tl.where(valid, r - r_mean, 0.0)
        tile += 1

    partial = channel * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_dz_ptr + partial, _sum(sum_dz), mask=channel_ok)
    tl.store(partial_dzx_ptr + partial, _sum(sum_dzx), mask=channel_ok)
    tl.store(partial_dzr_ptr + partial, _sum(sum_dzr), mask=channel_ok)


@triton.jit
def _load_gradient(weight_ptr, mean_ptr, var_ptr, grad_weight_ptr, channel, channel_ok, elements, eps):
    """Per channel: mean, scale and slope, see batch_norm's backward."""
    mean, invstd, scale, _ = load_affine(weight_ptr, None, mean_ptr, var_ptr, channel, channel_ok, eps)
    return mean, scale, invstd * load_parameter(grad_weight_ptr, channel, channel_ok, 0.0) / elements


@triton.jit
def bn_add_bn_act_backward_kernel(
    grad_y_ptr, mask_ptr, x_ptr, r_ptr, weight_ptr, mean_ptr, var_ptr, r_weight_ptr, r_mean_ptr, r_var_ptr,
    grad_weight_ptr, grad_r_weight_ptr, grad_bias_ptr, grad_x_ptr, grad_r_ptr,
    elements, channels, plane, tiles, eps, r_eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # the gradients of x and r in training: scale * (dz - mean(dz) - (x - mean) * slope), each with its own statistics
    # grid (channel tiles, programs along elements)
    # 5 accesses of the element size per output, and the mask
    # fp32, rounded once; no division by a weight, which may be 0
    # backwards, for L2; grad_r may lie where grad_y does, each element read before it is written
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, scale, slope = _load_gradient(
        weight_ptr, mean_ptr, var_ptr, grad_weight_ptr, channel, channel_ok, elements, eps
    )  # fmt: skip
    r_mean, r_scale, r_slope = _load_gradient(
        r_weight_ptr, r_mean_ptr, r_var_ptr, grad_r_weight_ptr, channel, channel_ok, elements, r_eps
    )
    mean_dz = load_parameter(grad_bias_ptr, channel, channel_ok, 0.0) / elements
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offset, mask=valid, other=0.0)
        dz = masked(grad_y, mask_ptr, offset, valid, ACT).to(tl.float32) - mean_dz
        grad_x, grad_r = scale * (dz - (x - mean) * slope), r_scale * (dz - (r - r_mean) * r_slope)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)
        tl.store(grad_r_ptr + offset, grad_r.to(grad_r_ptr.dtype.element_ty), mask=valid)


def bn_add_bn_act(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    residual_weight: Tensor | None, residual_bias: Tensor | None, residual_mean: Tensor, residual_var: Tensor,
    residual_eps: float, act: str, config: configs.TileConfig | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, residual, cut = x.resolve_neg(), residual.resolve_neg(), bn_act.plan(x, config)
    y = torch.empty_like(x, memory_format=memory_format(x))
    own = bn_act.parameters(weight, bias, mean, var)
    other = bn_act.parameters(residual_weight, residual_bias, residual_mean, residual_var)
    beside = mask if mask is not None and relu_mask.packs(*cut.sizes[1:3], cut.options) else None
    launch(
        bn_add_bn_act_kernel, cut.grid, x,
        x, residual, y, beside, *own, *other, *cut.sizes, eps, residual_eps, act, **cut.options,
    )  # fmt: skip
    if mask is not None and beside is None:
        relu_mask.make(y, mask)
    return y


def bn_add_bn_act_train(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    residual_weight: Tensor | None, residual_bias: Tensor | None, residual_eps: float, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (mean, var), (r_mean, r_var) = bn_act.statistics(x), bn_act.statistics(residual)
    mask = relu_mask.empty(x, act)
    y = bn_add_bn_act(
        x, residual, weight, bias, mean, var, eps, residual_weight, residual_bias, r_mean, r_var, residual_eps, act,
        mask=mask if act == "relu" else None,
    )  # fmt: skip
    return y, mean, var, r_mean, r_var, mask


def bn_add_bn_act_backward(
    grad_y: Tensor, grad_y2: Tensor | None, mask: Tensor, x: Tensor, residual: Tensor, weight: Tensor | None, mean: Tensor,
    var: Tensor, eps: float, residual_weight: Tensor | None, residual_mean: Tensor, residual_var: Tensor,
    residual_eps: float, act: str, config: configs.TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_y, x, residual = (t.resolve_neg() for t in (grad_y, x, residual))
    grad_y2, cut = None if grad_y2 is None else grad_y2.resolve_neg(), bn_act.plan(x, config)
    own = bn_act.parameters(weight, mean, var)
    other = bn_act.parameters(residual_weight, residual_mean, residual_var)
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    grad_residual = torch.empty_like(grad_x)
    sums = [bn_act.partials(x, cut) for _ in range(3)]
    launch(
        bn_add_bn_act_backward_reduce_kernel, cut.grid, x,
        grad_y, grad_y2, mask, x, residual, *own, *other, None if grad_y2 is None else grad_residual, *sums,
        *cut.sizes, eps, residual_eps, act, **cut.options,
    )  # fmt: skip
    grad_weight, grad_residual_weight, grad_bias = (bn_act.per_channel(x) for _ in range(3))
    programs = cut.grid[1]
    for grad, sum_, variance, epsilon in (
        (grad_weight, sums[1], own[2], eps), (grad_residual_weight, sums[2], other[2], residual_eps)
    ):  # fmt: skip
        launch(
            batch_norm.bn_act_backward_merge_kernel, (x.shape[1],), x,
            sums[0], sum_, variance, grad, grad_bias, programs, epsilon, triton.next_power_of_2(programs),
        )  # fmt: skip
    launch(
        bn_add_bn_act_backward_kernel, cut.grid, x,
        *((grad_y, mask) if grad_y2 is None else (grad_residual, None)), x, residual, *own, *other,
        grad_weight, grad_residual_weight, grad_bias, grad_x, grad_residual,
        *cut.sizes, eps, residual_eps, act if grad_y2 is None else "none", **cut.options,
    )  # fmt: skip
    dtype = mean.dtype if weight is None else weight.dtype
    residual_dtype = residual_mean.dtype if residual_weight is None else residual_weight.dtype
    grads = grad_weight.to(dtype), grad_bias.to(dtype)
    return grad_x, grad_residual, *grads, grad_residual_weight.to(residual_dtype), grad_bias.to(residual_dtype)
