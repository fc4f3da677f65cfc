"""Ways in which one call of an op does what two layers do, the first of which makes an operand of the last."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastres.frozen.calls import TORCH, Call, Run
from fastres.frozen.layers import Layer
from fastres.frozen.record import Value
from fastres.ops import conv_bn_act_conv_bn_add_act as chain
from fastres.ops import conv_bn_add_conv_bn_act as projection
from fastres.ops._op import Op

_AT_ONE = (1, 1), (1, 1), (0, 0)  # kernel, stride, padding


class Way(NamedTuple):
    """``suits(last, first)`` asks the layers; ``arguments(last, first)`` gives the inputs and the rest of their calls' one;
    ``composed(first, last, *args)`` runs a kernel of each on those."""

    op: Op
    operand: str  # of the last layer, that the first makes
    suits: Callable[[Layer, Layer], bool]
    arguments: Callable[[Call, Call], tuple[tuple[Value, ...], tuple[Any, ...]]]
    composed: Callable[..., Tensor]

    def call(self, last: Call, first: Call, run_last: Run, run_first: Run) -> Call:
        """The call that does what both do, beside those one after the other."""
        inputs, rest = self.arguments(last, first)
        apart: dict[str, Run] = {TORCH: functools.partial(self.composed, run_first, run_last)}
        return Call(last.layer, self.op, inputs, rest, apart, first.layer)


def _may_project(last: Layer, first: Layer) -> bool:
    plain = first.residual is None and not first.relu
    return last.kind == first.kind == "conv" and plain and (first.kernel, first.padding) == (_AT_ONE[0], _AT_ONE[2])


def _projected(last: Call, first: Call) -> tuple[tuple[Value, ...], tuple[Any, ...]]:
    (*main, act), own = last.rest, first.rest
    return (last.inputs[0], *first.inputs), (*main, *own[:8], act)


def _may_chain(last: Layer, first: Layer) -> bool:
    added = last.residual is not None and first.residual is None
    return last.kind == first.kind == "conv" and added and (last.kernel, last.stride, last.padding) == _AT_ONE


def _chained(last: Call, first: Call) -> tuple[tuple[Value, ...], tuple[Any, ...]]:
    return (*first.inputs, last.inputs[1]), (*first.rest, *last.rest[:7], last.rest[-1])


WAYS = (
    Way(projection.CONV_BN_ADD_CONV_BN_ACT, "residual", _may_project, _projected, projection.composed),
    Way(chain.CONV_BN_ACT_CONV_BN_ADD_ACT, "x", _may_chain, _chained, chain.composed),
)


def ways(last: Layer, makers: dict[Value, Layer], readers: list[Value | None]) -> Iterator[tuple[Way, Layer]]:
    """The ways that a layer could be joined to one before it, whose output nobody else reads, and that one."""
    for way in WAYS:
        operand = getattr(last, way.operand)
        first = makers.get(operand)
        if first is not None and readers.count(operand) == 1 and way.suits(last, first):
            yield way, first
