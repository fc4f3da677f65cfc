"""Plans of 8-bit integers: how values are scaled, and the constants that each step's kernel reads (csrc/cpu/plan_int8.cpp).

An activation is unsigned, ``real = (stored - zero) * scale``, with one scale a tensor and zero 0 after a ReLU. A weight is
signed, with a scale for each output channel. Sums are exact; scales, biases and residuals are applied in float32.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.errors import UnsupportedError
from fastres.frozen.layers import Layer
from fastres.frozen.record import Value
from fastres.ops import _conv_cpu
from fastres.ops._int8 import LEVELS

MOST_TERMS = 65536  # of 255 * 127 each, whose sum fits an int32: kInt8MostTerms of csrc/cpu/plan_int8.cpp
_BLOCK, _LANES = 64, 16
_SIZES = tuple(i / 40 for i in range(24, 41))  # shares of a channel's range that are tried for its weights


class Scale(NamedTuple):
    """Of one activation: ``real = (stored - zero) * scale``."""

    scale: float
    zero: int


REAL = Scale(1.0, 0)  # of an output in float32


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and the scale of each output channel, of those tried the one with the least square error."""
    rows = weight.double().flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best, error = largest / 127, torch.full_like(largest, torch.inf)
    for size in _SIZES:
        scale = size * largest / 127
        found = ((rows / scale).round().clamp(-127, 127) * scale - rows).square().sum(1, keepdim=True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    stored = (rows / best).round().clamp(-127, 127).to(torch.int8)
    return stored.view(weight.shape), best.flatten().float()


def with_int8_weights(layers: list[Layer]) -> None:
    """Replace the weights of convolutions and linear layers.

    Raises:
        UnsupportedError: a sum is too long for 32 bits.
    """
    for layer in layers:
        if layer.weight is None or layer.bias is None:
            continue
        terms = _conv_cpu.whole_words(layer.weight.shape[1], torch.int8) * layer.weight[0, 0].numel()
        if terms > MOST_TERMS:
            raise UnsupportedError(f"fastres.freeze: {layer.name} adds {terms} products; int8 allows at most {MOST_TERMS}")
        layer.weight, layer.scale = quantized_weight(layer.weight)


def packed(layer: Layer, scales: Mapping[Value, Scale]) -> tuple[Tensor, ...]:
    """Weights, if the step has any, and its float constants."""
    x, y = scales[layer.x], scales.get(layer.y, REAL)
    ratio, bias = x.scale / y.scale, y.zero
    if layer.kind in ("conv", "linear"):
        return _packed_conv(layer, scales)
    if layer.kind == "bn":
        assert layer.weight is not None
        mean, scale, shift = layer.weight.double()
        offset = ((-x.scale * x.zero - mean) * scale + shift) / y.scale + bias
        return (torch.cat([ratio * scale, offset]).float(),)
    if layer.kind in ("add", "relu"):
        other = REAL if layer.residual is None else scales[layer.residual]
        part = other.scale / y.scale
        return (_constants([ratio, part, bias - ratio * x.zero - part * other.zero]),)
    assert layer.kind == "avg_pool"
    return (_constants([ratio, bias - ratio * x.zero]),)


def _constants(values: list[float]) -> Tensor:
    """As the kernels read them, whatever default dtype and device PyTorch has."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def input_constants(scale: Scale) -> tuple[Tensor, ...]:
    """Of the copy that quantises the images."""
    return (_constants([1.0 / scale.scale, float(scale.zero)]),)


def zero_constants(scale: Scale) -> tuple[Tensor, ...]:
    """Of another copy: what its padding holds."""
    return (_constants([float(scale.zero)]),)


def conv_constants(layer: Layer, scales: Mapping[Value, Scale]) -> tuple[Tensor, Tensor, float]:
    """Of sums of bytes times weights: a scale and a bias for each output channel, in float64, and the residual's scale."""
    weight, scale, bias = layer.weight, layer.scale, layer.bias
    assert weight is not None and scale is not None and bias is not None
    x, y = scales[layer.x], scales.get(layer.y, REAL)
    total = scale.double() * x.scale / y.scale
    offset = bias.double() / y.scale + y.zero - total * x.zero * weight.flatten(1).double().sum(1)
    part = 0.0
    if layer.residual is not None:
        other = scales[layer.residual]
        part = other.scale / y.scale
        offset -= part * other.zero
    _check_range(layer, total, offset, part)
    return total, offset, part


def _packed_conv(layer: Layer, scales: Mapping[Value, Scale]) -> tuple[Tensor, ...]:
    assert layer.weight is not None
    weight, (total, offset, part) = layer.weight, conv_constants(layer, scales)
    order = _order(len(weight), layer.y in scales)
    constants = torch.cat([total[order], offset[order], offset.new_tensor([part])]).float()
    return _conv_cpu.pack(weight[order]), constants


def _check_range(layer: Layer, total: Tensor, offset: Tensor, part: float) -> None:
    """Refuse what could leave the range of a 32-bit integer before it is saturated."""
    assert layer.weight is not None
    most = total * LEVELS * layer.weight.flatten(1).double().abs().sum(1) + offset.abs() + part * LEVELS
    if not bool((most < 2.0**31).all()):
        raise UnsupportedError(f"fastres.freeze: the outputs of {layer.name} in calibration are too small for its weights")


def _order(channels: int, packs: bool) -> Tensor:
    """Of the output channels: as they are, or, where the kernel packs bytes, whole blocks of 64 as it packs them."""
    order = torch.arange(channels, device="cpu")
    whole = channels // _BLOCK * _BLOCK if packs else 0
    order[:whole] = order[:whole].view(-1, 4, 4, _LANES // 4).transpose(1, 2).reshape(whole)
    return order
