"""Convolutions and batch norms in a row, y = act(bn(conv(...act(bn(conv(x)))))[+ shortcut]), where the shortcut may be another
tensor, x itself, or a convolution and a batch norm of either: what the layers of a block do.

The ops are those of the pages. A convolution tells the batch norm behind it the statistics where a kernel is chosen that finds
them (``_given``). ``_node`` makes one node of autograd of a chain.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import dispatch
from fastres.ops._given import Known, runner
from fastres.ops._made import Made
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv import CONV, why_not_fast
from fastres.ops.conv_statistics import CONV_STATISTICS, may_find


class Convolution(NamedTuple):
    """What a convolution does beside its tensors: stride, padding, dilation and groups."""

    geometry: tuple


class Norm(NamedTuple):
    """What a batch norm and the activation behind it do beside their tensors."""

    eps: float
    act: str


class Chain(NamedTuple):
    """The links, the last of which adds the shortcut; whether that starts from x; the dtype that autocast asks of convolutions,
    None where it is off; the shortcut's own convolution and batch norm, None where it has none; whether y is wanted as two
    tensors of one memory; how x was made, None where it is kept."""

    links: tuple[Convolution | Norm, ...]
    adds_x: bool
    dtype: torch.dtype | None
    projection: tuple[Convolution, Norm] | None = None
    apart: bool = False
    made: Made | None = None


Statistics = list[tuple[Tensor, Tensor, Tensor]]  # of each batch norm: its input, mean and var
FIRST, TENSORS = 2, 2  # tensors before those of the links, x and the residual; of a link, weight and bias


def cast(chain: Chain, tensor: Any) -> Any:
    """As autocast casts what goes into a convolution."""
    if tensor is None or chain.dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(chain.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, before_norm: bool) -> tuple:
    """The op that did the convolution, None where PyTorch's is the faster; its arguments and outputs. ``before_norm``: the
    statistics of y are of use."""
    if before_norm and bias is None and may_find(x, weight, *geometry):
        args = x, weight, *geometry
        if not CONV_STATISTICS.falls_back(*args):
            return CONV_STATISTICS, args, CONV_STATISTICS(*args)
    if why_not_fast(x, weight.shape, *geometry) is None:
        return CONV, (x, weight, bias, *geometry), (CONV(x, weight, bias, *geometry),)
    return None, (x, weight, bias, *geometry), (torch.conv2d(x, weight, bias, *geometry),)


def asks(x: Tensor) -> bool:
    """Whether kernels may be there that do more than one layer's work; asked once for all layers."""
    return x.is_cuda or dispatch.is_forced()


def compose(chain: Chain, tensors: Sequence[Any], told: Callable | None = None) -> tuple[Tensor, Statistics]:
    """Run the layers on ``(x, residual, *parameters)``; ``told`` hears of every op that ran, and which link it was, that of the
    projection's convolution being one more than there are. Gives y, and the statistics of the batch norms' inputs."""
    x, residual, *parameters = tensors
    statistics: Statistics = []
    before_norms = len(chain.links) > 1 and asks(x)  # of a convolution alone, none takes its statistics

    def convolve(index: int, value: Tensor, link: Convolution) -> tuple[Tensor, Known]:
        weight, bias = parameters[TENSORS * index :][:TENSORS]
        inputs = cast(chain, value), cast(chain, weight), cast(chain, bias)
        op, args, (y, *found) = _convolve(*inputs, link.geometry, before_norms)
        if told is not None:
            told(index, op, args, (y, *found))
        return y, (found[0], found[1]) if found else None

    def normalise(index: int, value: Tensor, link: Norm, known: Known) -> Tensor:
        op, inputs, all_known = BN_ACT_TRAIN, [value], [known]
        args, others = (value,), ()  # type: tuple, tuple
        if index == len(chain.links) - 1 and (chain.adds_x or residual is not None):
            op, shortcut = BN_ADD_ACT_TRAIN, x if chain.adds_x else residual
            if chain.projection is not None:
                convolution, norm = chain.projection
                shortcut, own = convolve(index + 1, shortcut, convolution)
                op, others = BN_ADD_BN_ACT_TRAIN, (*parameters[TENSORS * (index + 2) :], norm.eps)
                inputs, all_known = [value, shortcut], [known, own]
            args = value, shortcut
        args = (*args, *parameters[TENSORS * index :][:TENSORS], link.eps, *others, link.act)
        y, *outputs = op(*args) if known is None else op.by(runner(op, args, all_known), *args)
        if told is not None:
            told(index, op, args, (y, *outputs))
        for place, normalised in enumerate(inputs):
            mean, var = outputs[TENSORS * place :][:TENSORS]
            statistics.append((normalised, mean, var))
        return y

    value: Tensor = x
    known: Known = None
    for index, link in enumerate(chain.links):
        if isinstance(link, Convolution):
            value, known = convolve(index, value, link)
        else:
            value, known = normalise(index, value, link, known), None
    return value, statistics
