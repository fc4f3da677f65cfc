"""What a batch norm gives to an op and gets back from it: its parameters, its running buffers, its counter.

A frozen one, torchvision's ``FrozenBatchNorm2d``, only gives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn._plain import is_frozen_norm, trains
from fastres.ops import _running
from fastres.ops._known_stats import Known, runner
from fastres.ops._op import Op
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN

Batches = Sequence[tuple[nn.BatchNorm2d, Tensor, Tensor, Tensor]]  # of batch norms in training: input, the batch's mean and var
_KEPT = ("running_mean", "running_var", "num_batches_tracked")


def statistics(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]:
    """running_mean, running_var, weight, bias and training, as ``nn.BatchNorm2d.forward`` passes them on."""
    parameters, buffers = bn._parameters, bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if is_frozen_norm(bn):
        return mean, var, buffers["weight"], buffers["bias"], False
    if bn.training and not bn.track_running_stats:
        mean = var = None
    return mean, var, parameters["weight"], parameters["bias"], bn.training or mean is None


def momentum(bn: nn.BatchNorm2d) -> float | Tensor:
    """The update's weight; the reciprocal of the batches counted, this one included, where momentum is None."""
    if is_frozen_norm(bn):
        return 0.0
    if bn.momentum is not None:
        return bn.momentum
    counter = bn._buffers["num_batches_tracked"]
    return 0.0 if counter is None or not bn.training else (counter + 1).double().reciprocal()


def affine(bn: nn.BatchNorm2d) -> tuple[Any, Any, float]:
    """weight, bias and eps."""
    return bn._parameters["weight"], bn._parameters["bias"], bn.eps


def train(
    norms: Sequence[tuple[nn.BatchNorm2d, Tensor]], act: str, residual: Tensor | None, known: Sequence[Known],
    window: tuple[Any, ...] = (), split_output: bool = False,
) -> tuple[Tensor, Tensor, Op, tuple[Any, ...], tuple[Tensor, ...]]:  # fmt: skip
    """One op on one or two batch norms that normalise by the batch, whose statistics may be ``known``: its output twice, the
    op, its arguments, and the statistics. The running statistics of the norms are updated.

    ``window``: of the pool behind; none where there is none. ``split_output``: the output is two tensors of one memory where
    there is a gradient, see ``Op.call_split``.
    """
    plain = BN_ACT_MAXPOOL_TRAIN if window else BN_ACT_TRAIN if residual is None else BN_ADD_ACT_TRAIN
    op = plain if len(norms) == 1 else BN_ADD_BN_ACT_TRAIN
    inputs = (norms[0][1],) if residual is None else (norms[0][1], residual)
    arguments = *inputs, *(value for norm, _ in norms for value in affine(norm)), act, *window
    run = runner(op, arguments, known)

    def then(y: Tensor, *found: Tensor) -> None:
        pairs = zip(norms, found[::2], found[1::2], strict=False)  # a mask may come last
        update([(*norm, mean, var) for norm, mean, var in pairs])

    found = op.call_split(*arguments, run=run, then=then) if split_output else None
    if found is None:
        y, *statistics = op.by(run, *arguments, then=then)
        again = y
    else:
        y, again, *statistics = found
    return y, again, op, arguments, tuple(statistics[: 2 * len(norms)])


def update(batches: Batches) -> None:
    """Update the running buffers and the counters of batch norms that ran in training; none where one cannot be."""
    if not torch.compiler.is_compiling():
        together = [batch for batch in (_batch(*each) for each in batches) if batch is not None]
        if len(together) == len(batches) and _running.update_together(together):
            return
    for bn, x, _, _ in batches:
        _running.check_momentum("bn_act", momentum(bn))
        _running.check_running("bn_act", x, *statistics(bn)[:2])
    for bn, x, mean, var in batches:
        _running.update_running(x, *statistics(bn)[:2], mean, var, momentum(bn))
        count(bn)


def _batch(bn: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> _running.Batch | None:
    """What a batch norm keeps of a batch where its buffers are plain, and its momentum a number; else None."""
    values, weight = x.numel() // x.shape[1], bn.momentum
    if type(weight) is not float or not bn.track_running_stats or values < 2:
        return None
    running_mean, running_var, counter = map(bn._buffers.get, _KEPT)
    for buffer in (running_mean, running_var):
        if type(buffer) is not Tensor or buffer.requires_grad or buffer.shape != mean.shape or buffer.device != mean.device:
            return None
    if type(counter) is not Tensor or counter.device != mean.device or counter.dtype != torch.int64:
        return None
    return _running.Batch(running_mean, running_var, counter, mean, var, weight, values)  # type: ignore[arg-type]


def count(bn: nn.BatchNorm2d) -> None:
    """Count a batch, where the module does."""
    if trains(bn) and bn.track_running_stats and (counter := bn._buffers["num_batches_tracked"]) is not None:
        counter.add_(1)
