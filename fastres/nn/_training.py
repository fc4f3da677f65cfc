"""Residual blocks in training, op by op: modules looked at once, statistics updated together, the output in two."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.nn import _fused
from fastres.nn._norm import Batches, affine, update
from fastres.ops._given import Known, runner
from fastres.ops._made import Made
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_backward_bn_act import is_chosen, may_run
from fastres.ops.conv_statistics import CONV_STATISTICS, may_find


def in_training(
    bn: nn.BatchNorm2d,
    act: _fused.Act,
    x: Tensor,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm2d | None = None,
    apart: bool = False,
) -> tuple[Tensor, Tensor, Made] | None:
    """``bn_act`` or ``bn_add_bn_act`` in training, twice, and how it was made; ``apart``, as two tensors of one memory where
    there is a gradient, see ``Op.in_two``. None where they must run as ever.
    """
    norms: list[Any] = [(bn, x)] if residual_bn is None else [(bn, x), (residual_bn, residual)]
    if bn is residual_bn or not all(norm.training and _fused.fuses(value, None, norm, act, None) for norm, value in norms):
        return None
    try:
        return _end(norms, act, residual, apart, [])
    except _fused.WRONG:
        return None  # as above; nothing has been updated yet


def _end(
    norms: Sequence[tuple[nn.BatchNorm2d, Tensor]], act: _fused.Act, residual: Tensor | None, apart: bool, before: Batches,
    known: Sequence[Known] = (),
) -> tuple[Tensor, Tensor, Made]:  # fmt: skip
    """One op, its output twice, and how it was made. The statistics of the norms, which may be ``known``, and of those
    ``before``, are updated."""
    plain = BN_ACT_TRAIN if residual is None else BN_ADD_ACT_TRAIN
    op = plain if len(norms) == 1 else BN_ADD_BN_ACT_TRAIN
    inputs = (norms[0][1],) if residual is None else (norms[0][1], residual)
    arguments = *inputs, *(value for norm, _ in norms for value in affine(norm)), _fused.name(act)
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


def block(
    layers: Sequence[_fused.Layer], x: Tensor, shortcut: Tensor, projection: Sequence[Any], apart: bool
) -> tuple[Tensor, Tensor] | None:
    """A block in training op by op, its modules looked at once for all, its statistics updated together: the output twice, as
    two tensors where ``apart``. None where a module must be called, or the input is small (``in_one_node``).

    ``projection``: the convolution and the batch norm of its shortcut; none where the shortcut is added as it is.
    """
    every = [*layers, (*projection, None)] if projection else layers
    if any(type(conv) is not nn.Conv2d for conv, _, _ in every) or len({bn for _, bn, _ in every}) < len(every):
        return None
    if not _fused.joins(_fused.links(every), x) or x.numel() <= _fused.MOST_IN_ONE_NODE:
        return None
    _, bn, act = layers[-1]
    found: Batches = []
    try:
        z, statistics = _convolve(layers[0][0], x)
        for (_, norm, between), (conv, _, _) in itertools.pairwise(layers):
            batch, z, statistics = _norm_and_convolution(norm, between, conv, z, statistics)
            found.append(batch)
        norms, known = [(bn, z)], [statistics]
        if projection:
            shortcut, statistics = _convolve(projection[0], shortcut)
            norms.append((projection[1], shortcut))
            known.append(statistics)
            if shortcut.dtype != z.dtype:
                return None
        return _end(norms, act, shortcut, apart, found, known)[:2]
    except _fused.WRONG:
        return None  # as above; nothing has been updated yet


def _norm_and_convolution(
    norm: nn.BatchNorm2d, act: _fused.Act, conv: nn.Conv2d, x: Tensor, known: Known
) -> tuple[tuple[nn.BatchNorm2d, Tensor, Tensor, Tensor], Tensor, Known]:
    """What is to be updated of the norm, the convolution of ``act(norm(x))``, and the statistics of that where they are known.
    One node of autograd where a kernel is chosen that does the backward of both by their inputs."""
    if may_run(x, conv.stride):
        weight: Any = conv._parameters["weight"]
        parameters, bias, eps = affine(norm)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        if is_chosen(x, weight, (parameters, bias, eps, _fused.name(act)), geometry):
            node = _fused.as_node([(norm, act), (conv, None)], x, known=known)
            if node is not None:
                y, ((_, mean, var),), known = node
                return (norm, x, mean, var), y, known
    arguments = x, *affine(norm), _fused.name(act)
    z, mean, var = BN_ACT_TRAIN.by(runner(BN_ACT_TRAIN, arguments, (known,)), *arguments)
    return (norm, x, mean, var), *_convolve(conv, z)


def _convolve(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Known]:
    """The convolution, and the statistics of its output where a kernel is chosen that finds them beside it."""
    weight: Any = conv._parameters["weight"]
    geometry: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    if conv._parameters["bias"] is None and may_find(x, weight, *geometry):
        arguments: Any = *_fused.cast(x, weight), *geometry
        if not CONV_STATISTICS.falls_back(*arguments):
            y, mean, var = CONV_STATISTICS(*arguments)
            return y, (mean, var)
    return _fused.convolve_plain(conv, x), None
