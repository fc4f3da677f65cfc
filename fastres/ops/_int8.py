"""Arithmetic of 8-bit integers as the CPU's plans do it, to the bit: a multiplication and an addition rounded once in float32,
and one rounding to a byte, to even, saturated. An activation is kept as an int8, its byte less 128, for tensor cores that take
signed operands alone.
"""

import ctypes

import torch
from torch import Tensor

SHIFT = 128  # of a byte to the int8 that holds it
LEVELS = 255  # the largest byte


def fused(x: Tensor, scale: Tensor | float, bias: Tensor) -> Tensor:
    """x * scale + bias, rounded once to the dtype of the bias: the product of two float32 is exact in float64.

    By a number, taken as float32 holds it, it takes one pass on a GPU, which converts as it reads and writes.
    """
    if isinstance(scale, Tensor):
        return (x.double() * scale.double() + bias.double()).to(bias.dtype)
    wide = bias.double() if bias.dim() else bias.double().view(1)  # without a dimension it would not decide the arithmetic
    return torch.add(wide, x, alpha=ctypes.c_float(scale).value, out=torch.empty(0, dtype=bias.dtype, device=x.device))


def stored(value: Tensor) -> Tensor:
    """The int8 that holds a value in steps of its scale."""
    return value.clamp(0, LEVELS).round_().to(torch.uint8).bitwise_xor_(SHIFT).view(torch.int8)


def byte(x: Tensor) -> Tensor:
    """What an int8 holds, in float32."""
    return x.float() + SHIFT
