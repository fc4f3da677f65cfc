"""Arithmetic of 8-bit integers as the CPU's plans do it, to the bit: a multiplication and an addition rounded once in float32,
and one rounding to a byte, to even, saturated. An activation is kept as an int8, its byte less 128, for tensor cores that take
signed operands alone.
"""

import torch
from torch import Tensor

SHIFT = 128  # of a byte to the int8 that holds it
LEVELS = 255  # the largest byte


def fused(x: Tensor, scale: Tensor | float, bias: Tensor) -> Tensor:
    """x * scale + bias, rounded once to the dtype of the bias: the product of two float32 is exact in float64."""
    scale = scale.double() if isinstance(scale, Tensor) else scale
    return (x.double() * scale + bias.double()).to(bias.dtype)


def stored(value: Tensor) -> Tensor:
    """The int8 that holds a value in steps of its scale."""
    return value.clamp(0, LEVELS).round().sub(SHIFT).to(torch.int8)


def byte(x: Tensor) -> Tensor:
    """What an int8 holds, in float32."""
    return x.float() + SHIFT
