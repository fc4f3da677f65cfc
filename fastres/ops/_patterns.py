"""Patterns in the calls of a network that an op of its own may do at once: what tuning and ``explain`` look for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.ops._op import REGISTRY, Op
from fastres.ops.bn_act import BN_ACT_BACKWARD, BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_backward_bn_act import CONV_BACKWARD_BN_ACT
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT
from fastres.ops.conv_statistics import CONV_STATISTICS

# How many of its first arguments an op normalises by the batch.
_NORMALISED = {BN_ACT_TRAIN: 1, BN_ACT_MAXPOOL_TRAIN: 1, BN_ADD_ACT_TRAIN: 1, BN_ADD_BN_ACT_TRAIN: 2}


class ProjectedEnds:
    """Finds ``conv_bn_add_conv_bn_act`` in calls of others: a ``conv_bn_add_act`` whose residual a ``conv_bn_act`` made."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}  # the results too, so that no id is used twice

    def made(self, op: str, args: tuple[Any, ...], y: Any) -> None:
        """Note a call that ran; projections are remembered."""
        if op == CONV_BN_ACT.name and tuple(args[1].shape[2:]) == (1, 1):
            *_, padding, _, groups, act = args
            if (padding, groups, act) == ((0, 0), 1, "none"):
                self._made[id(y)] = y, args

    def joined(self, op: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """That op's arguments where it could replace a call and an earlier one; else None."""
        if op != CONV_BN_ADD_ACT.name or id(args[1]) not in self._made:
            return None
        shortcut, *own = self._made[id(args[1])][1][:-4]
        x, _, *main, act = args
        return x, shortcut, *main, *own, act


class PrecedingConv(NamedTuple):
    """The convolution whose output a batch norm takes: that output and its version, the arguments of ``conv_statistics``, its
    bias, and whether it was that op."""

    y: Tensor  # kept, so that no id is used twice
    version: int
    args: tuple[Any, ...]
    bias: Tensor | None
    found: bool


class ConvNormPairs:
    """Finds, among the calls of a training step, convolutions whose output a batch norm takes, and convolutions whose input
    gradient a batch norm's backward takes."""

    def __init__(self) -> None:
        self._made: dict[int, PrecedingConv] = {}
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
        self._made[id(y)] = PrecedingConv(y, y._version, whole, bias, found)

    def before(self, op: str, args: tuple[Any, ...]) -> list[PrecedingConv]:
        """The convolution before each input that a call normalises."""
        normalised = args[: _NORMALISED.get(REGISTRY[op], 0)]
        made = [self._made[id(x)] for x in normalised if id(x) in self._made]
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
