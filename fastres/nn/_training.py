"""Residual blocks in training, op by op: modules looked at once, statistics updated together, the output in two."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.nn import _fused
from fastres.nn._norm import affine, train
from fastres.ops._given import Known, runner
from fastres.ops._made import Made
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.conv_backward_bn_act import is_chosen, may_run


def in_training(
    bn: nn.BatchNorm2d,
    act: _fused.Act,
    x: Tensor,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm2d | None = None,
    apart: bool = False,
    known: Sequence[Known] = (),
) -> tuple[Tensor, Tensor, Made] | None:
    """``bn_act`` or ``bn_add_bn_act`` in training, twice, and how it was made, see ``_norm.train``. None where they must run as
    ever.
    """
    norms: list[Any] = [(bn, x)] if residual_bn is None else [(bn, x), (residual_bn, residual)]
    if bn is residual_bn or not all(norm.training and _fused.fuses(value, None, norm, act, None) for norm, value in norms):
        return None
    try:
        return train(norms, _fused.name(act), residual, known, apart=apart)
    except _fused.WRONG:
        return None  # as above; nothing has been updated yet


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
    found: list[Any] = []
    try:
        z, statistics = _fused.find_statistics(layers[0][0], x)
        for (_, norm, between), (conv, _, _) in itertools.pairwise(layers):
            batch, z, statistics = _norm_and_convolution(norm, between, conv, z, statistics)
            found.append(batch)
        norms, known = [(bn, z)], [statistics]
        if projection:
            shortcut, statistics = _fused.find_statistics(projection[0], shortcut)
            norms.append((projection[1], shortcut))
            known.append(statistics)
            if shortcut.dtype != z.dtype:
                return None
        return train(norms, _fused.name(act), shortcut, known, apart=apart, before=found)[:2]
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
    return (norm, x, mean, var), *_fused.find_statistics(conv, z)
