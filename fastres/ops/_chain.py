"""Consecutive convolutions and batch norms, y = act(bn(conv(...act(bn(conv(x)))))[+ shortcut]), where the shortcut may be
another tensor, x itself, or a convolution and a batch norm of either: what the layers of a block do.

The ops are those of the pages. A convolution passes the statistics to the batch norm behind it where a kernel that finds them
is chosen (``_known_stats``). ``_node`` turns a chain into one autograd node.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import dispatch
from fastres.ops._conv_choice import why_not_fast
from fastres.ops._known_stats import Known, runner
from fastres.ops._recompute import Producer
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv import CONV
from fastres.ops.conv_statistics import CONV_STATISTICS, may_find


class Convolution(NamedTuple):
    """What defines a convolution besides its tensors: stride, padding, dilation and groups."""

    geometry: tuple


class Norm(NamedTuple):
    """What defines a batch norm and the activation behind it, besides their tensors."""

    eps: float
    act: str


class Chain(NamedTuple):
    """What defines a chain besides its tensors."""

    links: tuple[Convolution | Norm, ...]  # the last of which adds the shortcut
    adds_x: bool  # whether the shortcut starts from x
    dtype: torch.dtype | None  # that autocast gives convolutions; None where it is off
    projection: tuple[Convolution, Norm] | None = None  # the shortcut's own
    split_output: bool = False  # whether y is wanted as two tensors that share memory
    made: Producer | None = None  # how x was made; None where it is kept


Statistics = list[tuple[Tensor, Tensor, Tensor]]  # of each batch norm: its input, mean and var
FIRST, TENSORS = 2, 2  # tensors before those of the links: x and the residual; tensors per link: weight and bias


def cast(chain: Chain, tensor: Any) -> Any:
    """Cast as autocast casts the inputs of a convolution."""
    if tensor is None or chain.dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(chain.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, before_norm: bool) -> tuple:
    """The op that did the convolution, None where PyTorch's is faster; its arguments; its outputs. ``before_norm``: a batch
    norm can use the statistics of y."""
    if before_norm and bias is None and may_find(x, weight, *geometry):
        args = x, weight, *geometry
        if not CONV_STATISTICS.falls_back(*args):
            return CONV_STATISTICS, args, CONV_STATISTICS(*args)
    if why_not_fast(x, weight.shape, *geometry) is None:
        return CONV, (x, weight, bias, *geometry), (CONV(x, weight, bias, *geometry),)
    return None, (x, weight, bias, *geometry), (torch.conv2d(x, weight, bias, *geometry),)


def may_join_layers(x: Tensor) -> bool:
    """Whether there may be kernels that do the work of more than one layer; asked once for all layers."""
    return x.is_cuda or dispatch.is_forced()


def compose(chain: Chain, tensors: Sequence[Any], on_op: Callable | None = None) -> tuple[Tensor, Statistics]:
    """Run the layers on ``(x, residual, *parameters)``; returns y and the statistics of the batch norms' inputs. ``on_op`` is
    called with every op that ran and the index of its link; the projection's convolution has the index behind the last
    link's."""
    x, residual, *parameters = tensors
    statistics: Statistics = []
    before_norms = len(chain.links) > 1 and may_join_layers(x)  # a convolution alone has no batch norm here

    def convolve(index: int, value: Tensor, link: Convolution) -> tuple[Tensor, Known]:
        weight, bias = parameters[TENSORS * index :][:TENSORS]
        inputs = cast(chain, value), cast(chain, weight), cast(chain, bias)
        op, args, (y, *found) = _convolve(*inputs, link.geometry, before_norms)
        if on_op is not None:
            on_op(index, op, args, (y, *found))
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
        if on_op is not None:
            on_op(index, op, args, (y, *outputs))
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
