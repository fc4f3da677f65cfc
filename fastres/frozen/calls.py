"""Layers as calls of ops, each beside the ways in which PyTorch alone does the same; weights folded, backends pack them once.

A backend folds batch norm into a convolution's weights and packs what comes out (``ops/_fold.py``). Here that is done: the op
gets the folded weights beside a batch norm that changes nothing.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.frozen.layers import Layer
from fastres.frozen.record import Value
from fastres.ops import _fold
from fastres.ops._op import Op
from fastres.ops.add_act import ADD_ACT
from fastres.ops.bn_act import BN_ACT
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL
from fastres.ops.bn_add_act import BN_ADD_ACT
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_act_maxpool import CONV_BN_ACT_MAXPOOL
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT
from fastres.ops.conv_bn_add_conv_bn_act import CONV_BN_ADD_CONV_BN_ACT

EPS = 2.0**-10  # of batch norms whose variance is 1 - EPS, exactly
TORCH = "torch"
TORCH_AND_BN = "torch + bn_act"  # a convolution, then bias, addition and ReLU in one pass
Run = Callable[..., Tensor]
Constants = tuple[Any, ...]


@dataclass(eq=False)
class Call:
    """What a layer computes: ``op(*inputs, *rest)``, or, without an op, a function of PyTorch's."""

    layer: Layer
    op: Op | None
    inputs: tuple[Value, ...]
    rest: tuple[Any, ...]
    plain: dict[str, Run]  # PyTorch's ways, with the same arguments
    before: Layer | None = None  # whose work it does too


def constants(layers: Iterable[Layer]) -> dict[Layer, Constants]:
    """The parameters of each layer, in float32, and the batch norm that changes nothing."""
    found: dict[Layer, Constants] = {}
    for layer in layers:
        if layer.weight is None:
            continue
        if layer.weight.is_inference():  # whose changes no fold could see
            layer.weight, layer.bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        if layer.bias is None:
            mean, scale, shift = layer.weight
            found[layer] = (scale, shift, mean, torch.full_like(mean, 1 - EPS))
        else:
            found[layer] = (layer.weight, layer.bias, None, None, *_nothing(len(layer.weight), layer.weight.device))
            _fold.keep(found[layer], EPS)
    return found


def _nothing(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch norm that changes nothing."""
    return torch.zeros(channels, device=device), torch.full((channels,), 1 - EPS, device=device)


def call(layer: Layer, own: Constants, channels: int, device: torch.device) -> Call:
    """The call of one layer; ``channels`` are those of its input."""
    act = "relu" if layer.relu else "none"
    inputs = (layer.x,) if layer.residual is None else (layer.x, layer.residual)
    if layer.kind == "conv":
        rest = (*own, EPS, layer.stride, layer.padding, layer.dilation, 1, act)
        op = CONV_BN_ACT if layer.residual is None else CONV_BN_ADD_ACT
        return Call(layer, op, inputs, rest, {TORCH: _with(layer, _conv), TORCH_AND_BN: _with(layer, _conv_then_bn)})
    if layer.kind == "bn":
        return Call(layer, BN_ACT, inputs, (*own, EPS, act), {TORCH: BN_ACT.reference})
    if layer.kind == "add":
        return Call(layer, ADD_ACT, inputs, (act,), {TORCH: ADD_ACT.reference})
    if layer.kind == "max_pool" and not layer.ceil:
        window = (layer.kernel, layer.stride, layer.padding)
        pool = functools.partial(_max_pool, layer)
        return Call(layer, BN_ACT_MAXPOOL, inputs, (None, None, *_nothing(channels, device), EPS, act, *window), {TORCH: pool})
    if layer.kind == "linear":
        return Call(layer, None, inputs, (*own, act), {TORCH: _with(layer, _linear)})
    return Call(layer, None, inputs, (), {TORCH: functools.partial(_PLAIN[layer.kind], layer)})


# ---- two layers in one call ------------------------------------------------------------------------


class Join(NamedTuple):
    """A way to do a layer and the one before, which made the value between them, in one call of an op."""

    op: Op
    between: Callable[[Layer], Value | None]  # which of a layer's inputs it is
    can_join: Callable[[Layer, Layer], bool]  # whether a layer and the one before could be done so, if nobody else reads it
    call: Callable[[Call, Call], Constants]  # the inputs and the rest of the call that does the calls of both
    in_two: Callable[[Run, Run, Constants], Run]  # the same by what runs each; with what the last call takes behind its inputs

    def joined(self, last: Call, before: Call, run_last: Run, run_before: Run) -> Call:
        """The call that does two; its one plain way does one after the other."""
        inputs, rest = self.call(last, before)
        return Call(last.layer, self.op, inputs, rest, {TORCH: self.in_two(run_last, run_before, last.rest)}, before.layer)


def _is_projection(last: Layer, before: Layer) -> bool:
    plain = last.kind == before.kind == "conv" and before.residual is None and not before.relu
    return plain and before.kernel == (1, 1) and before.padding == (0, 0)


def _with_projection(last: Call, before: Call) -> Constants:
    *main, act = last.rest
    return (last.inputs[0], *before.inputs), (*main, *before.rest[:8], act)


def _projected_then_added(run_last: Run, run_before: Run, _: Constants) -> Run:
    def run(x: Tensor, source: Tensor, *rest: Any) -> Tensor:
        *main, act = rest[:11] + rest[-1:]
        return run_last(x, run_before(source, *rest[11:19], (0, 0), (1, 1), 1, "none"), *main, act)

    return run


def _is_stem(last: Layer, before: Layer) -> bool:
    return last.kind == "max_pool" and not last.ceil and before.kind == "conv" and before.residual is None


def _with_pool(last: Call, before: Call) -> Constants:
    return before.inputs, (*before.rest, *last.rest[-3:])


def _convolved_then_pooled(run_last: Run, run_before: Run, pool: Constants) -> Run:
    return lambda x, *rest: run_last(run_before(x, *rest[:-3]), *pool)


JOINS = (
    Join(CONV_BN_ADD_CONV_BN_ACT, lambda layer: layer.residual, _is_projection, _with_projection, _projected_then_added),
    Join(CONV_BN_ACT_MAXPOOL, lambda layer: layer.x, _is_stem, _with_pool, _convolved_then_pooled),
)


# ---- PyTorch's ways --------------------------------------------------------------------------------


def _with(layer: Layer, run: Run) -> Run:
    """A function of x, a residual or None, and the rest, with the arguments of the layer's call."""
    return run if layer.residual is not None else lambda x, *rest: run(x, None, *rest)


def _folded(parameters: Constants, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias in a dtype, and the bias in float32."""

    def finish(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return w.to(dtype, memory_format=torch.channels_last), b.to(dtype), b.float()

    return _fold.folded(parameters, EPS, ("plain", dtype), finish)


def _finished(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Addition and ReLU in place."""
    if residual is not None:
        y.add_(residual)
    return y.relu_() if act == "relu" else y


def _conv(x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
    weight, bias, _ = _folded(rest[:6], x.dtype)
    return _finished(F.conv2d(x, weight, bias, *rest[7:11]), residual, rest[-1])


def _conv_then_bn(x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
    """The convolution alone, then bias, addition and ReLU in one pass."""
    weight, _, bias = _folded(rest[:6], x.dtype)
    z, norm = F.conv2d(x, weight, None, *rest[7:11]), (None, bias, *rest[4:6], EPS, rest[-1])
    return BN_ACT(z, *norm) if residual is None else BN_ADD_ACT(z, residual, *norm)


def _linear(x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
    weight, bias = _fold.folded(rest[:6], EPS, ("linear", x.dtype), lambda w, b: (w.to(x.dtype).flatten(1), b.to(x.dtype)))
    y = F.linear(x.flatten(1), weight, bias)[:, :, None, None]
    return _finished(y, residual, rest[-1])


def _max_pool(layer: Layer, x: Tensor, *_: Any) -> Tensor:
    return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil)


def _avg_pool(layer: Layer, x: Tensor) -> Tensor:
    if layer.kernel == (0, 0):
        return x.mean((2, 3), keepdim=True)
    return F.avg_pool2d(x, layer.kernel, layer.stride, layer.padding, layer.ceil, count_include_pad=False)


def _relu(layer: Layer, x: Tensor) -> Tensor:
    return F.relu(x)


def _pad(layer: Layer, x: Tensor) -> Tensor:
    x = x[:, :, :: layer.stride[0], :: layer.stride[1]]
    return F.pad(x, (0, 0, 0, 0, 0, layer.out_channels - x.shape[1])).contiguous(memory_format=torch.channels_last)


_PLAIN = {"max_pool": _max_pool, "avg_pool": _avg_pool, "relu": _relu, "pad": _pad}
