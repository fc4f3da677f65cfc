"""Triton kernels of the batch-norm family: statistics, normalisation, backward, in both memory formats.

A tile is [BLOCK_E elements, BLOCK_C channels]. The elements of a channel are numbered 0 .. N*H*W - 1 in memory order,
and a program walks ``tiles`` consecutive tiles of them with its channels' parameters in registers. Reductions hold one
fp32 result per lane, merge the lanes in a fixed fp64 tree, store one partial per program and merge those in a second
kernel: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

from fastres.kernels.triton.device import activate, load_affine, load_parameter, mask_gradient, normalize
from fastres.kernels.triton.relu_mask import masked, store_packed


@triton.jit
def _channels(channels, INDEX: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's channels, shape [1, BLOCK_C], and which of them exist."""
    channel = (tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return channel, channel < channels


@triton.jit
def _share(tiles, INDEX: tl.constexpr):
    """First tile of this program's share, and the first beyond it."""
    first = tl.program_id(1).to(INDEX) * tiles
    return first, first + tiles


@triton.jit
def _elements(tile, BLOCK_E: tl.constexpr):
    """The elements of a tile, shape [BLOCK_E, 1]."""
    return (tile * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]


@triton.jit
def _offsets(element, channel, channels, plane, CHANNELS_LAST: tl.constexpr):
    """Offset of each (element, channel); plane is H*W."""
    if CHANNELS_LAST:
        offset = element * channels + channel
    else:
        offset = (element // plane * channels + channel) * plane + element % plane
    return offset


@triton.jit
def _sum(lanes):
    """Sum of lanes or partials, along axis 0, in fp64: opposite signs cancel."""
    return tl.sum(lanes.to(tl.float64), axis=0)[None, :]


@triton.jit
def _pivot(x_ptr, channel, channel_ok, channels, plane, SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Mean of each channel's first SAMPLE elements, if far from zero; exact if they are equal, SAMPLE a power of two.

    Else 0: subtracting a pivot from values of both signs would only round them.
    """
    offset = _offsets(tl.arange(0, SAMPLE)[:, None], channel, channels, plane, CHANNELS_LAST)
    x = tl.load(x_ptr + offset, mask=channel_ok, other=0.0).to(tl.float32)
    mean = tl.sum(x * (1.0 / SAMPLE), axis=0)[None, :]
    var = tl.sum((x - mean) * (x - mean) * (1.0 / SAMPLE), axis=0)[None, :]
    return tl.where(mean * mean > 16 * var, mean, 0.0)


@triton.jit
def _merge(mean, m2, count, total):
    """Merge along axis 0 the statistics of disjoint sets: mean, sum of squared deviations, count (Chan et al. 1983).

    total is the sum of count, known to the caller: one scalar division, not one per lane.
    """
    merged = _sum(count * mean) * (tl.full([], 1.0, tl.float64) / total)
    delta = tl.where(count > 0, mean - merged, 0.0).to(tl.float32)
    return merged, tl.sum(m2 + count * delta * delta, axis=0)[None, :]


@triton.jit
def bn_statistics_kernel(
    x_ptr, partial_mean_ptr, partial_m2_ptr, pivot_ptr, elements, channels, plane, tiles, SAMPLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # of d = x - pivot: mean and M2 = sum (d - mean(d))^2 of this program's elements, per channel
    # grid (channel tiles, programs along elements); partials are [channels, programs]
    # one read of the element size per element
    # Welford in fp32 per lane, lanes merged in fp64; d keeps its bits where x is far from zero
    # a lane that saw no element has count 0; a constant channel has d = 0, so M2 = 0 exactly
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    pivot = _pivot(x_ptr, channel, channel_ok, channels, plane, SAMPLE, CHANNELS_LAST)
    mean = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_E, 1], tl.float32)
    seen = 0.0
    first, end = _share(tiles, INDEX)
    tile = first
    while tile < end:
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        d = x - pivot
        delta = tl.where(valid, d - mean, 0.0)
        seen += 1.0
        mean += delta * tl.div_rn(1.0, seen)
        m2 += delta * tl.where(valid, d - mean, 0.0)
        count += tl.where(element < elements, 1.0, 0.0)
        tile += 1

    mean, m2 = _merge(mean, m2, count, tl.minimum(end * BLOCK_E, elements) - first * BLOCK_E)
    partial = channel * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_mean_ptr + partial, mean, mask=channel_ok)
    tl.store(partial_m2_ptr + partial, m2, mask=channel_ok)
    if tl.program_id(1) == 0:
        tl.store(pivot_ptr + channel, pivot, mask=channel_ok)


@triton.jit
def bn_statistics_merge_kernel(
    partial_mean_ptr, partial_m2_ptr, mean_ptr, var_ptr, elements, share, programs, BLOCK_P: tl.constexpr
):
    # mean = pivot + mean(d) and biased variance of one channel from its partials
    # program c owns channel c; its partials are adjacent; its pivot is in mean_ptr, where the mean replaces it
    # two fp64 reads per partial
    # fp64, rounded once
    # every partial but the last has ``share`` elements; none is empty
    channel = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    partial = channel * programs + p
    mean = tl.load(partial_mean_ptr + partial, mask=p < programs, other=0.0)
    m2 = tl.load(partial_m2_ptr + partial, mask=p < programs, other=0.0)
    count = tl.where(p < programs, tl.minimum(elements - p.to(tl.int64) * share, share), 0).to(tl.float32)
    mean, m2 = _merge(mean, m2, count, elements)
    tl.store(mean_ptr + channel, tl.load(mean_ptr + channel) + mean)
    tl.store(var_ptr + channel, m2 / elements)


@triton.jit
def bn_act_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, elements, channels, plane, tiles, eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # y = act((x - mean) * invstd * weight + bias [+ residual])
    # grid (channel tiles, programs along elements)
    # 2 accesses of the element size per output, 3 with a residual; a bit where a mask is given
    # fp32, rounded once
    # tiles go backwards: a statistics pass over the same partition has left the last ones in L2
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        v = normalize(x, mean, scale, bias)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        y = activate(v, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, mask=valid)
        if mask_ptr is not None:
            store_packed(mask_ptr, y, tile, elements, channels, plane, CHANNELS_LAST, INDEX, BLOCK_E, BLOCK_C)


@triton.jit
def bn_act_backward_reduce_kernel(
    grad_y_ptr, grad_y2_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, dz_ptr, grad_x_ptr,
    partial_dz_ptr, partial_dzx_ptr, elements, channels, plane, tiles, eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dz = mask * (grad_y [+ grad_y2]); partial sums of dz and dz * (x - mean), per channel
    # grid and partials as in the statistics
    # reads grad_y, grad_y2 and x, and the mask where it is given; else y is computed again from x. Writes dz where asked
    # fp32 sums per lane, lanes merged in fp64; dz is exact, but for a sum's one rounding where it is written
    # evaluation (grad_x_ptr given) has constant statistics, so grad_x = scale * dz is finished in this pass
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    sum_dz = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    sum_dzx = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    tile, end = _share(tiles, INDEX)
    while tile < end:
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offset, mask=valid, other=0.0)
        if grad_y2_ptr is not None:
            grad_y = grad_y.to(tl.float32) + tl.load(grad_y2_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        if mask_ptr is None:
            dz = mask_gradient(grad_y, normalize(x, mean, scale, bias).to(x_ptr.dtype.element_ty), ACT)
        else:
            dz = masked(grad_y, mask_ptr, offset, valid, ACT)
        if dz_ptr is not None:
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=valid)
        dz = dz.to(tl.float32)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + offset, (scale * dz).to(grad_x_ptr.dtype.element_ty), mask=valid)
        sum_dz += dz
        sum_dzx += dz * tl.where(valid, x - mean, 0.0)
        tile += 1

    partial = channel * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_dz_ptr + partial, _sum(sum_dz), mask=channel_ok)
    tl.store(partial_dzx_ptr + partial, _sum(sum_dzx), mask=channel_ok)


@triton.jit
def bn_act_backward_merge_kernel(
    partial_dz_ptr, partial_dzx_ptr, var_ptr, grad_weight_ptr, grad_bias_ptr, programs, eps, BLOCK_P: tl.constexpr
):
    # grad_bias = sum dz; grad_weight = sum dz * (x - mean) * invstd
    # program c owns channel c; its partials are adjacent
    # two fp64 reads per partial
    # fp64 in a fixed tree, rounded once
    # the outputs are fp32 whatever the parameters' dtype: grad_x is computed from them
    channel = (tl.program_id(0).to(tl.int64) + tl.arange(0, 1))[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    partial = channel * programs + p
    sum_dz = _sum(tl.load(partial_dz_ptr + partial, mask=p < programs, other=0.0))
    sum_dzx = _sum(tl.load(partial_dzx_ptr + partial, mask=p < programs, other=0.0))
    invstd = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + channel).to(tl.float32) + eps))
    tl.store(grad_bias_ptr + channel, sum_dz)
    tl.store(grad_weight_ptr + channel, sum_dzx * invstd)


@triton.jit
def bn_act_backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, grad_weight_ptr, grad_bias_ptr, grad_x_ptr,
    elements, channels, plane, tiles, eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # grad_x = weight * invstd * (dz - grad_bias / n - xhat * grad_weight / n), the training form
    # grid (channel tiles, programs along elements)
    # 3 accesses of the element size per output
    # fp32, rounded once; no division by weight, which may be 0
    # ACT "none" takes grad_y for dz; else the mask is that of y computed again from x. Backwards, for L2
    channel, channel_ok = _channels(channels, INDEX, BLOCK_C)
    mean, invstd, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, channel_ok, eps)
    mean_dz = load_parameter(grad_bias_ptr, channel, channel_ok, 0.0) / elements
    slope = invstd * load_parameter(grad_weight_ptr, channel, channel_ok, 0.0) / elements
    first, tile = _share(tiles, INDEX)
    while tile > first:
        tile -= 1
        element = _elements(tile, BLOCK_E)
        valid = (element < elements) & channel_ok
        offset = _offsets(element, channel, channels, plane, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offset, mask=valid, other=0.0)
        y = normalize(x, mean, scale, bias).to(x_ptr.dtype.element_ty)
        dz = mask_gradient(grad_y, y, ACT).to(tl.float32)
        grad_x = scale * (dz - mean_dz - (x - mean) * slope)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)
