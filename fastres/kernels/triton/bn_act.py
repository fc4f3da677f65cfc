"""Triton bn_act: y = act(batch_norm(x)), evaluation, training and backward; the host side of batch_norm's kernels."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.kernels.triton import batch_norm, configs, relu_mask
from fastres.kernels.triton.device import index_type, launch


def bn_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, act: str
) -> Tensor:
    return apply(x, None, weight, bias, mean, var, eps, act)


def bn_act_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics(x)
    return apply(x, None, weight, bias, mean, var, eps, act), mean, var


def bn_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    act: str, training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, _, grad_weight, grad_bias = backward(grad_y, None, None, x, weight, bias, mean, var, eps, act, training)
    dtype = mean.dtype if weight is None else weight.dtype
    return grad_x, grad_weight.to(dtype), grad_bias.to(dtype if bias is None else bias.dtype)


class Plan(NamedTuple):
    """How an activation is cut into programs: the kernels' size arguments, compile-time options and grid."""

    sizes: tuple[int, int, int, int]  # elements, channels, plane, tiles
    options: dict
    grid: tuple[int, int]


def plan(x: Tensor, config: configs.TileConfig | None = None, like: Tensor | None = None) -> Plan:
    """How x is cut; ``like``, where x is what it is pooled to, says which layout it has and how large offsets become."""
    like = x if like is None else like
    images, channels, height, width = x.shape
    elements, channels_last = images * height * width, memory_format(like) is torch.channels_last
    config = config or configs.tile(elements, channels, channels_last)
    programs, tiles = configs.partition(elements, channels, config)
    options = {
        "CHANNELS_LAST": channels_last,
        "INDEX": index_type(max(x.numel(), like.numel())),
        "BLOCK_E": config.block_e,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
    }
    grid = (triton.cdiv(channels, config.block_c), programs)
    return Plan((elements, channels, height * width, tiles), options, grid)


def statistics(x: Tensor, config: configs.TileConfig | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, fp32."""
    x, cut = x.resolve_neg(), plan(x, config)
    mean, var, partial_mean, partial_m2 = per_channel(x), per_channel(x), partials(x, cut), partials(x, cut)
    (elements, channels, _, tiles), programs = cut.sizes, cut.grid[1]
    launch(
        batch_norm.bn_statistics_kernel, cut.grid, x,
        x, partial_mean, partial_m2, mean, *cut.sizes, configs.pivot_sample(elements), **cut.options,
    )  # fmt: skip
    share = tiles * cut.options["BLOCK_E"]
    launch(
        batch_norm.bn_statistics_merge_kernel, (channels,), x,
        partial_mean, partial_m2, mean, var, elements, share, programs, triton.next_power_of_2(programs),
    )  # fmt: skip
    return mean, var


def apply(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, act: str, config: configs.TileConfig | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(batch_norm(x) [+ residual]) with the given statistics; fills the mask of a ReLU where one is given."""
    x, cut = x.resolve_neg(), plan(x, config)
    residual = None if residual is None else residual.resolve_neg()
    y = torch.empty_like(x, memory_format=memory_format(x))
    beside = mask if mask is not None and relu_mask.packs(*cut.sizes[1:3], cut.options) else None
    launch(
        batch_norm.bn_act_kernel, cut.grid, x,
        x, residual, y, beside, *parameters(weight, bias, mean, var), *cut.sizes, eps, act, **cut.options,
    )  # fmt: skip
    if mask is not None and beside is None:
        relu_mask.make(y, mask)
    return y


def backward(
    grad_y: Tensor, grad_y2: Tensor | None, mask: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, act: str, training: bool, config: configs.TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """grad_x, dz (where a mask is given), grad_weight and grad_bias in fp32."""
    grad_y, x, cut = grad_y.resolve_neg(), x.resolve_neg(), plan(x, config)
    grad_y2 = None if grad_y2 is None else grad_y2.resolve_neg()
    weight, bias = parameters(weight, bias)
    mean, var = mean.resolve_neg().contiguous(), var.resolve_neg().contiguous()
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    dz = None if mask is None else torch.empty_like(grad_x)
    partial_dz, partial_dzx = partials(x, cut), partials(x, cut)
    launch(
        batch_norm.bn_act_backward_reduce_kernel, cut.grid, x,
        grad_y, grad_y2, mask, x, weight, bias, mean, var, dz, None if training else grad_x, partial_dz, partial_dzx,
        *cut.sizes, eps, act, **cut.options,
    )  # fmt: skip
    grad_weight, grad_bias, programs = per_channel(x), per_channel(x), cut.grid[1]
    launch(
        batch_norm.bn_act_backward_merge_kernel, (x.shape[1],), x,
        partial_dz, partial_dzx, var, grad_weight, grad_bias, programs, eps, triton.next_power_of_2(programs),
    )  # fmt: skip
    if training:
        masked, act = (grad_y, act) if dz is None else (dz, "none")
        launch(
            batch_norm.bn_act_backward_kernel, cut.grid, x,
            masked, x, weight, bias, mean, var, grad_weight, grad_bias, grad_x, *cut.sizes, eps, act, **cut.options,
        )  # fmt: skip
    return grad_x, dz, grad_weight, grad_bias


def parameters(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Per-channel tensors as the kernels read them: contiguous, or None."""
    return tuple(None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors)


def per_channel(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def partials(x: Tensor, cut: Plan) -> Tensor:
    return torch.empty(x.shape[1], cut.grid[1], dtype=torch.float64, device=x.device)
