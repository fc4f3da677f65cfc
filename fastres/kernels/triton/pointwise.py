"""Triton's 1x1 convolution with stride 1 for sm_90 and newer: a persistent GEMM that moves tiles by tensor descriptors.

``conv_bn_act`` calls it for the configurations that say so; what descriptors cannot describe, it computes itself.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.env import triton_interpret
from fastres.kernels.layout import ALIGNMENT, aligned
from fastres.kernels.triton import configs
from fastres.kernels.triton.bn_act import parameters
from fastres.kernels.triton.device import activate, bound, launch, load_parameter, nearest, tile_order

MOST_PIXELS = 2**30  # coordinates are 32 bits with a sign, those of an overhanging tile too


@triton.jit
def _conv_pointwise_act_kernel(
    x_desc, weight_desc, bias_ptr, residual_desc, y_desc, pixels, channels_out,
    C_IN: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # y = act(x @ weight^T + bias [+ residual])
    # x [pixels, C_IN], weight [channels_out, C_IN], residual, y [pixels, channels_out]; programs walk tiles BLOCK_M x BLOCK_N
    # x and weight once per tile that needs them, one write (and one read of residual) of the element size per output
    # fp32 accumulator, rounded once; PRECISION is that of fp32 products
    # any size: the copies read zeros beyond the edges and write nothing there
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels_out, BLOCK_N)
    count = tl.cdiv(tiles_m * tiles_n - tl.program_id(0), tl.num_programs(0))
    # One loop of both, so that the copies for the next tile run while this one is finished. Residual and bias come after the
    # products: an accumulator that starts at them would keep those copies from running ahead.
    for i in tl.range(0, bound(count, INTERPRETED), flatten=True):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        pid_m, pid_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        first, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, C_IN, BLOCK_K):
            a, b = x_desc.load([first, k]), weight_desc.load([n, k])
            if INTERPRETED:  # NumPy has no bf16
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(nearest(a, PRECISION), b.T, acc, input_precision=PRECISION)
        channel = n + tl.arange(0, BLOCK_N)
        acc += load_parameter(bias_ptr, channel, channel < channels_out, 0.0)[None, :]
        if residual_desc is not None:
            acc += residual_desc.load([first, n]).to(tl.float32)
        y_desc.store([first, n], activate(acc, ACT).to(y_desc.dtype))


def suits(
    pixels: int, channels: int, channels_out: int, itemsize: int, kernel: list[int], stride: list[int],
    padding: list[int], groups: int,
) -> bool:  # fmt: skip
    """Whether the convolution is a product of two matrices that descriptors can describe."""
    if (*kernel, *stride, *padding, groups) != (1, 1, 1, 1, 0, 0, 1) or pixels > MOST_PIXELS:
        return False
    return channels * itemsize % ALIGNMENT == 0 and channels_out * itemsize % ALIGNMENT == 0


def conv_act(
    x: Tensor, weight_packed: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, act: str, tf32: bool,
    config: configs.ConvConfig, multiprocessors: int,
) -> None:  # fmt: skip
    """y = act(conv(x) + bias [+ residual]), all channels_last; at most one program for each multiprocessor."""
    channels_out, channels_in = weight_packed.shape
    pixels, m, n, k = y.numel() // channels_out, config.block_m, config.block_n, config.block_k

    def describe(t: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(t, [t.numel() // t.shape[1], t.shape[1]], [t.shape[1], 1], [*block])

    tiles = triton.cdiv(pixels, m) * triton.cdiv(channels_out, n)
    launch(
        _conv_pointwise_act_kernel, (min(tiles, multiprocessors),), x,
        describe(aligned(x), m, k), describe(weight_packed, n, k), *parameters(bias),
        None if residual is None else describe(aligned(residual), m, n), describe(y, m, n), pixels, channels_out,
        C_IN=channels_in, ACT=act, PRECISION="tf32" if tf32 else "ieee",
        INTERPRETED=triton_interpret(),
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
