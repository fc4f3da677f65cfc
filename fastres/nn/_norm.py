"""What an ``nn.BatchNorm2d`` gives to an op and gets back from it: its parameters, its running buffers, its counter."""

from typing import Any

from torch import Tensor, nn

from fastres.ops import _running

Batches = list[tuple[nn.BatchNorm2d, Tensor, Tensor, Tensor]]  # of batch norms in training: input, the batch's mean and var
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
