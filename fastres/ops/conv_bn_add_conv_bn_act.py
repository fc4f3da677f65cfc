"""conv_bn_add_conv_bn_act: y = act(batch_norm(conv2d(x)) + batch_norm(conv2d(shortcut))) in evaluation, the end of a block
whose shortcut is a projection (He et al. 2016, equation 2).

x, weight and its batch norm as in ``conv_bn_act``; shortcut (N, C2, H2, W2) is the block's input and shortcut_weight
(K, C2, 1, 1), without padding, of a stride that gives y's size (N, K, OH, OW). Both batch norms are folded; a kernel runs one
product over the channels of both and never writes the projected shortcut. Accumulates in fp32, rounds once. For backward the
inputs are saved and the plain composition runs again. Bytes moved: x, the shortcut's pixels under the stride, both weights, y.

Where no kernel is chosen, callers run ``conv_bn_act`` and ``conv_bn_add_act``, which are faster than the plain composition.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres import dispatch
from fastres.errors import ArgumentError, ArgumentTypeError, must, renamed
from fastres.kernels.triton import why_not_device
from fastres.ops import _check, _conv, _conv_cuda, _fold
from fastres.ops._backends import triton_module, why_not_triton
from fastres.ops._bn import refuse_statistics_gradient
from fastres.ops._op import Backend, Op, Sample
from fastres.ops._samples import Draw
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT

SCHEMA = (
    f"(Tensor x, Tensor shortcut, {_conv.PARAMETERS.removesuffix(', str act')}, Tensor shortcut_weight,"
    " Tensor? shortcut_bias, Tensor? shortcut_bn_weight, Tensor? shortcut_bn_bias, Tensor shortcut_mean,"
    " Tensor shortcut_var, float shortcut_eps, int[2] shortcut_stride, str act) -> Tensor"
)
NAME = "conv_bn_add_conv_bn_act"
_NAMES = {"x": "shortcut", "x and weight": "shortcut and shortcut_weight"}
_NAMES |= {name: f"shortcut_{name}" for name in ("weight", "bias", "bn_weight", "bn_bias", "mean", "var", "eps", "stride")}
_MAIN = 13  # arguments before those of the shortcut: x, shortcut, weight, bias, the norm's four and eps, the geometry
_AT_ONE = (0, 0), (1, 1), 1  # padding, dilation and groups of the shortcut


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], str]:
    """The arguments of each convolution, without residual and activation; and the activation."""
    x, shortcut, *main = args[:_MAIN]
    *own, act = args[_MAIN:]
    return (x, *main), (shortcut, *own, *_AT_ONE), act


def composed(own: Callable[..., Tensor], main: Callable[..., Tensor], *args: Any) -> Tensor:
    """Two functions, with the arguments of ``conv_bn_act`` and of ``conv_bn_add_act``, the first of them for the shortcut."""
    (x, *of_main), (shortcut, *of_own), act = _split(args)
    return main(x, own(shortcut, *of_own, "none"), *of_main, act)


def reference(*args):
    return composed(CONV_BN_ACT.reference, CONV_BN_ADD_ACT.reference, *args)


def check(*args):
    (x, *main), (shortcut, *own), act = _split(args)
    _conv.check(NAME, x, None, *main, act)
    _check.tensors(NAME, x=x, mean=main[4], var=main[5])
    _check.images(NAME, x=x, shortcut=shortcut)
    try:
        _conv.check(NAME, shortcut, None, *own, act)
        _check.tensors(NAME, x=shortcut, mean=own[4], var=own[5])
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, NAME, _NAMES) from None
    weight, stride = own[0], own[7]
    if tuple(weight.shape[2:]) != (1, 1):
        raise must(NAME, "shortcut_weight", "of a kernel of 1x1", tuple(weight.shape))
    shapes = [_conv.output_shape(x, main[0], *main[7:10]), _conv.output_shape(shortcut, weight, stride, *_AT_ONE[:2])]
    if shapes[0] != shapes[1]:
        raise must(NAME, "shortcut", f"projected to the output's shape {shapes[0]}", shapes[1], f"shortcut_stride is {stride}")


def fake(x, shortcut, weight, *rest):
    return _conv.fake(x, weight, *rest[6:9])


def setup_context(ctx, inputs, output):
    tensors, own = inputs[:8], inputs[_MAIN : _MAIN + 6]
    refuse_statistics_gradient(*tensors[-2:])
    ctx.flags = inputs[8:_MAIN], tuple(inputs[_MAIN + 6 :])
    _conv.save(ctx, (*tensors, *own))


def backward(ctx, grad_y):
    flags, own_flags = ctx.flags

    def again(*tensors):
        args = *tensors[:8], *flags, *tensors[8:], *own_flags
        return composed(lambda x, *rest: _conv.differentiable(x, None, *rest), _conv.differentiable, *args)

    grads = _conv.recompute_gradients(ctx, grad_y, again)
    return *grads[:8], *[None] * len(flags), *grads[8:], *[None] * len(own_flags)


def samples(device, dtype):
    """Ends of blocks as residual networks have them, and corner cases: odd channels, few, groups, another window."""
    draw = Draw(device, dtype)

    def case(label, c, size, k, kernel, c2, size2, stride2, act="relu", bias=False, groups=1, stride=1, eps=1e-5, n=2):
        x, weight = draw.images(n, c, *size), draw.weight(k, c // groups, kernel, kernel)
        shortcut, own = draw.images(n, c2, *size2), draw.weight(k, c2, 1, 1)
        biases = [draw.vector(k) if bias else None for _ in range(2)]
        main, other = ([w, b, *draw.norm(k)] for w, b in zip((weight, own), biases, strict=True))
        geometry = (stride, stride), (kernel // 2, kernel // 2), (1, 1), groups
        return Sample(label, (x, shortcut, *main, eps, *geometry, *other, 2 * eps, (stride2, stride2), act))

    return [
        case("3x3, shortcut of stride 2", 32, (5, 4), 32, 3, 16, (9, 8), 2),
        case("1x1, shortcut of stride 1", 16, (6, 7), 64, 1, 16, (6, 7), 1),
        case("1x1, shortcut of stride 2", 32, (4, 5), 48, 1, 64, (8, 9), 2, act="none"),
        case("odd channels with biases", 5, (6, 5), 7, 3, 3, (12, 9), 2, bias=True),
        case("3x3 in groups of stride 2", 48, (9, 7), 24, 3, 12, (5, 4), 1, groups=3, stride=2, n=1, eps=1e-3),
        case("1x1 of odd channels", 33, (3, 3), 17, 1, 9, (3, 3), 1, act="none", n=1, eps=1e-12),
    ]


def cost(*args):
    (x, weight, *main), (shortcut, own, *_), _ = _split(args)
    moved, flops = _conv.cost(x, weight, None, *main[6:9])
    n, k, height, width = _conv.output_shape(x, weight, *main[6:9])
    pixels, channels = n * height * width, shortcut.shape[1]
    return moved + (pixels * channels + own.numel()) * x.element_size(), flops + 2 * pixels * k * channels


def may_join(device: torch.device) -> bool:
    """Whether a kernel of this op may run on a device, or is forced. A cheap filter before ``dispatch``."""
    return why_not_device(device) is None or dispatch.is_forced()


def fallback(*args):
    return composed(CONV_BN_ACT, CONV_BN_ADD_ACT, *args)


def _why_not_dtype(x, shortcut) -> str | None:
    if shortcut.dtype != x.dtype:
        return f"shortcut must have x's dtype, got {shortcut.dtype} beside {x.dtype}"
    return None


def why_not_triton_kernel(x, shortcut, *rest) -> str | None:
    reason = _why_not_dtype(x, shortcut) or why_not_triton(x) or _conv.why_not_tf32(x)
    return reason or triton_module(NAME).why_not(x, shortcut)


def why_not_cuda(*args) -> str | None:
    (x, weight, *main), (shortcut, own, *rest), _ = _split(args)
    stride, padding, dilation, groups = main[6:]
    reason = _why_not_dtype(x, shortcut) or _conv_cuda.why_not(x, weight, stride, padding, dilation, groups, adds=True)
    if reason is None:
        reason = _conv_cuda.why_not_arguments(shortcut, own, *rest[6:])
        reason = reason and f"of the shortcut: {reason}"
    return reason


def run_cuda(*args):
    (x, *main), (shortcut, *own), act = _split(args)
    return _conv_cuda.run_joined((x, *main), (shortcut, *own[: -len(_AT_ONE)]), act)


def triton_configs(x, shortcut, weight, *rest) -> list[tuple]:
    """The tiles that tuning may choose from."""
    return triton_module(NAME).candidates(x, weight)


def run_triton(*args, config=None):
    kernels = triton_module(NAME)
    (x, *main), (shortcut, *own), act = _split(args)
    tf32 = kernels.is_tf32(x)

    def folded(parameters: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:  # the form that conv_bn_act keeps
        return _fold.folded(parameters, eps, ("triton", x.dtype, tf32), lambda w, b: (kernels.pack(w.to(x.dtype), tf32), b))

    first, second = folded(tuple(main[:6]), main[6]), folded(tuple(own[:6]), own[6])
    kernel, config = tuple(main[0].shape[2:]), None if config is None else kernels.configs.ConvConfig(*config)
    return kernels.conv_add_conv_act(x, *first, kernel, *main[7:], shortcut, *second, own[7], act, tf32, config)


CONV_BN_ADD_CONV_BN_ACT = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[
        Backend("cuda", why_not_cuda, lambda: run_cuda),
        Backend(
            "triton",
            why_not_triton_kernel,
            lambda config=None: run_triton if config is None else functools.partial(run_triton, config=config),
            triton_configs,
        ),
    ],
    setup_context=setup_context,
    backward=backward,
    fallback=fallback,
)
