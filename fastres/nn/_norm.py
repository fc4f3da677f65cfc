"""What an ``nn.BatchNorm2d`` gives to an op and gets back from it: its parameters, its running buffers, its counter."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.ops import _running
from fastres.ops._given import Known, runner
from fastres.ops._made import Made
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN

Batches = Sequence[tuple[nn.BatchNorm2d, Tensor, Tensor, Tensor]]  # of batch norms in training: input, the batch's mean and var
# Where the updates of several batch norms are few launches: each takes the host longer than its kernel a GPU. A CPU has a call
# of its own for each.
TOGETHER = {"cuda"}
_KEPT = ("running_mean", "running_var", "num_batches_tracked")


def statistics(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]:
    """running_mean, running_var, weight, bias and training, as ``nn.BatchNorm2d.forward`` passes them on."""
    parameters, buffers = bn._parameters, bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if bn.training and not bn.track_running_stats:
        mean = var = None
    return mean, var, parameters["weight"], parameters["bias"], bn.training or mean is None


def momentum(bn: nn.BatchNorm2d) -> float | Tensor:
    """The update's weight; the reciprocal of the batches counted, this one included, where momentum is None."""
    if bn.momentum is not None:
        return bn.momentum
    counter = bn._buffers["num_batches_tracked"]
    return 0.0 if counter is None or not bn.training else 1.0 / (counter + 1)


def affine(bn: nn.BatchNorm2d) -> tuple[Any, Any, float]:
    """weight, bias and eps."""
    return bn._parameters["weight"], bn._parameters["bias"], bn.eps


def train(
    norms: Sequence[tuple[nn.BatchNorm2d, Tensor]], act: str, residual: Tensor | None, known: Sequence[Known],
    window: tuple[Any, ...] = (), apart: bool = False, before: Batches = (),
) -> tuple[Tensor, Tensor, Made]:  # fmt: skip
    """One op on one or two batch norms in training, whose statistics may be ``known``: its output twice, and how it was made.
    The running statistics of the norms, and of those that ran ``before``, are updated.

    ``window``: of the pool behind; none where there is none. ``apart``: the output is two tensors of one memory where there is
    a gradient, see ``Op.in_two``.
    """
    plain = BN_ACT_MAXPOOL_TRAIN if window else BN_ACT_TRAIN if residual is None else BN_ADD_ACT_TRAIN
    op = plain if len(norms) == 1 else BN_ADD_BN_ACT_TRAIN
    inputs = (norms[0][1],) if residual is None else (norms[0][1], residual)
    arguments = *inputs, *(value for norm, _ in norms for value in affine(norm)), act, *window
    run = runner(op, arguments, known)
    found = op.in_two(*arguments, run=run) if apart else None
    if found is None:
        y, *statistics = op.by(run, *arguments)
        again = y
    else:
        y, again, *statistics = found
    statistics = statistics[: 2 * len(norms)]
    update([*before, *((*norm, *statistics[2 * index : 2 * index + 2]) for index, norm in enumerate(norms))])
    return y, again, Made(op, arguments, tuple(statistics), y._version)


def update(batches: Batches) -> None:
    """Update the running buffers and the counters of batch norms that ran in training; none where one cannot be."""
    values = [x.numel() // x.shape[1] for _, x, _, _ in batches]
    if len(batches) > 1 and batches[0][1].device.type in TOGETHER and min(values) > 1 and _are_alike(batches):
        buffers = [bn._buffers for bn, *_ in batches]
        running: Any = [(each["running_mean"], each["running_var"]) for each in buffers]
        counters: Any = [each["num_batches_tracked"] for each in buffers]
        weight: Any = batches[0][0].momentum
        _running.update_together(running, [(mean, var) for *_, mean, var in batches], values, weight, counters)
        return
    for bn, x, _, _ in batches:
        _running.check_running("bn_act", x, *statistics(bn)[:2])
    for bn, x, mean, var in batches:
        _running.update_running(x, *statistics(bn)[:2], mean, var, momentum(bn))
        count(bn)


def _are_alike(batches: Batches) -> bool:
    """Whether batch norms keep statistics by one momentum, in plain buffers laid as the batch's, none of which is another's."""
    common = batches[0][0].momentum
    places = set()
    for bn, _, mean, _ in batches:
        if type(bn.momentum) is not float or bn.momentum != common or not bn.track_running_stats:
            return False
        running_mean, running_var, counter = map(bn._buffers.get, _KEPT)
        for buffer in (running_mean, running_var):
            if type(buffer) is not Tensor or buffer.requires_grad or buffer.dtype != mean.dtype or buffer.device != mean.device:
                return False
            if buffer.shape != mean.shape or buffer.stride() != mean.stride():
                return False
            places.add(buffer.data_ptr())
        if type(counter) is not Tensor or counter.device != mean.device:
            return False
        places.add(counter.data_ptr())
    return len(places) == 3 * len(batches)


def count(bn: nn.BatchNorm2d) -> None:
    """Count a batch, where the module does."""
    counter = bn._buffers["num_batches_tracked"]
    if bn.training and bn.track_running_stats and counter is not None:
        counter.add_(1)
