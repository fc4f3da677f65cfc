"""Layers as calls of ops, each with the ways in which PyTorch alone does the same.

A backend folds batch norm into a convolution's weights and packs the result once (``ops/_fold.py``). Here the weights are
already folded, so the op gets them together with a batch norm that changes nothing.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.frozen.layers import Layer
from fastres.frozen.plain import PLAIN, max_pool
from fastres.frozen.program import output_size
from fastres.frozen.record import Value
from fastres.ops import _fold
from fastres.ops._op import Op
from fastres.ops.add_act import ADD_ACT
from fastres.ops.bn_act import BN_ACT
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL
from fastres.ops.bn_add_act import BN_ADD_ACT
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT

EPS = 2.0**-10  # of batch norms whose variance is 1 - EPS, exactly
TORCH = "torch"
TORCH_AND_BN = "torch + bn_act"  # a convolution, then bias, addition and ReLU in one pass
Run = Callable[..., Tensor]
Constants = tuple[Any, ...]


@dataclass(eq=False)
class Call:
    """What a layer computes: ``op(*inputs, *rest)``, or, without an op, a PyTorch function. A call may do the work of several
    layers; ``layer`` then names it."""

    layer: Layer
    op: Op | None
    inputs: tuple[Value, ...]
    rest: tuple[Any, ...]
    plain: dict[str, Run]  # PyTorch's ways, with the same arguments
    layers: tuple[Layer, ...] = ()  # whose work it does, in their order
    outputs: tuple[Value, ...] = ()  # what it gives: a tensor, or a tuple of them

    def __post_init__(self) -> None:
        self.layers, self.outputs = self.layers or (self.layer,), self.outputs or (self.layer.y,)


def constants(layers: Iterable[Layer]) -> dict[Layer, Constants]:
    """The parameters of each layer, in float32, and the batch norm that changes nothing."""
    found: dict[Layer, Constants] = {}
    for layer in layers:
        if layer.weight is None:
            continue
        if layer.weight.is_inference():  # folds cannot notice changes of such tensors
            layer.weight, layer.bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        if layer.bias is None:
            mean, scale, shift = layer.weight
            found[layer] = (scale, shift, mean, torch.full_like(mean, 1 - EPS))
        else:
            found[layer] = (layer.weight, layer.bias, None, None, *identity_norm(len(layer.weight), layer.weight.device))
            _fold.keep(found[layer], EPS)
    return found


def identity_norm(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and variance of a batch norm that changes nothing."""
    return torch.zeros(channels, device=device), torch.full((channels,), 1 - EPS, device=device)


def call(layer: Layer, own: Constants, channels: int, device: torch.device) -> Call:
    """The call of one layer; ``channels`` are those of its input."""
    act = "relu" if layer.relu else "none"
    inputs = tuple(layer.operands)
    if layer.kind == "conv":
        rest = (*own, EPS, layer.stride, layer.padding, layer.dilation, layer.groups, act)
        op = CONV_BN_ACT if layer.residual is None else CONV_BN_ADD_ACT
        return Call(layer, op, inputs, rest, {TORCH: _with(layer, _conv), TORCH_AND_BN: _with(layer, _conv_then_bn)})
    if layer.kind == "bn":
        return Call(layer, BN_ACT, inputs, (*own, EPS, act), {TORCH: BN_ACT.reference})
    if layer.kind == "add":
        return Call(layer, ADD_ACT, inputs, (act,), {TORCH: ADD_ACT.reference})
    if layer.kind == "max_pool" and not layer.ceil:
        window = (layer.kernel, layer.stride, layer.padding)
        rest = (None, None, *identity_norm(channels, device), EPS, act, *window)
        return Call(layer, BN_ACT_MAXPOOL, inputs, rest, {TORCH: functools.partial(max_pool, layer)})
    if layer.kind == "upsample":
        return Call(layer, None, inputs, (act,), {TORCH: functools.partial(_upsample, layer)})
    if layer.kind == "gate":
        return Call(layer, None, inputs, (act,), {TORCH: _with(layer, _gate)})
    if layer.kind == "linear":
        return Call(layer, None, inputs, (*own, act), {TORCH: _with(layer, _linear)})
    return Call(layer, None, inputs, (), {TORCH: functools.partial(PLAIN[layer.kind], layer)})


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


def _upsample(layer: Layer, x: Tensor, *rest: Any) -> Tensor:
    """Beside x comes what says how large the result is, if anything does: the residual, or another value."""
    *beside, act = rest
    size = beside[0].shape[2:] if beside else output_size(layer, (x.shape[2], x.shape[3]))
    return _finished(F.interpolate(x, size), None if layer.residual is None else beside[0], act)


def _gate(x: Tensor, residual: Tensor | None, gate: Tensor, act: str) -> Tensor:
    return _finished(x * gate if residual is None else torch.addcmul(residual, x, gate), None, act)
