"""The end of a residual block in training: its output as two tensors, and how it was made."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.nn import _fused
from fastres.nn._norm import train
from fastres.nn._plain import Act, trains
from fastres.ops._known_stats import Known
from fastres.ops._recompute import Producer


def in_training(
    bn: nn.BatchNorm2d,
    act: Act,
    x: Tensor,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm2d | None = None,
    split_output: bool = False,
    known: Sequence[Known] = (),
) -> tuple[Tensor, Tensor, Producer] | None:
    """The output of ``bn_act`` or ``bn_add_bn_act`` in training, twice, and how it was made, see ``_norm.train``. None where
    they must run as usual.
    """
    norms: list[Any] = [(bn, x)] if residual_bn is None else [(bn, x), (residual_bn, residual)]
    if bn is residual_bn or not all(trains(norm) and _fused.fuses(value, None, norm, act, None) for norm, value in norms):
        return None
    try:
        y, again, op, arguments, statistics = train(norms, _fused.name(act), residual, known, split_output=split_output)
    except _fused.WRONG:
        return None  # the modules raise PyTorch's own error, or accept what the op does not; nothing has been updated yet
    return y, again, Producer(op, arguments, statistics, y._version)
