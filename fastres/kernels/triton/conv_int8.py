"""Triton conv_int8: NHWC implicit GEMM of int8 operands, any window, scaled back to int8 or to float32 in its epilogue."""

import ctypes
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton import configs
from fastres.kernels.triton.conv_bn_act import has_few_channels, limits, pack
from fastres.kernels.triton.device import index_type, launch, tile_order
from fastres.kernels.triton.int8 import fused, stored, within

TILES = (  # priors from arithmetic, as in configs: a block of k is as many bytes as there
    configs.ConvConfig(128, 128, 128, 8, 4),
    configs.ConvConfig(128, 128, 64, 8, 4, efficiency=0.9),
    configs.ConvConfig(256, 64, 64, 8, 4, efficiency=0.85),
    configs.ConvConfig(128, 64, 128, 4, 4, efficiency=0.8),
    configs.ConvConfig(128, 64, 64, 4, 5, efficiency=0.75),
    configs.ConvConfig(64, 128, 64, 4, 5, efficiency=0.75),
    configs.ConvConfig(64, 64, 128, 4, 4, efficiency=0.6),
    configs.ConvConfig(128, 32, 64, 4, 5, efficiency=0.5),
    configs.ConvConfig(64, 16, 64, 4, 5, efficiency=0.25),
)
FEW_CHANNELS = (  # addresses for every word of four channels, else for every element: small tiles
    configs.ConvConfig(128, 64, 32, 4, 3),
    configs.ConvConfig(64, 64, 32, 4, 3, efficiency=0.8),
    configs.ConvConfig(128, 32, 32, 8, 3, efficiency=0.8),
    configs.ConvConfig(64, 16, 32, 4, 3, efficiency=0.4),
)


@triton.jit
def _conv_int8_kernel(
    x_ptr, weight_ptr, start_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, residual_scale, pixels, channels_out,
    height, width, out_height, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, PADDED: tl.constexpr,
    PAD: tl.constexpr, INTEGERS: tl.constexpr, INTERPRETED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = stored((start + conv(x)) * scale + bias [+ (residual + 128) * residual_scale])
    # x, residual, y NHWC, weight [channels_out, KH, KW, C_IN]; a program owns BLOCK_M output pixels x BLOCK_N output channels
    # x and weight once per tile that needs them, one byte (one of the residual) per output, or four of float32
    # int32 accumulator, exact; float32 from there, each multiplication and addition rounded once, then to even and saturated
    # any size: taps beyond the image read PAD; what lies beyond pixels or channels meets weights of zero or is not stored
    DEPTH: tl.constexpr = KH * KW * C_IN
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K  # per filter tap
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels_out, BLOCK_N), GROUP_M)
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_valid = n < channels_out
    if POINTWISE:  # output pixel i is input pixel i
        top, left, origin = pixel, pixel, pixel
    else:
        image = pixel // (out_height * out_width)
        top = pixel // out_width % out_height * stride_h - padding_h
        left = pixel % out_width * stride_w - padding_w
        origin = (image * height + top) * width + left
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32) + tl.load(start_ptr + n, mask=n_valid, other=0)[None, :]
    for step in range((DEPTH + BLOCK_K - 1) // BLOCK_K if FLAT else KH * KW * STEPS):
        inside = pixel < pixels
        if FLAT:  # a tap for each k
            first, c = step * BLOCK_K, (step * BLOCK_K + k) % C_IN
            tap, k_valid = (step * BLOCK_K + k) // C_IN, step * BLOCK_K + k < DEPTH
            row, column = (tap // KW * dilation_h)[None, :], (tap % KW * dilation_w)[None, :]
            x_mask = inside[:, None]
            if PADDED:
                x_mask &= within(top[:, None] + row, left[:, None] + column, height, width)
            place = origin[:, None] + (row * width + column)
        else:  # one for the block
            tap, c = step // STEPS, step % STEPS * BLOCK_K + k
            first, k_valid = tap * C_IN + step % STEPS * BLOCK_K, c < C_IN
            row, column = tap // KW * dilation_h, tap % KW * dilation_w
            if PADDED:
                inside &= within(top + row, left + column, height, width)
            x_mask, place = inside[:, None], (origin + row * width + column)[:, None]
        weight_mask = n_valid[None, :]
        if FLAT or C_IN % BLOCK_K != 0:
            x_mask, weight_mask = x_mask & k_valid[None, :], weight_mask & k_valid[:, None]
        a = tl.load(x_ptr + place * C_IN + c[None, :], mask=x_mask, other=PAD)
        b = tl.load(weight_ptr + n[None, :] * DEPTH + (first + k)[:, None], mask=weight_mask, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)

    offset = pixel[:, None] * channels_out + n[None, :]
    valid = (pixel < pixels)[:, None] & n_valid[None, :]
    scale = tl.load(scale_ptr + n, mask=n_valid, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n_valid, other=0.0)
    value = fused(acc.to(tl.float32), scale[None, :], bias[None, :], INTERPRETED)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=valid, other=0).to(tl.float32) + 128.0
        value = fused(residual, residual_scale, value, INTERPRETED)
    tl.store(y_ptr + offset, stored(value) if INTEGERS else value, mask=valid)


def conv_int8(
    x: Tensor, residual: Tensor | None, weight: Tensor, start: Tensor, scale: Tensor, bias: Tensor, residual_scale: float,
    pad: int, stride: list[int], padding: list[int], dilation: list[int], integers: bool, config: tuple | None = None,
) -> Tensor:  # fmt: skip
    """The op; the weights are read where they lie if they are channels_last."""
    images, channels, height, width = x.shape
    channels_out, _, *kernel = weight.shape
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    y = torch.empty(
        (images, channels_out, out_height, out_width), dtype=torch.int8 if integers else torch.float32, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    pixels, few = images * out_height * out_width, has_few_channels(channels, kernel)
    config = config or heuristic(pixels, channels_out, weight[0].numel(), limits(x.device), few)
    tile = configs.ConvConfig(*config)
    start, scale, bias = (t.resolve_neg().contiguous() for t in (start, scale, bias))
    launch(
        _conv_int8_kernel, (triton.cdiv(pixels, tile.block_m) * triton.cdiv(channels_out, tile.block_n),), x,
        x.resolve_neg(), pack(weight, False), start, scale, bias, None if residual is None else residual.resolve_neg(), y,
        ctypes.c_float(residual_scale).value, pixels, channels_out, height, width, out_height, out_width,
        *stride, *padding, *dilation,
        C_IN=channels, KH=kernel[0], KW=kernel[1], POINTWISE=(*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0), FLAT=few,
        PADDED=any(padding), PAD=pad if any(padding) else 0, INTEGERS=integers, INTERPRETED=triton_interpret(),
        INDEX=index_type(max(x.numel(), y.numel(), weight.numel())),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y.contiguous(memory_format=memory_format(x))  # of a single pixel or channel, which lie alike in both


def offered(device_limits: configs.Limits, few: bool) -> list[configs.ConvConfig]:
    """The tiles that fit a device."""
    return [
        tile for tile in (FEW_CHANNELS if few else TILES)
        if tile.capability <= device_limits.capability and tile.shared_bytes(1) <= device_limits.shared_bytes
    ]  # fmt: skip


def candidates(device: torch.device, weight: Tensor) -> list[tuple]:
    """The tiles that tuning may choose from for a convolution."""
    return list(map(tuple, offered(limits(device), has_few_channels(weight.shape[1], list(weight.shape[2:])))))


@functools.lru_cache(maxsize=1024)
def heuristic(pixels: int, channels_out: int, depth: int, device_limits: configs.Limits, few: bool) -> configs.ConvConfig:
    """The tile with the least estimated time: waves of tiles x padded work of a tile / its efficiency, as in ``configs``."""

    def time(tile: configs.ConvConfig) -> float:
        tiles = -(-pixels // tile.block_m) * -(-channels_out // tile.block_n)
        waves = -(-tiles // device_limits.multiprocessors)
        return waves * tile.block_m * tile.block_n * -(-depth // tile.block_k) * tile.block_k / tile.efficiency

    return min(offered(device_limits, few), key=time)
