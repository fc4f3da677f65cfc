"""What the kernels of 8-bit integers share: the arithmetic of ``ops/_int8.py`` on the device, and an image's edges."""

import triton
import triton.language as tl


@triton.jit
def fused(x, scale, bias, INTERPRETED: tl.constexpr):
    """x * scale + bias rounded once; the interpreter's own fma rounds twice."""
    if INTERPRETED:
        return (x.to(tl.float64) * scale + bias).to(tl.float32)
    return tl.fma(x, scale, bias)


@triton.jit
def within(row, column, height, width):
    """Whether pixels lie in their image."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def held(value):
    """The int8 that holds a value, in the lowest of 32 bits, others above them: saturated, then rounded to even by an addition
    that leaves no bits for a fraction: of 2^23, and of 128, which turns the byte's highest bit as its loss would."""
    return (tl.minimum(tl.maximum(value, 0.0), 255.0) + 8388736.0).to(tl.int32, bitcast=True)


@triton.jit
def stored(value):
    """The int8 that holds a value."""
    return held(value).to(tl.int8)
