"""Triton pool_int8: the largest or the mean of each window of int8 images, NHWC."""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import aligned, memory_format, pooled
from fastres.kernels.triton.device import index_type, launch
from fastres.kernels.triton.int8 import fused, held, within

WORD = 4  # channels, whose bytes are compared and added where they lie
ZEROS = tl.constexpr(-0x7F7F7F80)  # four bytes of 0, each held as -128
TILE = 1024  # words of a program of 256 threads, 16 bytes a thread
NUM_WARPS = 8
MOST_WORDS = 32  # of a pixel in a tile: whole lines of memory, and what windows share from the first-level cache
MOST_TAPS = 9  # read at once


@triton.jit
def _with_tap(found, word, SHIFT: tl.constexpr, MEAN: tl.constexpr):
    """One of a word's bytes taken into what was found so far. The largest is found with the byte on top of 32 bits, where what
    lies below it only decides between equals: no byte is unpacked."""
    top = word << SHIFT
    if MEAN:
        return found + ((top >> 24) + 128)
    return tl.maximum(found, top)


@triton.jit
def _placed(found, count, scale, bias, SHIFT: tl.constexpr, MEAN: tl.constexpr, INTERPRETED: tl.constexpr):
    """A byte of the result at its place in the word."""
    if MEAN:
        mean = tl.div_rn(found.to(tl.float32), count)
        result = held(fused(mean, scale, bias, INTERPRETED))
    else:
        result = found >> 24
    return (result & 0xFF) << (24 - SHIFT)


@triton.jit
def _pool_int8_kernel(
    x_ptr, y_ptr, scale, bias, pixels, words, height, width, out_height, out_width, stride_h, stride_w, padding_h, padding_w,
    KH: tl.constexpr, KW: tl.constexpr, MEAN: tl.constexpr, UNROLL: tl.constexpr, INTERPRETED: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # y = the largest of the window, or saturate(round(mean * scale + bias)), of bytes that are held less 128
    # x, y NHWC in words of four channels; a program owns BLOCK_E output pixels x BLOCK_C words
    # one byte of x a tap, what windows share mostly from the caches, and one of y per output, 16 a thread
    # bytes are compared as they are held; sums int32, exact; a true division, an fma rounded once, then to even and saturated
    # taps beyond the image read bytes of 0, which are no larger than any and add nothing; every window touches its image
    tiles = tl.cdiv(words, BLOCK_C)
    pixel = (tl.program_id(0) // tiles).to(INDEX) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    image = pixel // (out_height * out_width)
    top = pixel // out_width % out_height * stride_h - padding_h
    left = pixel % out_width * stride_w - padding_w
    valid = (pixel < pixels)[:, None] & (c < words)[None, :]
    first = tl.full([BLOCK_E, BLOCK_C], 0 if MEAN else -2147483648, tl.int32)
    found0, found1, found2, found3 = first, first, first, first
    for tap in tl.range(0, KH * KW, loop_unroll_factor=UNROLL):
        row, column = top + tap // KW, left + tap % KW
        place, inside = (image * height + row) * width + column, within(row, column, height, width)
        word = tl.load(x_ptr + place[:, None] * words + c[None, :], mask=valid & inside[:, None], other=ZEROS)
        found0, found1 = _with_tap(found0, word, 24, MEAN), _with_tap(found1, word, 16, MEAN)
        found2, found3 = _with_tap(found2, word, 8, MEAN), _with_tap(found3, word, 0, MEAN)
    rows = tl.minimum(top + KH, height) - tl.maximum(top, 0)
    columns = tl.minimum(left + KW, width) - tl.maximum(left, 0)
    count = (rows * columns).to(tl.float32)[:, None]
    y = _placed(found0, count, scale, bias, 24, MEAN, INTERPRETED) | _placed(found1, count, scale, bias, 16, MEAN, INTERPRETED)
    y |= _placed(found2, count, scale, bias, 8, MEAN, INTERPRETED) | _placed(found3, count, scale, bias, 0, MEAN, INTERPRETED)
    tl.store(y_ptr + pixel[:, None] * words + c[None, :], y, mask=valid)


def pool_int8(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil: bool, scale: float | None, bias: float | None
) -> Tensor:
    """The op, of images that ``why_not`` lets pass."""
    x = aligned(x)
    images, channels, height, width = x.shape
    window, size = pooled((height, width), kernel, stride, padding, ceil)
    y = torch.empty((images, *size, channels), dtype=torch.int8, device=x.device)
    pixels, words = images * size[0] * size[1], channels // WORD
    block_c = min(triton.next_power_of_2(words), MOST_WORDS)
    block_e = TILE // block_c
    launch(
        _pool_int8_kernel, (triton.cdiv(pixels, block_e) * triton.cdiv(words, block_c),), x,
        *(t.flatten(0, 2).view(torch.int32) for t in (x.permute(0, 2, 3, 1), y)),
        *(0.0 if t is None else ctypes.c_float(t).value for t in (scale, bias)), pixels, words, height, width, *size,
        *stride, *padding, KH=window[0], KW=window[1], MEAN=scale is not None, UNROLL=min(window[0] * window[1], MOST_TAPS),
        INTERPRETED=triton_interpret(), INDEX=index_type(max(x.numel(), y.numel())),
        BLOCK_E=block_e, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))  # of a single pixel, which lies alike in both
