"""Calls of the native CUDA ops for the tests: arguments of any op, layouts, and PyTorch's reference."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from fastres.kernels.layout import memory_format
from fastres.ops import REGISTRY, _mask

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cpp"))
OPS = [name for path in SOURCES for name in re.findall(r'm\.def\(\s*"cuda_(\w+)\(', path.read_text())]
REDUCTIONS = [name for name in OPS if name.endswith("_train") or ("bn" in name and name.endswith("_backward"))]
TWO_PARTS = [name for name in OPS if "grad_y2" in REGISTRY[name].parameters]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Partial tiles of channels, idle threads, sizes that forbid vectors, planes smaller than a block, several splits.
SHAPES = [
    (3, 520, 5, 7), (2, 300, 4, 4), (1, 7, 3, 5), (5, 16, 40, 40), (6, 3, 7, 7), (300, 2, 2, 4),
    (70, 5, 1, 1), (2, 2100, 1, 2), (2, 1, 64, 64), (40, 2, 32, 32), (1, 1, 1, 5), (9, 24, 16, 16),
]  # fmt: skip
# Kernel, stride, padding: the stem's; strides beyond the window; overlap in one direction, padding that no window needs.
STEM = ((3, 3), (2, 2), (1, 1))
WINDOWS = [STEM, ((2, 3), (3, 1), (1, 1)), ((5, 4), (2, 3), (2, 2)), ((1, 1), (1, 2), (0, 0))]


def run(name, *args):
    result = getattr(torch.ops.fastres_C, f"cuda_{name}")(*args)
    return result if isinstance(result, tuple) else (result,)


def reference(name, args):
    result = REGISTRY[name].reference(*args)
    return result if isinstance(result, tuple) else (result,)


def gpu_relu(z):
    """torch.relu of a GPU, on either device: there -0.0 becomes 0.0."""
    return z.relu() if z.is_cuda else z.relu() + 0.0


def mapped(args, change):
    """The arguments with change(tensor) in place of each activation; a convolution's weight is a Parameter."""
    return [change(a) if is_activation(a) else a for a in args]


def is_activation(a):
    return isinstance(a, torch.Tensor) and a.dim() == 4 and not isinstance(a, torch.nn.Parameter)


def in_double(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def laid_out(args, layout):
    return mapped(args, lambda t: t.contiguous(memory_format=getattr(torch, layout)))


def arguments(name, x, generator=None, act="relu", training=True, dtype=torch.float32, window=STEM, two_parts=False, kernel=1):
    """Arguments of any op for the input x: the other activations, parameters and statistics are drawn here; the gradient at
    the end of a block in one part or two; convolutions that keep the size of images, with square windows of ``kernel`` pixels.
    """
    draw = lambda shape=x.shape: torch.randn(shape, generator=generator).to(x)  # noqa: E731
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, generator=generator).to(x.device, dtype) for _ in range(2))
    mean, var = x.double().mean((0, 2, 3)).float(), x.double().var((0, 2, 3), unbiased=False).float()
    base = name.removesuffix("_backward").removesuffix("_train")
    if name in ("conv", "conv_backward_weight"):
        return stem(name, x, draw)
    if name.endswith("int8"):
        return integers(name, x, generator, kernel)
    if base.startswith("conv"):
        kernels = [torch.randn(channels, channels, k, k, generator=generator) / channels**0.5 / k for k in (kernel, 1)]
        weight_of_x, own = (torch.nn.Parameter(k.to(x.device), requires_grad=False) for k in kernels)
        residual = [draw()] if "add" in base else []
        geometry = (1, 1), (kernel // 2,) * 2, (1, 1), 1
        if name in ("conv_statistics", "conv_backward_bn_act"):
            weight_of_x = torch.nn.Parameter(weight_of_x.to(x.dtype), requires_grad=False)
        if name == "conv_statistics":
            return [x, weight_of_x, *geometry]
        if name == "conv_backward_bn_act":
            return [draw(), weight_of_x, x, weight, bias, mean, var, 1e-5, act, *geometry]
        if name == "conv_bn_act_maxpool":
            images, own, _, *geometry = stem("conv", x, draw)
            norm = [t[:1].expand(len(own)).contiguous() for t in (weight, bias, mean, var)]
            return [images, own, None, *norm, 1e-5, *geometry, "relu", *window]
        args = [x, *residual, weight_of_x, None, weight, bias, mean, var, 1e-5, *geometry]
        other = [own, None, weight.flip(0), bias.flip(0), mean, var, 1e-3]
        if base == "conv_bn_add_conv_bn_act":
            args += [*other, (1, 1)]
        elif base.startswith("conv_bn_act_conv"):  # a chain of two or three
            args += [act, *other] + [act, *other] * base.endswith("_conv_bn_act")
        return [*args, act]
    if base == "add_act":
        return [x, draw(), act]
    if name == "bn_act_backward":
        return [draw(), x, weight, bias, mean, var, 1e-5, act, training]
    if name == "bn_add_act_backward":
        grad_y, second = draw(), draw() if two_parts else None
        return [grad_y, second, drawn_mask(x, act, generator), x, weight, mean, var, 1e-5, act]
    if name == "bn_act_maxpool_backward":
        grad_y = draw(F.max_pool2d(x.float(), *window).shape)
        return [grad_y, x, weight, bias, mean, var, 1e-5, act, training, *window]
    if base == "bn_add_bn_act":
        return two_norms(name, x, draw(), (draw(), draw() if two_parts else None), (weight, bias, mean, var), act, generator)
    residual = [draw()] if base == "bn_add_act" else []
    statistics = [] if name.endswith("_train") else [mean, var]
    return [x, *residual, weight, bias, *statistics, 1e-5, act, *(window if base == "bn_act_maxpool" else ())]


def stem(name, x, draw):
    """Arguments of the convolution of a network's stem, or of its gradient by the weight: 3 channels to 64."""
    n, _, height, width = x.shape
    geometry = (2, 2), (3, 3), (1, 1), 1
    if name == "conv":
        return [draw((n, 3, height, width)), torch.nn.Parameter(draw((64, 3, 7, 7)), requires_grad=False), None, *geometry]
    return [draw((n, 64, (height + 1) // 2, (width + 1) // 2)), draw((n, 3, height, width)), (7, 7), *geometry]


def integers(name, x, generator, kernel):
    """Arguments of an op of 8-bit integers, of activations of x's size; of images, as floats, three channels."""
    if name == "quantize_int8":
        return [torch.randn((len(x), 3, *x.shape[2:]), generator=generator).to(x.device), 57.3, 118, 4, (3, 3)]
    whole = lambda *shape: torch.randint(-128, 128, shape, generator=generator).to(x.device, torch.int8)  # noqa: E731
    if name == "pool_int8":
        return [whole(*x.shape), (3, 3), (2, 2), (1, 1), False, None, None]
    channels, padding = x.shape[1], (kernel // 2,) * 2
    weight = torch.nn.Parameter(whole(channels, channels, kernel, kernel), requires_grad=False)
    start = 128 * weight.sum((1, 2, 3), dtype=torch.int32)
    scale, bias = torch.rand(2, channels, generator=generator).to(x.device)
    return [whole(*x.shape), whole(*x.shape), weight, start, scale / 9000, bias * 255, 0.4, -128, (1, 1), padding, (1, 1), True]


def two_norms(name, x, residual, grads, norm, act, generator):
    """Arguments of a form of bn_add_bn_act; the residual has its own statistics, and x's parameters in another order."""
    weight, bias, mean, var = norm
    other = weight.flip(0), bias.flip(0)
    statistics = [residual.float().mean((0, 2, 3)), residual.float().var((0, 2, 3), unbiased=False)]
    if name.endswith("_train"):
        return [x, residual, weight, bias, 1e-5, *other, 1e-3, act]
    if not name.endswith("_backward"):
        return [x, residual, weight, bias, mean, var, 1e-5, *other, *statistics, 1e-3, act]
    mask = drawn_mask(x, act, generator)
    return [*grads, mask, x, residual, weight, mean, var, 1e-5, other[0], *statistics, 1e-3, act]


def drawn_mask(x, act, generator):
    """Any bits of a ReLU's mask, those beyond the last element 0 as an op writes them."""
    passes = torch.rand(x.shape, generator=generator) < 0.5
    return _mask.pack(passes.to(x).contiguous(memory_format=memory_format(x)), act)


def draw(shape, dtype, device, layout="contiguous_format", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3
    return x.to(device, dtype).contiguous(memory_format=getattr(torch, layout))
