"""Triton conv_bn_add_conv_bn_act: two convolutions of one output as one product whose depth runs over the channels of both.

Both batch norms come folded into the weights, which the caller keeps as ``conv_bn_act.pack`` returns them, and the biases.
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
from fastres.kernels.triton.conv_bn_act import _accumulate, has_few_channels, is_tf32, limits, pack
from fastres.kernels.triton.device import activate, index_type, launch, load_parameter, tile_order

__all__ = ["candidates", "conv_add_conv_act", "is_tf32", "pack", "why_not"]


@triton.jit
def _conv_add_conv_act_kernel(
    x_ptr, weight_ptr, bias_ptr, shortcut_ptr, shortcut_weight_ptr, shortcut_bias_ptr, y_ptr, pixels, channels_out,
    height, width, out_height, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    shortcut_height, shortcut_width, shortcut_stride_h, shortcut_stride_w,
    C_IN: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, POINTWISE: tl.constexpr,
    FLAT: tl.constexpr, C_SHORTCUT: tl.constexpr, DENSE_SHORTCUT: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = act(conv(x) + bias + conv1x1(shortcut) + shortcut_bias)
    # x, shortcut, y NHWC, weight [channels_out, KH, KW, C_IN], shortcut_weight [channels_out, C_SHORTCUT]; a program owns
    #   BLOCK_M output pixels x BLOCK_N output channels of one of the main convolution's groups
    # x, shortcut and both weights once per tile that needs them, one write of the element size per output
    # one fp32 accumulator for both products, rounded once; PRECISION is that of fp32 products (UPCAST: the interpreter's bf16)
    # any size: pixels beyond the image, tiles beyond the tensor and channels beyond C_IN and C_SHORTCUT are masked to zero
    of_group = channels_out // GROUPS
    tiles_n = tl.cdiv(of_group, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), GROUPS * tiles_n, GROUP_M)
    pixel = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUPS == 1:
        group = 0
        n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n_valid = n < channels_out
    else:
        group, in_group = pid_n // tiles_n, pid_n % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        n, n_valid = group * of_group + in_group, in_group < of_group

    acc = _accumulate(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr, weight_ptr, pixel, group * C_IN, n, n_valid, pixels, height, width,
        out_height, out_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        C_IN, GROUPS, KH, KW, POINTWISE, FLAT, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    acc = _accumulate(
        acc, shortcut_ptr, shortcut_weight_ptr, pixel, 0, n, n_valid, pixels, shortcut_height, shortcut_width,
        out_height, out_width, shortcut_stride_h, shortcut_stride_w, 0, 0, 1, 1,
        C_SHORTCUT, 1, 1, 1, DENSE_SHORTCUT, False, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip

    bias = load_parameter(bias_ptr, n, n_valid, 0.0) + load_parameter(shortcut_bias_ptr, n, n_valid, 0.0)
    acc = activate(acc + bias[None, :], ACT)
    valid = (pixel < pixels)[:, None] & n_valid[None, :]
    tl.store(y_ptr + pixel[:, None] * channels_out + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=valid)


def conv_add_conv_act(
    x: Tensor, weight_packed: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, shortcut: Tensor, shortcut_weight_packed: Tensor, shortcut_bias: Tensor | None,
    shortcut_stride: list[int], act: str, tf32: bool, config: configs.ConvConfig | None = None,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias + conv1x1(shortcut) + shortcut_bias): weights packed by ``pack``, batch norms folded into them.

    tf32: fp32 products are TF32's, as the weights were packed for.
    """
    channels_in, height, width = x.shape[1:]
    images, channels_shortcut, shortcut_height, shortcut_width = shortcut.shape
    out_height, out_width = (
        (size - 1) // s + 1 for size, s in zip((shortcut_height, shortcut_width), shortcut_stride, strict=True)
    )
    channels_out, pixels = weight_packed.shape[0], images * out_height * out_width
    y = torch.empty(
        (images, channels_out, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    of_group, few = channels_in // groups, has_few_channels(channels_in // groups, kernel)
    if config is None:
        size = pixels * groups, channels_out // groups, kernel[0] * kernel[1] * of_group + channels_shortcut
        config = configs.conv_heuristic(*size, x.element_size(), tf32, limits(x.device), few)
    tiles_n = groups * triton.cdiv(channels_out // groups, config.block_n)
    launch(
        _conv_add_conv_act_kernel, (triton.cdiv(pixels, config.block_m) * tiles_n,), x,
        x.resolve_neg(), weight_packed, *parameters(bias), shortcut.resolve_neg(), shortcut_weight_packed,
        *parameters(shortcut_bias), y, pixels, channels_out, height, width, out_height, out_width,
        *stride, *padding, *dilation, shortcut_height, shortcut_width, *shortcut_stride,
        C_IN=of_group, GROUPS=groups, KH=kernel[0], KW=kernel[1],
        POINTWISE=(*kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0), FLAT=few,
        C_SHORTCUT=channels_shortcut, DENSE_SHORTCUT=tuple(shortcut_stride) == (1, 1), ACT=act,
        PRECISION="tf32" if tf32 else "ieee", UPCAST=triton_interpret() and x.dtype == torch.bfloat16,
        INDEX=index_type(max(x.numel(), shortcut.numel(), y.numel(), weight_packed.numel())),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def why_not(x: Tensor, shortcut: Tensor) -> str | None:
    """Why the kernel cannot run on these activations, or None."""
    if memory_format(x) is not torch.channels_last:
        return f"x must be channels_last, got strides {tuple(x.stride())}"
    if not shortcut.is_contiguous(memory_format=torch.channels_last):
        return f"shortcut must be channels_last, got strides {tuple(shortcut.stride())}"
    return why_not_here(x)


def candidates(x: Tensor, weight: Tensor) -> list[configs.ConvConfig]:
    """The configurations tuning may choose from on x's device."""
    few = has_few_channels(weight.shape[1], list(weight.shape[2:]))
    return configs.conv_candidates(x.element_size(), is_tf32(x), limits(x.device), few)
