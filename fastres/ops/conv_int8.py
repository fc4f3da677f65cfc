"""conv_int8: y = saturate(round((start + conv2d(x, weight)) * scale + bias [+ residual * residual_scale])), in 8-bit integers.

x: (N, C, H, W) int8, padded with ``pad``; weight: (K, C, R, S) int8; start: (K,) int32; scale, bias: (K,) float32; residual:
int8 of y's shape. An int8 activation holds a byte less 128 (``_int8``), so ``start`` is 128 times the sum of a channel's
weights where sums of bytes are meant, and a residual is read as its byte. y is int8 alike, or, with ``integers`` false, the
float32 value; in x's memory format. Sums are exact in int32; scale, bias and residual are applied in float32, each
multiplication and addition rounded once, as the CPU's plans do (csrc/cpu/conv_int8_kernel.cpp): the same bytes. (In float64
where scale and bias are: the truth that kernels are held against.) A ReLU is the saturation of a value whose zero point is 0.
There is no gradient. Bytes moved: x, weight, residual and y, of one byte an element.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import must, must_type
from fastres.kernels.layout import memory_format, why_not_channels_last
from fastres.kernels.triton import why_not_device
from fastres.ops import _check, _conv, _int8
from fastres.ops._backends import triton_module
from fastres.ops._op import Backend, Op, Sample

NAME = "conv_int8"
SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor weight, Tensor start, Tensor scale, Tensor bias, float residual_scale, int pad,"
    " int[2] stride, int[2] padding, int[2] dilation, bool integers) -> Tensor"
)


def reference(x, residual, weight, start, scale, bias, residual_scale, pad, stride, padding, dilation, integers):
    down, right = padding
    padded = F.pad(x.double(), (right, right, down, down), value=pad)
    column = [t.view(-1, 1, 1) for t in (start, scale, bias)]
    sums = F.conv2d(padded, weight.double(), None, stride, 0, dilation).round() + column[0]  # exact, by whatever algorithm
    value = _int8.fused(sums.float(), *column[1:])
    if residual is not None:
        value = _int8.fused(_int8.byte(residual), residual_scale, value)
    y = _int8.stored(value) if integers else value
    return y.contiguous(memory_format=memory_format(x))


def check(x, residual, weight, start, scale, bias, residual_scale, pad, stride, padding, dilation, integers):
    images = {"x": (x, torch.int8, 4), "weight": (weight, torch.int8, 4)}
    images |= {} if residual is None else {"residual": (residual, torch.int8, 4)}
    real = torch.float64 if isinstance(scale, Tensor) and scale.dtype == torch.float64 else torch.float32
    rows = {"start": (start, torch.int32, 1), "scale": (scale, real, 1), "bias": (bias, real, 1)}
    for name, (tensor, dtype, dims) in (images | rows).items():
        _check_tensor(name, tensor, dtype, dims, x)
    _conv.check_convolution(NAME, _like(x), _like(weight), None, stride, padding, dilation, 1)
    for name, (tensor, *_) in rows.items():
        if tensor.shape != weight.shape[:1]:
            raise must(NAME, name, f"of shape ({len(weight)},), one value a channel of the output", tuple(tensor.shape))
    shape = _conv.output_shape(x, weight, stride, padding, dilation)
    if residual is not None and tuple(residual.shape) != shape:
        raise must(NAME, "residual", f"of the output's shape {shape}", tuple(residual.shape))
    if isinstance(residual_scale, bool) or not isinstance(residual_scale, (int, float)) or not math.isfinite(residual_scale):
        raise must_type(NAME, "residual_scale", "a finite float", residual_scale)
    if type(pad) is not int or not -_int8.SHIFT <= pad < _int8.SHIFT:
        raise must(NAME, "pad", "an int8: a whole number of -128..127", pad)
    if type(integers) is not bool:
        raise must_type(NAME, "integers", "a bool", integers)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, dims: int, x: Tensor) -> None:
    _check.strided(NAME, name, tensor)
    if tensor.dtype != dtype or tensor.dim() != dims:
        what = "(N, C, H, W)" if dims == 4 else "(K,)"
        raise must(NAME, name, f"{str(dtype)[6:]} of shape {what}", f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise must(NAME, name, f"on the device of x ({x.device})", tensor.device, "move one of them")


def _like(t: Tensor) -> Tensor:
    """Of its shape, for checks that are written for real numbers."""
    return t.new_empty(1, dtype=torch.float32).expand(t.shape)


def fake(x, residual, weight, start, scale, bias, residual_scale, pad, stride, padding, dilation, integers):
    shape = _conv.output_shape(x, weight, stride, padding, dilation)
    y = x.new_empty(shape, dtype=torch.int8 if integers else bias.dtype)
    return y.contiguous(memory_format=memory_format(x))


def whole(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random integers in channels_last, where the generator is."""
    found = torch.randint(-127, 128, shape, generator=generator, device=generator.device, dtype=torch.int8)
    return found.contiguous(memory_format=torch.channels_last)


def drawn(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: tuple, with_residual: bool, integers: bool,
    device: torch.device, pad: int = -_int8.SHIFT,
) -> tuple:  # fmt: skip
    """Arguments of random integers, whose outputs fill the bytes and go beyond them at both ends."""
    generator = torch.Generator(device).manual_seed(0)  # on a GPU: there are hundreds of millions
    channels, *window = weight_shape
    x, weight = whole(shape, generator), whole(weight_shape, generator)
    residual = whole(_conv.output_shape(x, weight, *geometry), generator) if with_residual else None
    start = _int8.SHIFT * weight.sum((1, 2, 3), dtype=torch.int32)
    scale, bias = torch.rand(2, channels, generator=generator, device=device)
    scale = (scale + 0.5) / (90.0 * math.prod(window) ** 0.5)
    return (x, residual, weight, start, scale, bias * _int8.LEVELS, 0.40625, pad, *geometry, integers)


def samples(device, dtype):
    """The convolutions of a residual network at a small size, and the corners; the same in whatever dtype of real numbers."""
    found = []
    for label, n, c, size, k, kernel, stride, padding, dilation, residual, integers, pad in (
        ("1x1", 2, 64, (8, 8), 64, (1, 1), (1, 1), (0, 0), (1, 1), False, True, -128),
        ("1x1 with a residual", 2, 64, (7, 9), 96, (1, 1), (1, 1), (0, 0), (1, 1), True, True, -128),
        ("1x1 stride 2", 2, 64, (9, 9), 32, (1, 1), (2, 2), (0, 0), (1, 1), False, True, -128),
        ("3x3", 2, 32, (8, 8), 64, (3, 3), (1, 1), (1, 1), (1, 1), False, True, -128),
        ("3x3 stride 2 with a residual", 1, 48, (9, 7), 32, (3, 3), (2, 2), (1, 1), (1, 1), True, True, -128),
        ("3x3 dilated, a zero point", 1, 32, (9, 9), 16, (3, 3), (1, 1), (2, 2), (2, 2), False, True, -37),
        ("7x7 stem", 1, 3, (19, 19), 64, (7, 7), (2, 2), (3, 3), (1, 1), False, True, -7),
        ("odd channels, real numbers", 1, 5, (6, 7), 7, (3, 3), (1, 1), (1, 1), (1, 1), True, False, -128),
        ("a linear layer", 3, 64, (1, 1), 10, (1, 1), (1, 1), (0, 0), (1, 1), False, False, -128),
    ):
        geometry = stride, padding, dilation
        found.append(Sample(label, drawn((n, c, *size), (k, c, *kernel), geometry, residual, integers, device, pad)))
    return found


def cost(x, residual, weight, start, scale, bias, residual_scale, pad, stride, padding, dilation, integers):
    y = math.prod(_conv.output_shape(x, weight, stride, padding, dilation))
    moved = x.numel() + weight.numel() + y * ((1 if integers else 4) + (residual is not None))
    return moved, 2 * y * weight[0].numel()


def why_not_triton(x, residual, weight, start, scale, *rest) -> str | None:
    if scale.dtype != torch.float32:
        return f"scale and bias must be float32, got {scale.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and (reason := why_not_channels_last(name, t)):
            return reason
    return why_not_device(x.device)


def triton_configs(x, residual, weight, *rest) -> list[tuple]:
    """The tiles that tuning may choose from."""
    return triton_module(NAME).candidates(x.device, weight)


def load_triton(config: tuple | None = None) -> Callable:
    run = triton_module(NAME).conv_int8
    return run if config is None else functools.partial(run, config=config)


CONV_INT8 = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("triton", why_not_triton, load_triton, triton_configs)],
)
