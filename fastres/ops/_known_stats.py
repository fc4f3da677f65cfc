"""Batch norms in training whose batch statistics the preceding convolution has already found (``conv_statistics``).

Only the pass that would find them is left out; outputs, what is saved, and the backward are the op's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastres.kernels import native
from fastres.ops._op import Op
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN

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
