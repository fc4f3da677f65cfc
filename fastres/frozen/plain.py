"""The layers without weights as PyTorch's own operations, of a layer and its input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.frozen.layers import Layer


def max_pool(layer: Layer, x: Tensor, *_: Any) -> Tensor:
    return F.max_pool2d(x, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil)


def avg_pool(layer: Layer, x: Tensor) -> Tensor:
    if layer.kernel == (0, 0):
        return x.mean((2, 3), keepdim=True)
    return F.avg_pool2d(x, layer.kernel, layer.stride, layer.padding, layer.ceil, False, layer.divisor or None)


def relu(layer: Layer, x: Tensor) -> Tensor:
    return F.relu(x) if layer.relu else x  # the last step of an int8 network only brings integers back to float32


def pad(layer: Layer, x: Tensor, value: float = 0.0) -> Tensor:
    x = x[:, :, :: layer.stride[0], :: layer.stride[1]]
    wider = F.pad(x, (0, 0, 0, 0, 0, layer.out_channels - x.shape[1]), value=value)
    return wider.contiguous(memory_format=torch.channels_last)


def activation(layer: Layer, x: Tensor) -> Tensor:
    if layer.function == "leaky_relu":
        return F.leaky_relu(x, layer.low)
    if layer.function == "clamp":
        return F.hardtanh(x, layer.low, layer.high)
    return ACTIVATIONS[layer.function](x)


def cat(layer: Layer, *xs: Tensor) -> Tensor:
    return torch.cat(xs, 1)


def turn(layer: Layer, x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous(memory_format=torch.channels_last)


def channels(layer: Layer, x: Tensor) -> Tensor:
    return x[:, layer.begin : layer.begin + layer.out_channels].contiguous(memory_format=torch.channels_last)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "silu": F.silu, "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish,
}  # fmt: skip
PLAIN: dict[str, Callable[..., Tensor]] = {
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "relu": relu,
    "pad": pad,
    "activation": activation,
    "cat": cat,
    "slice": channels,
    "turn": turn,
}
