"""Batch norms in training whose batch statistics the preceding convolution has already found (``conv_statistics``).

Only the pass that would find them is left out; outputs, what is saved, and the backward are the op's own. Also what tuning
looks for: places where kernels for a convolution and a batch norm together could run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels import native
from fastres.kernels.layout import memory_format
from fastres.ops._op import REGISTRY, Op
from fastres.ops.bn_act import BN_ACT_BACKWARD, BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_backward_bn_act import CONV_BACKWARD_BN_ACT
from fastres.ops.conv_statistics import CONV_STATISTICS

Known = tuple[Tensor, Tensor] | None  # mean and var, biased


def _bn_act(known, x, weight, bias, *flags):
    return native.op("cuda_bn_act")(x, weight, bias, *known[0], *flags), *known[0]


def _bn_act_maxpool(known, x, weight, bias, *flags):
    return native.op("cuda_bn_act_maxpool")(x, weight, bias, *known[0], *flags), *known[0]


def _bn_add_act(known, x, residual, weight, bias, *flags):
    y, mask = native.op("bn_add_act_given")(x, residual, weight, bias, *known[0], *flags)
    return y, *known[0], mask


def _bn_add_bn_act(known, x, residual, weight, bias, eps, residual_weight, residual_bias, *flags):
    own, others = known
    norms = weight, bias, *own, eps, residual_weight, residual_bias, *others
    y, mask = native.op("bn_add_bn_act_given")(x, residual, *norms, *flags)
    return y, *own, *others, mask


_RUNS: dict[Op, Callable] = {
    BN_ACT_TRAIN: _bn_act,
    BN_ACT_MAXPOOL_TRAIN: _bn_act_maxpool,
    BN_ADD_ACT_TRAIN: _bn_add_act,
    BN_ADD_BN_ACT_TRAIN: _bn_add_bn_act,
}


def runner(op: Op, args: tuple[Any, ...], known: Sequence[Known]) -> Callable | None:
    """The function that computes a call's outputs with the kernels of the backend ``cuda`` without that pass; None where some
    statistics are not known, or another backend is chosen, which finds its own."""
    if not known or any(each is None for each in known) or op.backend(*args) != "cuda":
        return None
    return functools.partial(_RUNS[op], known)


class Before(NamedTuple):
    """The convolution whose output a batch norm takes: that output and its version, the arguments of ``conv_statistics``, its
    bias, and whether it was that op."""

    y: Tensor  # kept, so that no id is used twice
    version: int
    args: tuple[Any, ...]
    bias: Tensor | None
    found: bool


class Norms:
    """Finds, among the calls of a training step, convolutions whose output a batch norm takes, and convolutions whose input
    gradient a batch norm's backward takes."""

    def __init__(self) -> None:
        self._made: dict[int, Before] = {}
        self._gradient: Any = None  # the last one of a convolution's input, and what of

    def made(self, func: Any, args: tuple[Any, ...], y: Any) -> None:
        """Note a call that ran."""
        if func is torch.ops.aten.convolution_backward.default:
            grad_y, _, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
            window = tuple(stride), tuple(padding), tuple(dilation), groups
            self._gradient = None if transposed else (y[0], grad_y, weight, window)
        if func is torch.ops.fastres.conv_backward_input.default:
            grad_y, weight, _, stride, padding, dilation, groups = args
            self._gradient = y, grad_y, weight, (tuple(stride), tuple(padding), tuple(dilation), groups)
        bias, found = None, func is torch.ops.fastres.conv_statistics.default
        if found:
            x, weight, *geometry, groups = args
            y = y[0]
        elif func is torch.ops.fastres.conv.default:
            x, weight, bias, *geometry, groups = args
        elif func is torch.ops.aten.convolution.default and not args[6]:  # transposed
            x, weight, bias, *geometry, _, _, groups = args
        else:
            return
        whole = x, weight, *map(tuple, geometry), groups
        self._made[id(y)] = Before(y, y._version, whole, bias, found)

    def before(self, op: str, args: tuple[Any, ...]) -> list[Before]:
        """The convolution before each input that a call normalises."""
        norms = 2 if REGISTRY[op] is BN_ADD_BN_ACT_TRAIN else 1 if REGISTRY[op] in _RUNS else 0
        made = [self._made[id(x)] for x in args[:norms] if id(x) in self._made]
        return [each for each in made if each.version == each.y._version]

    def missed(self, op: str, args: tuple[Any, ...]) -> list[tuple[Op, tuple[Any, ...]]]:
        """``conv_statistics`` and ``conv_backward_bn_act`` with their arguments, where a kernel exists but was not chosen."""
        if REGISTRY[op] is BN_ACT_BACKWARD:
            return self._joined(*args)
        calls = [each.args for each in self.before(op, args) if each.bias is None and not each.found]
        return [(CONV_STATISTICS, call) for call in calls if _has_kernel(CONV_STATISTICS, call)]

    def _joined(self, grad_z, x, weight, bias, mean, var, eps, act, training) -> list[tuple[Op, tuple[Any, ...]]]:
        if self._gradient is None or self._gradient[0] is not grad_z or not training:
            return []
        _, grad_y, conv_weight, geometry = self._gradient
        grad_y = grad_y.contiguous(memory_format=memory_format(x))
        call = grad_y, conv_weight, x, weight, bias, mean, var, eps, act, *geometry
        return [(CONV_BACKWARD_BN_ACT, call)] if _has_kernel(CONV_BACKWARD_BN_ACT, call) else []


def _has_kernel(op: Op, call: tuple[Any, ...]) -> bool:
    *kernels, _ = op.backends
    return any(kernel.why_not(*call) is None for kernel in kernels)
