"""conv_bn_act_maxpool: y = max_pool(act(batch_norm(conv2d(x)))) in evaluation, the stem of a network (He et al. 2016, table 1).

x, weight and batch norm as in ``conv_bn_act``; the window as in ``bn_act_maxpool``; y is (N, K, OH, OW) in x's memory format.
Batch norm is folded; a kernel accumulates in fp32, rounds to x's dtype before it compares values, and never writes what is
pooled, in a stem more than twice the size of x and y together. For backward the inputs are saved and the plain composition runs
again. Bytes moved: x, weight and y.

Where no kernel is chosen, callers run a convolution and ``bn_act_maxpool``, or ``conv_bn_act`` and a pool.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastres import dispatch
from fastres.errors import ArgumentError, ArgumentTypeError, renamed
from fastres.kernels.layout import memory_format
from fastres.ops import _check, _conv, _conv_rows
from fastres.ops._op import Backend, Op, Sample
from fastres.ops._samples import Draw
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL, check_window, output_shape, pool
from fastres.ops.conv import CONV
from fastres.ops.conv_bn_act import CONV_BN_ACT

NAME = "conv_bn_act_maxpool"
SCHEMA = f"(Tensor x, {_conv.PARAMETERS}, int[2] kernel_size, int[2] pool_stride, int[2] pool_padding) -> Tensor"
_NAMES = {"stride": "pool_stride", "padding": "pool_padding"}
_WINDOW = (3, 3), (2, 2), (1, 1)  # which the kernel is written for


def reference(x, *args):
    *conv, kernel_size, stride, padding = args
    z = _conv.reference(x, None, *conv)
    return pool(z, kernel_size, stride, padding).contiguous(memory_format=memory_format(x))


class _Pooled(NamedTuple):
    """Stands for what is pooled, without values: a tensor would need an operation, which a recording would see."""

    shape: tuple[int, ...]


def _pooled(x, weight, conv_stride, conv_padding, dilation) -> _Pooled:
    return _Pooled(_conv.output_shape(x, weight, conv_stride, conv_padding, dilation))


def check(x, weight, *args):
    *conv, kernel_size, stride, padding = args
    _conv.check(NAME, x, None, weight, *conv)
    _check.tensors(NAME, x=x, mean=conv[3], var=conv[4])
    try:
        check_window(NAME, _pooled(x, weight, *conv[6:9]), kernel_size, stride, padding)
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, NAME, _NAMES) from None


def fake(x, weight, *args):
    *conv, kernel_size, stride, padding = args
    y = x.new_empty(output_shape(_pooled(x, weight, *conv[6:9]), kernel_size, stride, padding))
    return y.contiguous(memory_format=memory_format(x))


def setup_context(ctx, inputs, output):
    ctx.flags = tuple(inputs[7:])
    _conv.save(ctx, inputs[:7])


def backward(ctx, grad_y):
    *flags, kernel_size, stride, padding = ctx.flags

    def again(x, *parameters):
        return F.max_pool2d(_conv.differentiable(x, None, *parameters, *flags), kernel_size, stride, padding)

    return *_conv.recompute_gradients(ctx, grad_y, again), *[None] * len(ctx.flags)


def samples(device, dtype):
    """Stems, with aligned rows and others, and corner cases: other windows of either kind, odd channels."""
    draw = Draw(device, dtype)

    def case(label, n, c, size, k, kernel, stride, padding, window=_WINDOW, act="relu", bias=False, groups=1, eps=1e-5):
        x, layer = draw.images(n, c, *size), draw.layer(k, c // groups, *kernel, bias=bias)
        return Sample(label, (x, *layer, eps, stride, padding, (1, 1), groups, act, *window))

    seven = (7, 7), (2, 2), (3, 3)
    return [
        case("7x7 stem", 2, 3, (24, 32), 64, *seven),
        case("7x7 stem of odd sizes", 1, 3, (37, 27), 64, *seven, bias=True),
        case("7x7 stem of 72 channels", 1, 3, (13, 50), 72, *seven, eps=1e-3),
        case("3x3 stem", 2, 3, (10, 9), 32, (3, 3), (1, 1), (1, 1)),
        case("3x3 stem of stride 2 without ReLU", 2, 4, (14, 16), 16, (3, 3), (2, 2), (1, 1), act="none"),
        case("an uneven window", 1, 3, (15, 14), 8, *seven, window=((2, 3), (1, 2), (0, 1))),
        case("odd channels in groups", 2, 6, (7, 8), 9, (3, 1), (2, 1), (1, 0), groups=3, eps=1e-12),
    ]


def cost(x, weight, *args):
    *conv, kernel_size, stride, padding = args
    z = _pooled(x, weight, *conv[6:9])
    moved, flops = _conv.cost(x, weight, None, *conv[6:9])
    written = math.prod(output_shape(z, kernel_size, stride, padding)) - math.prod(z.shape)
    return moved + written * x.element_size(), flops


def fallback(x, weight, bias, bn_weight, bn_bias, mean, var, eps, *args):
    """Batch norm is fused with the pool on GPUs, where PyTorch pools slowly; else with the convolution."""
    *geometry, act, kernel_size, stride, padding = args
    if not x.is_cuda:
        z = CONV_BN_ACT(x, weight, bias, bn_weight, bn_bias, mean, var, eps, *geometry, act)
        return pool(z, kernel_size, stride, padding)
    z = CONV(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
    return BN_ACT_MAXPOOL(z, bn_weight, bn_bias, mean, var, eps, act, kernel_size, stride, padding)


def may_join(device: torch.device) -> bool:
    """Whether a kernel of this op may run on a device, or is forced. A cheap filter before ``dispatch``."""
    return device.type == "cuda" or dispatch.is_forced()


def why_not_arguments(x, dtype, weight, stride, padding, dilation, groups, act, *window) -> str | None:
    """What the kernel requires of the arguments, on any device, once x has the dtype."""
    if act != "relu":
        return f"it pools behind a ReLU, got act={act!r}"
    if window != _WINDOW:
        return "its pool is 3x3 of stride 2 and padding 1, got kernel_size={}, stride={}, padding={}".format(*window)
    return _conv_rows.why_not_arguments(x, dtype, weight.shape, stride, padding, dilation, groups)


def why_not_cuda(x, weight, *args) -> str | None:
    stride, padding, dilation, groups = args[6:10]
    reason = _conv_rows.why_not(x, weight.shape, stride, padding, dilation, groups, op=_conv_rows.OPS[2])
    return reason or why_not_arguments(x, x.dtype, weight, *args[6:])


def run_cuda(x, weight, *args):
    *norm, eps, stride, padding, _, _, _, _, _, _ = args
    return _conv_rows.run_pooled(x, (weight, *norm), eps, stride, padding)


CONV_BN_ACT_MAXPOOL = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("cuda", why_not_cuda, lambda: run_cuda)],
    setup_context=setup_context,
    backward=backward,
    fallback=fallback,
)
