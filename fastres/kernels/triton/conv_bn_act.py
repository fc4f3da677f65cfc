"""Triton conv_bn_act and conv_bn_add_act: NHWC implicit GEMM, 1x1 and 3x3, with bias, residual and activation.

Batch norm comes folded into the weights and the bias. The caller keeps both, the weights as ``pack`` returns them.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton import configs
from fastres.kernels.triton import why_not as why_not_here
from fastres.kernels.triton.bn_act import parameters
from fastres.kernels.triton.device import activate, index_type, launch, load_parameter

KERNELS = ((1, 1), (3, 3))


@triton.jit
def _tile_order(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile: bands of GROUP_M rows, column by column, so that neighbours in time share operands in L2."""
    program = tl.program_id(0)
    band = GROUP_M * tiles_n
    first = program // band * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % band % rows, program % band // rows


@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, pixel, n, pixels, channels_out, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus the convolution of the tile pixel x n, over filter taps and blocks of input channels."""
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K  # per filter tap
    if POINTWISE:  # output pixel i is input pixel i
        top, left, origin = pixel, pixel, pixel
    else:
        image = pixel // (out_height * out_width)
        top = pixel // out_width % out_height * stride_h - padding_h
        left = pixel % out_width * stride_w - padding_w
        origin = (image * height + top) * width + left
    k = tl.arange(0, BLOCK_K)
    for step in range(KH * KW * STEPS):
        tap, c = step // STEPS, step % STEPS * BLOCK_K + k
        row, column = tap // KW * dilation_h, tap % KW * dilation_w
        inside = pixel < pixels
        if not POINTWISE:
            inside &= (top + row >= 0) & (top + row < height) & (left + column >= 0) & (left + column < width)
        x_mask, weight_mask = inside[:, None], (n < channels_out)[None, :]
        if C_IN % BLOCK_K != 0:
            x_mask, weight_mask = x_mask & (c < C_IN)[None, :], weight_mask & (c < C_IN)[:, None]
        x = tl.load(x_ptr + (origin + row * width + column)[:, None] * C_IN + c[None, :], mask=x_mask, other=0.0)
        weight_offset = n[None, :] * (KH * KW * C_IN) + tap * C_IN + c[:, None]
        weight = tl.load(weight_ptr + weight_offset, mask=weight_mask, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_act_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, pixels, channels_out, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = act(conv(x) + bias [+ residual])
    # x, residual, y NHWC, weight [C_OUT, KH, KW, C_IN]; a program owns BLOCK_M output pixels x BLOCK_N output channels
    # x and weight once per tile that needs them, one write (and one read of residual) of the element size per output
    # fp32 accumulator, rounded once; PRECISION is that of fp32 products (UPCAST: the interpreter's bf16)
    # any size: pixels beyond the image, tiles beyond the tensor and channels beyond C_IN are masked to zero
    pid_m, pid_n = _tile_order(tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels_out, BLOCK_N), GROUP_M)
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = pixel[:, None] * channels_out + n[None, :]
    valid = (pixel < pixels)[:, None] & (n < channels_out)[None, :]

    # The accumulator starts at bias + residual: after the loop their registers would come on top of its own.
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    acc += load_parameter(bias_ptr, n, n < channels_out, 0.0)[None, :]

    acc = _accumulate(
        acc, x_ptr, weight_ptr, pixel, n, pixels, channels_out, height, width, out_height, out_width,
        stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        C_IN, KH, KW, POINTWISE, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    tl.store(y_ptr + offset, activate(acc, ACT).to(y_ptr.dtype.element_ty), mask=valid)


def pack(weight: Tensor) -> Tensor:
    """Weights as the kernel reads them, [C_out, KH * KW * C_in]: a view where they are channels_last."""
    return weight.resolve_neg().permute(0, 2, 3, 1).contiguous().flatten(1)


def conv_act(
    x: Tensor, weight_packed: Tensor, bias: Tensor | None, residual: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], act: str, allow_tf32: bool | None = None,
    config: configs.ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias [+ residual]): weights packed by ``pack``, a batch norm folded into them or absent.

    fp32 products use TF32 where allow_tf32 says so, or by default where torch.backends.cudnn.conv does.
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
    if allow_tf32 is None:
        allow_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    tf32 = allow_tf32 and x.dtype == torch.float32
    config = config or heuristic(x, channels_out, pixels, kernel, tf32)
    launch(
        _conv_act_kernel, (triton.cdiv(pixels, config.block_m) * triton.cdiv(channels_out, config.block_n),), x,
        x.resolve_neg(), weight_packed, *parameters(bias), None if residual is None else residual.resolve_neg(), y,
        pixels, channels_out, height, width, out_height, out_width, *stride, *padding, *dilation,
        C_IN=channels_in, KH=kernel[0], KW=kernel[1], ACT=act,
        POINTWISE=(*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0),
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
    if groups != 1:
        return f"it has no grouped convolution, got groups={groups}"
    if tuple(weight.shape[2:]) not in KERNELS:
        return f"the kernel size must be one of {KERNELS}, got {tuple(weight.shape[2:])}"
    if memory_format(x) is not torch.channels_last:
        return f"x must be channels_last, got strides {tuple(x.stride())}"
    return why_not_here(x)


def heuristic(x: Tensor, channels_out: int, pixels: int, kernel: list[int], tf32: bool) -> configs.ConvConfig:
    """The configuration for one convolution on x's device where none has been tuned."""
    depth = kernel[0] * kernel[1] * x.shape[1]
    return configs.conv_heuristic(pixels, channels_out, depth, x.element_size(), tf32, limits(x.device))


def candidates(x: Tensor, tf32: bool = False) -> list[configs.ConvConfig]:
    """The configurations tuning may choose from on x's device."""
    return configs.conv_candidates(x.element_size(), tf32, limits(x.device))


@functools.cache
def limits(device: torch.device) -> configs.Limits:
    """What the device allows; the interpreter, on the CPU, is held to sm_80's limits."""
    if device.type != "cuda":
        return configs.Limits(80, 163 << 10)
    found = torch.cuda.get_device_properties(device)
    shared_bytes = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return configs.Limits(10 * found.major + found.minor, shared_bytes)
