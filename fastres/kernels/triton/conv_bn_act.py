"""Triton convolution + batch norm (evaluation) + residual + activation in one kernel: NHWC implicit GEMM, 1x1 and 3x3.

The batch norm is applied to the fp32 accumulator, so nothing is folded ahead of time and nothing can go stale; frozen
models that hold folded weights call ``conv_act`` with them instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton import configs
from fastres.kernels.triton import why_not as why_not_here
from fastres.kernels.triton.bn_act import parameters
from fastres.kernels.triton.device import activate, index_type, launch, load_affine, load_parameter, normalize

KERNELS = ((1, 1), (3, 3))


@triton.jit
def _tile_order(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile of this program: bands of GROUP_M rows, column by column, so that neighbours in time share operands in L2."""
    program = tl.program_id(0)
    band = GROUP_M * tiles_n
    first = program // band * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + program % band % rows, program % band // rows


@triton.jit
def _accumulate(
    x_ptr, weight_ptr, pixel, n, pixels, channels_out, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 convolution of BLOCK_M output pixels x BLOCK_N output channels, over filter taps and input channels."""
    steps: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K  # per filter tap
    if POINTWISE:  # output pixel i is input pixel i
        top, left, origin = pixel, pixel, pixel
    else:
        image = pixel // (out_height * out_width)
        top = pixel // out_width % out_height * stride_h - padding_h
        left = pixel % out_width * stride_w - padding_w
        origin = (image * height + top) * width + left
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(KH * KW * steps):
        tap, c = step // steps, step % steps * BLOCK_K + k
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
def _conv_bn_act_kernel(
    x_ptr, weight_ptr, residual_ptr, y_ptr, bias_ptr, bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, eps,
    pixels, channels_out, height, width, out_height, out_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = act((conv(x) + bias - mean) * invstd * bn_weight + bn_bias [+ residual])
    # x, residual, y NHWC, weight [C_OUT, KH, KW, C_IN]; a program owns a tile of output pixels x output channels
    # x and weight once per tile that needs them, one write (and one read of residual) of the element size per output
    # fp32 accumulator and epilogue, rounded once; PRECISION is that of fp32 products (UPCAST: the interpreter's bf16)
    # any size: pixels beyond the image, tiles beyond the tensor and channels beyond C_IN are masked to zero
    pid_m, pid_n = _tile_order(tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels_out, BLOCK_N), GROUP_M)
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    v = _accumulate(
        x_ptr, weight_ptr, pixel, n, pixels, channels_out, height, width, out_height, out_width,
        stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        C_IN, KH, KW, POINTWISE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    channel = n[None, :]
    if bias_ptr is not None:
        v += load_parameter(bias_ptr, channel, channel < channels_out, 0.0)
    if mean_ptr is not None:
        mean, _, scale, shift = load_affine(
            bn_weight_ptr, bn_bias_ptr, mean_ptr, var_ptr, channel, channel < channels_out, eps
        )
        v = normalize(v, mean, scale, shift)
    offset = pixel[:, None] * channels_out + channel
    valid = (pixel < pixels)[:, None] & (channel < channels_out)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, activate(v, ACT).to(y_ptr.dtype.element_ty), mask=valid)


def conv_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor,
    var: Tensor, eps: float, stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str,
    config: configs.ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    return conv_bn_add_act(
        x, None, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act, config
    )


def conv_bn_add_act(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, act: str, config: configs.ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    norm = parameters(bn_weight, bn_bias, mean, var)
    return _convolve(
        x, residual, pack(weight.to(x.dtype)), bias, norm, eps, weight.shape[2:], (stride, padding, dilation), act,
        None, config,
    )  # fmt: skip


def pack(weight: Tensor) -> Tensor:
    """Weights of a convolution as the kernel reads them, [C_out, KH * KW * C_in]: a view where they are channels_last."""
    return weight.resolve_neg().permute(0, 2, 3, 1).contiguous().flatten(1)


def conv_act(
    x: Tensor, weight_packed: Tensor, bias: Tensor | None, residual: Tensor | None, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], act: str, allow_tf32: bool | None = None,
    config: configs.ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias [+ residual]): weights packed by ``pack``, a batch norm folded into them or absent.

    fp32 products use TF32 where allow_tf32 says so, or by default where torch.backends.cudnn.conv does.
    """
    norm, geometry = (None, None, None, None), (stride, padding, dilation)
    return _convolve(x, residual, weight_packed, bias, norm, 0.0, kernel, geometry, act, allow_tf32, config)


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
    return configs.conv_heuristic(pixels, channels_out, depth, x.element_size(), tf32, shared_bytes(x.device))


def candidates(x: Tensor, tf32: bool = False) -> list[configs.ConvConfig]:
    """The configurations tuning may choose from on x's device."""
    return configs.conv_candidates(x.element_size(), tf32, shared_bytes(x.device))


def shared_bytes(device: torch.device) -> int:
    """Shared memory a block may use; where there is no device, that of sm_80."""
    if device.type != "cuda":
        return configs.SHARED_BYTES[80]
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _convolve(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, ...],
    eps: float, kernel: list[int], geometry: tuple[list[int], list[int], list[int]], act: str, allow_tf32: bool | None,
    config: configs.ConvConfig | None,
) -> Tensor:  # fmt: skip
    images, channels_in, height, width = x.shape
    stride, padding, dilation = geometry
    out_height, out_width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    pixels, channels_out = images * out_height * out_width, weight.shape[0]
    y = torch.empty(
        (images, channels_out, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if allow_tf32 is None:
        allow_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    tf32 = allow_tf32 and x.dtype == torch.float32
    config = config or heuristic(x, channels_out, pixels, kernel, tf32)
    launch(
        _conv_bn_act_kernel, (triton.cdiv(pixels, config.block_m) * triton.cdiv(channels_out, config.block_n),), x,
        x.resolve_neg(), weight, None if residual is None else residual.resolve_neg(), y, *parameters(bias), *norm, eps,
        pixels, channels_out, height, width, out_height, out_width, *stride, *padding, *dilation,
        C_IN=channels_in, KH=kernel[0], KW=kernel[1], ACT=act,
        POINTWISE=(*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0),
        PRECISION="tf32" if tf32 else "ieee", UPCAST=triton_interpret() and x.dtype == torch.bfloat16,
        INDEX=index_type(max(x.numel(), y.numel(), weight.numel())),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
