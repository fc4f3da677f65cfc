"""What the kernels of 8-bit integers share: the arithmetic of ``ops/_int8.py`` on the device."""

import triton
import triton.language as tl


@triton.jit
def fused(x, scale, bias, INTERPRETED: tl.constexpr):
    """x * scale + bias rounded once; the interpreter's own fma rounds twice."""
    if INTERPRETED:
        return (x.to(tl.float64) * scale + bias).to(tl.float32)
    return tl.fma(x, scale, bias)


@triton.jit
def byte(value):
    """The byte of a value, in 32 bits: saturated, NaN to 0, then rounded to even by an addition that leaves no bits for a
    fraction."""
    held = tl.minimum(tl.maximum(value, 0.0), 255.0) + 8388608.0
    return held.to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def stored(value):
    """The int8 that holds a value."""
    return (byte(value) - 128).to(tl.int8)
