"""The running buffers of batch norm in training: what they must be, and their update."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.errors import must, must_type
from fastres.kernels import native
from fastres.ops import _check
from fastres.ops._op import Once, is_interposed


def is_training(op: str, training: Any, momentum: Any) -> bool:
    """The flag, once it and momentum are known to be what torch's batch norm accepts."""
    _check.flag(op, "training", training)
    check_momentum(op, momentum)
    return training


def check_momentum(op: str, momentum: Any, prefix: str = "") -> None:
    """Refuse a momentum that torch's batch norm would not take."""
    name, what = f"{prefix}momentum", "a number or a tensor of one element"
    if not isinstance(momentum, (int, float, Tensor)):
        raise must_type(op, name, what, momentum)
    if isinstance(momentum, Tensor):
        _check.strided(op, name, momentum)
        if momentum.numel() != 1:
            raise must(op, name, what, f"a tensor of shape {tuple(momentum.shape)}")
        if momentum.dtype == torch.bool or momentum.is_complex():
            raise must(op, name, what, f"one of {momentum.dtype}")


def needs_statistics(op: str, mean: Tensor | None, var: Tensor | None, prefix: str = "") -> None:
    """Refuse evaluation without running buffers."""
    if mean is None or var is None:
        name = f"{prefix}running_mean" if mean is None else f"{prefix}running_var"
        raise must(
            op, name, "a tensor when training is False", None, "pass training=True to use the batch's statistics"
        )


@Once
def check_running(op: str, x: Tensor, mean: Any, var: Any, prefix: str = "") -> None:
    """Refuse running buffers that could not be updated, or only one of them."""
    _check.images(op, **{prefix.removesuffix("_") or "x": x})
    if (mean is None) != (var is None):
        got = f"{type(mean).__name__} and {type(var).__name__}"
        raise must(op, f"{prefix}running_mean and {prefix}running_var", "both tensors or both None", got)
    if mean is None:
        return
    _check.per_channel(op, x.shape[1], x, **{f"{prefix}mean": mean, f"{prefix}var": var})
    for name, buffer in (("mean", mean), ("var", var)):
        if buffer.stride(0) == 0 and x.shape[1] > 1:
            raise must(op, f"{prefix}{name}", "a tensor of its own memory", "an expanded one", "clone it")


def update_running(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance unbiased; an empty batch changes nothing."""
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if running_mean is None or running_var is None or values == 0:
        return
    if torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
        with torch.no_grad():
            _update(running_mean, running_var, mean, var, momentum, values / (values - 1))
    else:  # the context would cost a sixth of the update
        _update(running_mean, running_var, mean, var, momentum, values / (values - 1))


def _update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float | Tensor, unbiased: float
) -> None:
    if isinstance(momentum, Tensor):
        momentum = momentum.detach().reshape(())
        running_mean.mul_(1 - momentum).add_(mean * momentum)
        running_var.mul_(1 - momentum).add_(var * (momentum * unbiased))
    else:
        momentum = float(momentum)  # a bool would fail half way
        update = _native_update(running_mean, running_var)
        if update is not None:
            update([running_mean], [running_var], [], [mean], [var], [momentum], [unbiased])
            torch.autograd.graph.increment_version((running_mean, running_var))
            return
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * unbiased)


class Batch(NamedTuple):
    """One batch norm's update in training: its plain buffers, and what goes into them."""

    running_mean: Tensor
    running_var: Tensor
    counter: Tensor
    mean: Tensor
    var: Tensor
    momentum: float
    values: int  # of a channel, above 1


def update_together(batches: Sequence[Batch]) -> bool:
    """``update_running`` of several batch norms, with their counters of batches, in few calls; False where they must be updated
    one by one.

    On a CPU it is one native call, which rounds once. Elsewhere it is the same arithmetic in few launches, for buffers that are
    all distinct and laid out alike: a launch takes the host longer than its kernel takes a GPU.
    """
    means, variances, counters, mean, var, momenta, values = zip(*batches, strict=True)
    unbiased = [count / (count - 1) for count in values]
    update = _native_update(*means, *variances)
    if update is not None:
        update(means, variances, counters, mean, var, momenta, unbiased)
        torch.autograd.graph.increment_version((*means, *variances, *counters))
        return True
    if len(batches) == 1 or len({*momenta}) > 1 or not _are_laid_alike(batches):
        return False
    momentum = momenta[0]
    torch._foreach_mul_([*means, *variances], 1 - momentum)
    torch._foreach_add_(means, mean, alpha=momentum)
    for factor in set(unbiased):
        alike = [index for index, each in enumerate(unbiased) if each == factor]
        torch._foreach_add_([variances[i] for i in alike], [var[i] for i in alike], alpha=momentum * factor)
    torch._foreach_add_(counters, 1)
    return True


def _are_laid_alike(batches: Sequence[Batch]) -> bool:
    """Whether all buffers have the layout of what goes into them, and none is shared."""
    places = set()
    for mean, var, counter, of_batch, *_ in batches:
        if any(b.dtype != of_batch.dtype or b.stride() != of_batch.stride() for b in (mean, var)):
            return False
        places |= {mean.data_ptr(), var.data_ptr(), counter.data_ptr()}
    return len(places) == 3 * len(batches)


def _native_update(*tensors: Tensor) -> Any:
    """The native update of these buffers at once, instead of five calls each, which took a tenth of a small layer's step; None
    where they are not plain ones on a CPU, or something must see the calls."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or is_interposed():
        return None
    return _loaded_update() if all(type(t) is Tensor and not t.is_neg() for t in tensors) else None


@functools.cache
def _loaded_update() -> Any:
    return None if native.why_not("cpu_bn_running_") else native.op("cpu_bn_running_")
