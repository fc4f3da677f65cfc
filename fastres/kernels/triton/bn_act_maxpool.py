"""Triton bn_act_maxpool: y = max_pool(act(batch_norm(x))), evaluation, training and backward.

Tiles, partitions and reductions are those of batch_norm, over the elements of y or of x. The position of each maximum in
its window is found again in backward, and kept there as one byte, so that every element of x can gather its gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.kernels.triton import batch_norm, bn_act, configs
from fastres.kernels.triton.batch_norm import _channels, _elements, _offsets, _share, _sum
from fastres.kernels.triton.device import activate, launch, load_affine, load_parameter, normalize

NO_TAP = tl.constexpr(255)  # the byte of a window whose gradient the ReLU stops


@triton.jit
def _pixel(element, height, width):
    """Image, row and column of elements numbered through all images of this size."""
    return element // (height * width), element // width % height, element % width


@triton.jit
def _find(
    x_ptr, image, row, column, valid, channel, channels, height, width, mean, scale, bias, ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """The maximum of each window, its tap and its x, as torch.max_pool2d finds them: the first one, or the last NaN."""
    best = tl.full(valid.shape, float("-inf"), tl.float32)
    best_x = tl.zeros(valid.shape, tl.float32)
    tap = tl.full(valid.shape, -1, tl.int32)
    for kernel_row in range(KH):
        y = row * SH - PH + kernel_row
        for kernel_column in tl.static_range(KW):
            x = column * SW - PW + kernel_column
            inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            offset = _offsets((image * height + y) * width + x, channel, channels, height * width, CHANNELS_LAST)
            v = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            z = activate(normalize(v, mean, scale, bias), ACT).to(x_ptr.dtype.element_ty).to(tl.float32)
            better = inside & ((tap < 0) | (z > best) | (z != z))
            best, best_x = tl.where(better, z, best), tl.where(better, v, best_x)
            tap = tl.where(better, kernel_row * KW + kernel_column, tap)
    return best, best_x, tap


@triton.jit
def bn_act_maxpool_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, elements, channels, plane, tiles, height, width, out_height,
    out_width, eps, ACT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # y = max over the window of act((x - mean) * invstd * weight + bias)
    # grid (channel tiles, programs along the elements of y)
    # one read of x's elements (what windows share is in the caches), one write of y's; nothing normalised is written
    # fp32, rounded before it is compared
    # padding is masked out, never compared. Backwards, for L2
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        image, row, column = _pixel(element, out_height, out_width)
        best, _x, _tap = _find(
            x_ptr, image, row, column, valid, channel, channels, height, width, mean, scale, bias, ACT, CHANNELS_LAST,
            KH, KW, SH, SW, PH, PW,
        )  # fmt: skip
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        tl.store(y_ptr + offset, best.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def bn_act_maxpool_backward_reduce_kernel(
    grad_y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, tap_ptr, partial_dz_ptr, partial_dzx_ptr,
    elements, channels, plane, tiles, height, width, out_height, out_width, eps,
    ACT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # partial sums of dz and dz * (x - mean) per channel, dz at the maxima; the tap of each maximum
    # grid and partials as in batch_norm's backward, along the elements of grad_y
    # reads x and grad_y, writes a byte per element of grad_y
    # fp32 sums per lane, lanes merged in fp64
    # a maximum that the ReLU stops has no tap: no element of x will take its gradient
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    sum_dz = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    sum_dzx = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    tile, end = _share(tiles, INDEX)
    while tile < end:
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        image, row, column = _pixel(element, out_height, out_width)
        best, best_x, tap = _find(
            x_ptr, image, row, column, valid, channel, channels, height, width, mean, scale, bias, ACT, CHANNELS_LAST,
            KH, KW, SH, SW, PH, PW,
        )  # fmt: skip
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        dz = tl.load(grad_y_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        if ACT == "relu":
            dz, tap = tl.where(best <= 0, 0.0, dz), tl.where(best <= 0, NO_TAP, tap)
        tl.store(tap_ptr + offset, tap.to(tl.uint8), mask=valid)
        sum_dz += dz
        sum_dzx += dz * tl.where(valid, best_x - mean, 0.0)
        tile += 1

    partial = channel * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_dz_ptr + partial, _sum(sum_dz), mask=channel_ok)
    tl.store(partial_dzx_ptr + partial, _sum(sum_dzx), mask=channel_ok)


@triton.jit
def bn_act_maxpool_backward_kernel(
    grad_y_ptr, tap_ptr, x_ptr, weight_ptr, mean_ptr, var_ptr, grad_weight_ptr, grad_bias_ptr, grad_x_ptr,
    elements, channels, plane, tiles, height, width, out_height, out_width, eps, TRAINING: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dz = sum of the gradients of the windows whose tap is this element; grad_x from dz as in batch_norm's backward
    # grid (channel tiles, programs along the elements of x)
    # reads x, grad_y and the taps, writes grad_x
    # fp32, rounded once
    # a gather in a fixed order: no atomics. Backwards, for L2
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, invstd, scale, _ = load_affine(weight_ptr, None, mean_ptr, var_ptr, channel, channel_ok, eps)
    if TRAINING:
        mean_dz = load_parameter(grad_bias_ptr, channel, channel_ok, 0.0) / elements
        slope = invstd * load_parameter(grad_weight_ptr, channel, channel_ok, 0.0) / elements
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        image, row, column = _pixel(element, height, width)
        dz = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
        for above in range((KH - 1) // SH + 1):
            y = (row + PH) // SH - above
            tap_row = row + PH - y * SH
            for before in tl.static_range((KW - 1) // SW + 1):
                x = (column + PW) // SW - before
                tap_column = column + PW - x * SW
                inside = valid & (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
                inside &= (tap_row < KH) & (tap_column < KW)
                window = (image * out_height + y) * out_width + x
                offset = _offsets(window, channel, channels, out_height * out_width, CHANNELS_LAST)
                tap = tl.load(tap_ptr + offset, mask=inside, other=NO_TAP).to(tl.int32)
                grad_y = tl.load(grad_y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
                dz += tl.where(inside & (tap == tap_row * KW + tap_column), grad_y, 0.0)
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        if TRAINING:
            v = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            dz = dz - mean_dz - (v - mean) * slope
        tl.store(grad_x_ptr + offset, (scale * dz).to(grad_x_ptr.dtype.element_ty), mask=valid)


def bn_act_maxpool(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, act: str,
    kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    config: configs.TileConfig | None = None,
) -> Tensor:  # fmt: skip
    x = x.resolve_neg()
    shape = (*x.shape[:2], *map(pooled, x.shape[2:], kernel_size, stride, padding))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    cut = bn_act.plan(y, config or _tile(y, x), like=x)
    launch(
        bn_act_maxpool_kernel, cut.grid, x,
        x, y, *bn_act.parameters(weight, bias, mean, var), *cut.sizes, *x.shape[2:], *y.shape[2:], eps, act,
        *kernel_size, *stride, *padding, **cut.options,
    )  # fmt: skip
    return y


def bn_act_maxpool_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str,
    kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var = bn_act.statistics(x)
    return bn_act_maxpool(x, weight, bias, mean, var, eps, act, kernel_size, stride, padding), mean, var


def bn_act_maxpool_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    act: str, training: bool, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    config: configs.TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_y, x = grad_y.resolve_neg(), x.resolve_neg()
    scale, shift = bn_act.parameters(weight, bias)
    mean, var = mean.resolve_neg().contiguous(), var.resolve_neg().contiguous()
    sizes, window = (*x.shape[2:], *grad_y.shape[2:]), (*kernel_size, *stride, *padding)
    taps = torch.empty_like(grad_y, dtype=torch.uint8)
    cut = bn_act.plan(grad_y, config or _tile(grad_y, x), like=x)
    partial_dz, partial_dzx = bn_act.partials(x, cut), bn_act.partials(x, cut)
    launch(
        bn_act_maxpool_backward_reduce_kernel, cut.grid, x,
        grad_y, x, scale, shift, mean, var, taps, partial_dz, partial_dzx, *cut.sizes, *sizes, eps, act, *window,
        **cut.options,
    )  # fmt: skip
    grad_weight, grad_bias, programs = bn_act.per_channel(x), bn_act.per_channel(x), cut.grid[1]
    launch(
        batch_norm.bn_act_backward_merge_kernel, (x.shape[1],), x,
        partial_dz, partial_dzx, var, grad_weight, grad_bias, programs, eps, triton.next_power_of_2(programs),
    )  # fmt: skip
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    cut = bn_act.plan(x, config or _tile(x, x))
    launch(
        bn_act_maxpool_backward_kernel, cut.grid, x,
        grad_y, taps, x, scale, mean, var, grad_weight, grad_bias, grad_x, *cut.sizes, *sizes, eps, training, *window,
        **cut.options,
    )  # fmt: skip
    dtype = mean.dtype if weight is None else weight.dtype
    return grad_x, grad_weight.to(dtype), grad_bias.to(dtype if bias is None else bias.dtype)


def pooled(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _tile(tensor: Tensor, x: Tensor) -> configs.TileConfig:
    """Tile over the elements of x, or of what it is pooled to, in x's layout."""
    elements = tensor.shape[0] * tensor.shape[2] * tensor.shape[3]
    return configs.tile(elements, x.shape[1], memory_format(x) is torch.channels_last, pooled=True)

