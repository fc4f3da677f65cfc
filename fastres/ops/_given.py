"""Batch norms in training whose batch's statistics are known beforehand: the convolution before them found them, see
``conv_statistics``.

Only the pass that would find them is left out. Outputs, what is saved and the backward are the op's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import native
from fastres.ops._op import REGISTRY, Op
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_statistics import CONV_STATISTICS

Known = tuple[Tensor, Tensor] | None  # mean and var, biased


def _bn_act(known, x, weight, bias, *flags):
    return native.op("cuda_bn_act")(x, weight, bias, *known[0], *flags), *known[0]


def _bn_add_act(known, x, residual, weight, bias, *flags):
    y, mask = native.op("bn_add_act_given")(x, residual, weight, bias, *known[0], *flags)
    return y, *known[0], mask


def _bn_add_bn_act(known, x, residual, weight, bias, eps, residual_weight, residual_bias, *flags):
    own, others = known
    norms = weight, bias, *own, eps, residual_weight, residual_bias, *others
    y, mask = native.op("bn_add_bn_act_given")(x, residual, *norms, *flags)
    return y, *own, *others, mask


_RUNS: dict[Op, Callable] = {BN_ACT_TRAIN: _bn_act, BN_ADD_ACT_TRAIN: _bn_add_act, BN_ADD_BN_ACT_TRAIN: _bn_add_bn_act}


def runner(op: Op, args: tuple[Any, ...], known: Sequence[Known]) -> Callable | None:
    """What computes a call's outputs by the kernels of the backend ``cuda`` without that pass; None where some statistics are
    not known, or another backend is chosen, which finds its own."""
    if not known or any(each is None for each in known) or op.backend(*args) != "cuda":
        return None
    return functools.partial(_RUNS[op], known)


class Norms:
    """Finds ``conv_statistics`` in the calls of a training step in which it was not chosen: convolutions whose output a batch
    norm takes, where there is a kernel for it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}  # the results too, so that no id is used twice

    def made(self, func: Any, args: tuple[Any, ...], y: Any) -> None:
        """Tell of a call that ran."""
        if func is not torch.ops.aten.convolution.default:
            return
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        if bias is None and not transposed:
            self._made[id(y)] = y, (x, weight, tuple(stride), tuple(padding), tuple(dilation), groups)

    def found(self, op: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """This op's arguments for each input that a call normalises."""
        norms = 2 if REGISTRY[op] is BN_ADD_BN_ACT_TRAIN else 1 if REGISTRY[op] in _RUNS else 0
        calls = [self._made[id(x)][1] for x in args[:norms] if id(x) in self._made]
        *kernels, _ = CONV_STATISTICS.backends
        return [call for call in calls if any(kernel.why_not(*call) is None for kernel in kernels)]
