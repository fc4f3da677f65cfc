"""What the kernels share on the device (arithmetic, offsets) and on the host (the launch)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Run a kernel on the device of ``like`` and on its current stream."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, **options)


def index_type(numel: int) -> tl.dtype:
    """Integer type of element offsets: int32 only where even an overhanging tile stays below 2^31."""
    return tl.int32 if numel <= 2**30 else tl.int64


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: bands of GROUP_M rows, column by column, so that neighbours in time share operands in L2."""
    band = GROUP_M * tiles_n
    first = tile // band * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % band % rows, tile % band // rows


@triton.jit
def bound(n, INTERPRETED: tl.constexpr):
    """The bound of a loop: with NumPy 2.4 the interpreter's range takes nothing but integers of Python."""
    if INTERPRETED:
        return n.handle.data.item()
    return n


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    """An operand of tl.dot rounded to TF32, ties away from zero; the products would cut off what TF32 has no bits for.

    A NaN becomes one that TF32 has the bits for.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))
    return x


def nearest_tf32(x: Tensor) -> Tensor:
    """The same of a tensor."""
    bits = (x.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(x == x, bits.view(torch.float32), torch.nan)


@triton.jit
def activate(v, ACT: tl.constexpr):
    """ReLU as torch.relu on a GPU: NaN passes, -0.0 becomes 0.0; a maximum would lose NaN."""
    if ACT == "relu":
        v = tl.where(v <= 0, 0.0, v)
    return v


@triton.jit
def mask_gradient(grad, y, ACT: tl.constexpr):
    """Gradient through the activation, from its output rounded to the output dtype; a NaN output passes it on."""
    if ACT == "relu":
        grad = tl.where(y.to(tl.float32) <= 0, 0.0, grad)
    return grad


@triton.jit
def normalize(x, mean, scale, bias):
    """(x - mean) * scale + bias with an explicit fma, so that forward and backward round alike, bit for bit."""
    return tl.fma(x - mean, scale, bias)


@triton.jit
def load_parameter(ptr, channel, valid, DEFAULT: tl.constexpr):
    """One fp32 value per channel; a missing parameter is its neutral value."""
    if ptr is None:
        value = tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        value = tl.load(ptr + channel, mask=valid, other=DEFAULT).to(tl.float32)
    return value


@triton.jit
def load_affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, valid, eps):
    """Per channel: mean, invstd = 1 / sqrt(var + eps) by true root and division, scale = weight * invstd, bias."""
    weight = load_parameter(weight_ptr, channel, valid, 1.0)
    bias = load_parameter(bias_ptr, channel, valid, 0.0)
    mean = load_parameter(mean_ptr, channel, valid, 0.0)
    var = load_parameter(var_ptr, channel, valid, 1.0)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return mean, invstd, weight * invstd, bias
