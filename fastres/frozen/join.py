"""Ways in which one call of an op can replace two calls, the first of which makes an operand of the last."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastres.frozen.calls import TORCH, Call, Run
from fastres.frozen.layers import Layer
from fastres.frozen.record import Value
from fastres.ops import conv_bn_act_conv_bn_add_act as chain
from fastres.ops import conv_bn_act_conv_bn_add_act_conv_bn_act as long_chain
from fastres.ops import conv_bn_add_conv_bn_act as projection
from fastres.ops._op import Op
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL
from fastres.ops.conv_bn_act_maxpool import CONV_BN_ACT_MAXPOOL


class Fusion(NamedTuple):
    """``suits(last, first)`` says whether two calls can be joined; ``arguments(last, first)`` gives the inputs and the rest of
    the joined call; ``composed(first, last, *args)`` runs the two kernels on those instead."""

    op: Op
    operand: str  # of the last call's layer, that the first call makes
    suits: Callable[[Call, Call], bool]
    arguments: Callable[[Call, Call], tuple[tuple[Value, ...], tuple[Any, ...]]]
    composed: Callable[..., Any]
    constants: int = 0  # how many arguments of the last call, the first ones of its rest, the op does without
    at_last: bool = True  # it runs in the last call's place, and nothing else may read the operand; else in the first one's

    def operand_of(self, last: Call) -> Value | None:
        return getattr(last.layer, self.operand)

    def joins(self, last: Call, first: Call, readers: Sequence[Value | None]) -> bool:
        """Whether it can do what two calls do, the second of which reads the first one's output."""
        return self.suits(last, first) and not (self.at_last and readers.count(self.operand_of(last)) > 1)

    def call(self, last: Call, first: Call, run_last: Run, run_first: Run) -> Call:
        """The joined call, with the two calls in turn as its plain way."""
        inputs, rest = self.arguments(last, first)
        own = last.rest[: self.constants]
        apart: dict[str, Run] = {
            TORCH: functools.partial(self.composed, run_first, lambda x, *rest: run_last(x, *own, *rest))
        }
        layer, outputs = (last.layer, last.outputs) if self.at_last else (first.layer, (*first.outputs, *last.outputs))
        return Call(layer, self.op, inputs, rest, apart, (*first.layers, *last.layers), outputs)


def _is_pointwise(layer: Layer) -> bool:
    """A convolution of 1x1 that keeps the image's size."""
    return layer.kind == "conv" and (layer.kernel, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _are_convolutions(*calls: Call) -> bool:
    return all(len(call.layers) == 1 and call.layer.kind == "conv" for call in calls)


def _may_project(last: Call, first: Call) -> bool:
    layer = first.layer
    plain = layer.residual is None and not layer.relu
    return _are_convolutions(last, first) and plain and (layer.kernel, layer.padding, layer.groups) == ((1, 1), (0, 0), 1)


def _projected(last: Call, first: Call) -> tuple[tuple[Value, ...], tuple[Any, ...]]:
    (*main, act), own = last.rest, first.rest
    return (last.inputs[0], *first.inputs), (*main, *own[:8], act)


def _may_chain(last: Call, first: Call) -> bool:
    added = last.layer.residual is not None and first.layer.residual is None
    return _are_convolutions(last, first) and added and _is_pointwise(last.layer)


def _chained(last: Call, first: Call) -> tuple[tuple[Value, ...], tuple[Any, ...]]:
    return (*first.inputs, *last.inputs[1:]), (*first.rest, *last.rest[:7], last.rest[-1])


def _may_prolong(last: Call, first: Call) -> bool:
    chained = first.op is chain.CONV_BN_ACT_CONV_BN_ADD_ACT
    return chained and _are_convolutions(last) and last.layer.residual is None and _is_pointwise(last.layer)


def _may_pool(last: Call, first: Call) -> bool:
    return last.op is BN_ACT_MAXPOOL and _are_convolutions(first) and first.layer.residual is None


def _pooled(last: Call, first: Call) -> tuple[tuple[Value, ...], tuple[Any, ...]]:
    return first.inputs, (*first.rest, *last.rest[-3:])


def _pool_after(first: Run, last: Run, x: Tensor, *rest: Any) -> Tensor:
    return last(first(x, *rest[:-3]), *rest[-3:])


FUSIONS = (
    Fusion(CONV_BN_ACT_MAXPOOL, "x", _may_pool, _pooled, _pool_after, constants=6),
    Fusion(projection.CONV_BN_ADD_CONV_BN_ACT, "residual", _may_project, _projected, projection.composed),
    Fusion(chain.CONV_BN_ACT_CONV_BN_ADD_ACT, "x", _may_chain, _chained, chain.composed),
    Fusion(long_chain.CONV_BN_ACT_CONV_BN_ADD_ACT_CONV_BN_ACT, "x", _may_prolong, _chained, long_chain.composed, at_last=False),
)
