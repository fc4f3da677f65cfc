"""Triton conv_bn_act and conv_bn_add_act: NHWC implicit GEMM, any window, grouped too, with bias, residual and activation.

Batch norm comes folded into the weights and the bias. The caller keeps both, the weights as ``pack`` returns them.
Where fp32 products are TF32's, ``pack`` rounds the weights and the kernels round x.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton import configs, pointwise
from fastres.kernels.triton import why_not as why_not_here
from fastres.kernels.triton.bn_act import parameters
from fastres.kernels.triton.device import (
    activate,
    index_type,
    launch,
    load_parameter,
    nearest,
    nearest_tf32,
    tile_order,
)

FEW_CHANNELS = 32  # of a group, below which blocks of channels would be mostly empty: taps and channels share them


@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, pixel, channel, n, n_valid, pixels, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus the convolution of the tile pixel x n, over taps and blocks of the group's channels from ``channel`` on.

    FLAT: blocks go through taps and channels as one, as few channels (a stem, small groups) ask.
    """
    DEPTH: tl.constexpr = KH * KW * C_IN
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K  # per filter tap
    if POINTWISE:  # output pixel i is input pixel i
        top, left, origin = pixel, pixel, pixel
    else:
        image = pixel // (out_height * out_width)
        top = pixel // out_width % out_height * stride_h - padding_h
        left = pixel % out_width * stride_w - padding_w
        origin = (image * height + top) * width + left
    k = tl.arange(0, BLOCK_K)
    for step in range((DEPTH + BLOCK_K - 1) // BLOCK_K if FLAT else KH * KW * STEPS):
        inside = pixel < pixels
        if FLAT:  # a tap for each k
            first, c = step * BLOCK_K, (step * BLOCK_K + k) % C_IN
            tap, k_valid = (step * BLOCK_K + k) // C_IN, step * BLOCK_K + k < DEPTH
            row, column = (tap // KW * dilation_h)[None, :], (tap % KW * dilation_w)[None, :]
            y, x = top[:, None] + row, left[:, None] + column
            x_mask = inside[:, None] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = origin[:, None] + (row * width + column)
        else:  # one for the block
            tap, c = step // STEPS, step % STEPS * BLOCK_K + k
            first, k_valid = tap * C_IN + step % STEPS * BLOCK_K, c < C_IN
            row, column = tap // KW * dilation_h, tap % KW * dilation_w
            if not POINTWISE:
                inside &= (top + row >= 0) & (top + row < height) & (left + column >= 0) & (left + column < width)
            x_mask, place = inside[:, None], (origin + row * width + column)[:, None]
        weight_mask = n_valid[None, :]
        if FLAT or C_IN % BLOCK_K != 0:
            x_mask, weight_mask = x_mask & k_valid[None, :], weight_mask & k_valid[:, None]
        a = tl.load(x_ptr + place * (C_IN * GROUPS) + (channel + c)[None, :], mask=x_mask, other=0.0)
        b = tl.load(weight_ptr + n[None, :] * DEPTH + (first + k)[:, None], mask=weight_mask, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(nearest(a, PRECISION), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_act_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, pixels, channels_out, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr,
    FLAT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = act(conv(x) + bias [+ residual])
    # x, residual, y NHWC, weight [channels_out, KH, KW, C_IN], C_IN those of a group; a program owns BLOCK_M output pixels x
    #   BLOCK_N output channels of one group
    # x and weight once per tile that needs them, one write (and one read of residual) of the element size per output
    # fp32 accumulator, rounded once; PRECISION is that of fp32 products (UPCAST: the interpreter's bf16)
    # any size: pixels beyond the image, tiles beyond the tensor and channels beyond C_IN are masked to zero
    of_group = channels_out // GROUPS
    tiles_n = tl.cdiv(of_group, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), GROUPS * tiles_n, GROUP_M)
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUPS == 1:  # written apart: registers are scarce
        group = 0
        n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_valid = n < channels_out
    else:
        group, in_group = pid_n // tiles_n, pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n, n_valid = group * of_group + in_group, in_group < of_group
    offset = pixel[:, None] * channels_out + n[None, :]
    valid = (pixel < pixels)[:, None] & n_valid[None, :]

    # The accumulator starts at bias + residual: after the loop their registers would come on top of its own.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    acc += load_parameter(bias_ptr, n, n_valid, 0.0)[None, :]

    acc = _accumulate(
        acc, x_ptr, weight_ptr, pixel, group * C_IN, n, n_valid, pixels, height, width, out_height, out_width,
        stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        C_IN, GROUPS, KH, KW, POINTWISE, FLAT, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    tl.store(y_ptr + offset, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=valid)


def is_tf32(x: Tensor) -> bool:
    """Whether products of x are TF32's by PyTorch's settings; never in the interpreter, on the CPU."""
    wanted = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return wanted and x.is_cuda and x.dtype == torch.float32


def pack(weight: Tensor, tf32: bool) -> Tensor:
    """Weights as the kernel reads them, [C_out, KH * KW * C_in of a group]: a view where they are channels_last.

    tf32: rounded for products in TF32.
    """
    packed = weight.resolve_neg().permute(0, 2, 3, 1).contiguous().flatten(1)
    return nearest_tf32(packed) if tf32 else packed


def conv_act(
    x: Tensor, weight_packed: Tensor, bias: Tensor | None, residual: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], act: str, tf32: bool,
    config: configs.ConvConfig | None = None, groups: int = 1,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias [+ residual]): weights packed by ``pack``, a batch norm folded into them or absent.

    tf32: fp32 products are TF32's, as the weights were packed for.
    """
    images, channels_in, height, width = x.shape
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    pixels, channels_out = images * out_height * out_width, weight_packed.shape[0]
    y = torch.empty(
        (images, channels_out, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    size = pixels, channels_in, channels_out, x.element_size()
    config = config or heuristic(x.device, *size, kernel, stride, padding, groups, tf32)
    if config.persistent:
        on = limits(x.device).multiprocessors
        pointwise.conv_act(x, weight_packed, bias, residual, y, act, tf32, config, on)
        return y
    tiles_n = groups * triton.cdiv(channels_out // groups, config.block_n)
    launch(
        _conv_act_kernel, (triton.cdiv(pixels, config.block_m) * tiles_n,), x,
        x.resolve_neg(), weight_packed, *parameters(bias), None if residual is None else residual.resolve_neg(), y,
        pixels, channels_out, height, width, out_height, out_width, *stride, *padding, *dilation,
        C_IN=channels_in // groups, GROUPS=groups, KH=kernel[0], KW=kernel[1], ACT=act,
        POINTWISE=(*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0),
        FLAT=has_few_channels(channels_in // groups, kernel),
        PRECISION="tf32" if tf32 else "ieee", UPCAST=triton_interpret() and x.dtype == torch.bfloat16,
        INDEX=index_type(max(x.numel(), y.numel(), weight_packed.numel())),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float, stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str,
) -> str | None:  # fmt: skip
    """Why the kernel cannot run this convolution, or None."""
    if memory_format(x) is not torch.channels_last:
        return f"x must be channels_last, got strides {tuple(x.stride())}"
    return why_not_here(x)


def heuristic(
    device: torch.device, pixels: int, channels: int, channels_out: int, itemsize: int, kernel: list[int],
    stride: list[int], padding: list[int], groups: int, tf32: bool,
) -> configs.ConvConfig:  # fmt: skip
    """The configuration for one convolution where none has been tuned; its groups are as many more pixels."""
    few, depth = has_few_channels(channels // groups, kernel), kernel[0] * kernel[1] * channels // groups
    described = pointwise.suits(pixels, channels, channels_out, itemsize, kernel, stride, padding, groups)
    size = pixels * groups, channels_out // groups, depth
    return configs.conv_heuristic(*size, itemsize, tf32, limits(device), few, described)


def has_few_channels(channels: int, kernel: list[int]) -> bool:
    """Whether blocks of a group's channels would be mostly empty."""
    return channels < FEW_CHANNELS and kernel[0] * kernel[1] > 1


def candidates(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], groups: int, tf32: bool = False
) -> list[configs.ConvConfig]:
    """The configurations tuning may choose from for a convolution on x's device."""
    kernel, itemsize = list(weight.shape[2:]), x.element_size()
    pixels = x.numel() // x.shape[1]  # and of the output: elsewhere the answer is no
    described = pointwise.suits(pixels, x.shape[1], weight.shape[0], itemsize, kernel, stride, padding, groups)
    return configs.conv_candidates(itemsize, tf32, limits(x.device), has_few_channels(weight.shape[1], kernel), described)


@functools.cache
def limits(device: torch.device) -> configs.Limits:
    """What the device allows; the interpreter, on the CPU, has sm_90's limits and few programs, which walk many tiles."""
    if device.type != "cuda":
        return configs.Limits(90, 227 << 10, 3)
    found = torch.cuda.get_device_properties(device)
    shared_bytes = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return configs.Limits(10 * found.major + found.minor, shared_bytes, found.multi_processor_count)
