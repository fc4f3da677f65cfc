"""conv_bn_act_conv_bn_add_act: y = act(batch_norm(conv2d(middle)) + residual), middle = act(batch_norm(conv2d(x))), in
evaluation: the last two convolutions of a bottleneck block, 3x3 and 1x1 (He et al. 2016, figure 5).

x, weight, its batch norm and act as in ``conv_bn_act``; last_weight (K2, K, 1, 1), of stride 1 without padding, its batch norm
and last_act as in ``conv_bn_add_act``; residual has y's shape (N, K2, OH, OW). Both batch norms are folded; a kernel keeps
middle, rounded to x's dtype, on the chip. Accumulates in fp32, rounds each output once. No backward: nothing but a frozen
network calls it. Bytes moved: x, both weights, residual and y.

Where no kernel is chosen, ``conv_bn_act`` and ``conv_bn_add_act`` one after the other are faster than the plain composition.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastres.errors import ArgumentError, ArgumentTypeError, must, renamed
from fastres.ops import _check, _conv, _conv_cuda
from fastres.ops._op import Backend, Op, Sample
from fastres.ops._samples import Draw
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT

SCHEMA = (
    f"(Tensor x, Tensor residual, {_conv.PARAMETERS}, Tensor last_weight, Tensor? last_bias, Tensor? last_bn_weight,"
    " Tensor? last_bn_bias, Tensor last_mean, Tensor last_var, float last_eps, str last_act) -> Tensor"
)
NAME = "conv_bn_act_conv_bn_add_act"
_FIRST = 14  # arguments before those of the last convolution: x, residual, then what ``conv_bn_act`` takes
AT_ONE = (1, 1), (0, 0), (1, 1), 1  # stride, padding, dilation and groups of the last
_NAMES = {"x": "x", "x and weight": "last_weight"}
_NAMES |= {name: f"last_{name}" for name in ("weight", "bias", "bn_weight", "bn_bias", "mean", "var", "eps", "act")}


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the first convolution takes, and what the last takes after middle."""
    x, residual, *first = args[:_FIRST]
    *last, act = args[_FIRST:]
    return (x, *first), (residual, *last, *AT_ONE, act)


def composed(first: Callable[..., Tensor], last: Callable[..., Tensor], *args: Any) -> Tensor:
    """Two functions, with the arguments of ``conv_bn_act`` and of ``conv_bn_add_act``, one after the other."""
    of_first, of_last = _split(args)
    return last(first(*of_first), *of_last)


def reference(*args):
    return composed(CONV_BN_ACT.reference, CONV_BN_ADD_ACT.reference, *args)


def check(*args):
    (x, weight, *first), (residual, last_weight, *last) = _split(args)
    _conv.check(NAME, x, None, weight, *first)
    _check.tensors(NAME, x=x, residual=residual, mean=first[3], var=first[4])
    middle = x.new_empty(1).expand(_conv.output_shape(x, weight, *first[6:9]))
    try:
        _conv.check(NAME, middle, residual, last_weight, *last)
        _check.tensors(NAME, x=middle, mean=last[3], var=last[4])
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, NAME, _NAMES) from None
    if tuple(last_weight.shape[2:]) != (1, 1):
        raise must(NAME, "last_weight", "of a kernel of 1x1", tuple(last_weight.shape))


def fake(*args):
    (x, weight, *first), (_, last_weight, *_) = _split(args)
    return _conv.fake(_conv.fake(x, weight, *first[6:9]), last_weight, *AT_ONE[:3])


def samples(device, dtype):
    """Ends of bottlenecks as residual networks have them, and corner cases: odd channels, a stride, groups."""
    draw = Draw(device, dtype)

    def case(label, n, c, size, k, kernel, out, stride=1, dilation=1, groups=1, bias=False, acts=("relu", "relu"), eps=1e-5):
        x, geometry = draw.images(n, c, *size), ((stride,) * 2, (kernel // 2 * dilation,) * 2, (dilation,) * 2)
        first, last = draw.layer(k, c // groups, kernel, kernel, bias=bias), draw.layer(out, k, 1, 1, bias=bias)
        residual = draw.images(n, out, *_conv.output_shape(x, first[0], *geometry)[2:])
        return Sample(label, (x, residual, *first, eps, *geometry, groups, acts[0], *last, 2 * eps, acts[1]))

    return [
        case("3x3 of 64 channels", 2, 64, (7, 6), 64, 3, 128),
        case("3x3 of 128 channels", 1, 128, (4, 5), 128, 3, 128, acts=("relu", "none")),
        case("3x3 dilated", 1, 64, (9, 9), 64, 3, 64, dilation=2, acts=("none", "relu"), eps=1e-3),
        case("3x3 of stride 2, odd channels with biases", 2, 5, (9, 8), 6, 3, 7, stride=2, bias=True),
        case("3x3 in groups", 1, 48, (5, 6), 24, 3, 32, groups=3, acts=("none", "none"), eps=1e-12),
        case("1x1", 2, 16, (5, 4), 8, 1, 24),
    ]


def cost(*args):
    (x, weight, *first), (residual, last_weight, *_) = _split(args)
    shape = _conv.output_shape(x, weight, *first[6:9])
    places = shape[0] * shape[2] * shape[3]
    moved = x.numel() + weight.numel() + last_weight.numel() + 2 * residual.numel()
    return moved * x.element_size(), 2 * places * (weight.numel() + last_weight.numel())


def fallback(*args):
    return composed(CONV_BN_ACT, CONV_BN_ADD_ACT, *args)


def why_not_cuda(*args) -> str | None:
    (x, weight, *first), (residual, last_weight, *_) = _split(args)
    stride, padding, dilation, groups, _ = first[6:]
    reason = _conv_cuda.why_not_chain(x, weight, stride, padding, dilation, groups, last_weight)
    return reason or _conv.why_not_folded(x, residual)


def run_cuda(*args, following=None):
    """``following``: parameters, eps and act of a convolution of y, whose output then comes too."""
    (x, *first), (residual, *last) = _split(args)
    return _conv_cuda.run_chain(x, tuple(first), residual, (last[:6], last[6], last[-1]), following)


CONV_BN_ACT_CONV_BN_ADD_ACT = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("cuda", why_not_cuda, lambda: run_cuda)],
    fallback=fallback,
)
