"""Triton quantize_int8: float32 images of at most four channels to words of four bytes, NHWC."""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton.device import launch
from fastres.kernels.triton.int8 import fused, held, within

BLOCK = 1024  # pixels of a program of 256 threads: 16 bytes of each channel a thread, 16 of y
NUM_WARPS = 8


@triton.jit
def _quantize_int8_kernel(
    x_ptr, y_ptr, strange_ptr, scale, zero, pixels, tiles, height, width, out_width, padding_h, padding_w,
    stride_image, stride_channel, stride_pixel,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # y = saturate(round(x * scale + zero)) less 128, four channels a word; strange = NaN where a value is not finite, else 0
    # x of any strides by pixel and channel, y NHWC; a program owns BLOCK pixels of one image, of its padding too
    # four bytes of each channel and four of y per pixel, 16 a thread; of x where its pixels are adjacent and have no padding
    # float32, an fma rounded once, then to even and saturated; NaN to 0
    # channels beyond CHANNELS hold a byte of 0; the image's base is int64, offsets within it int32, as ``why_not`` asks
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside, place = pixel < pixels, pixel
    if PADDED:
        row, column = pixel // out_width - padding_h, pixel % out_width - padding_w
        inside, place = within(row, column, height, width), row * width + column
    word = tl.zeros([BLOCK], tl.int32)
    strange = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(4):
        if c < CHANNELS:
            x = tl.load(x_ptr + image * stride_image + c * stride_channel + place * stride_pixel, mask=inside, other=0.0)
            strange += x - x
            part = held(tl.where(x == x, fused(x, scale, zero, INTERPRETED), 0.0)) & 0xFF
        else:
            part = tl.full([BLOCK], 128, tl.int32)
        word |= part << (8 * c)
    tl.store(y_ptr + image * pixels + pixel, word, mask=pixel < pixels)
    tl.store(strange_ptr + tl.program_id(0), tl.sum(strange, 0))


def quantize_int8(x: Tensor, scale: float, zero: int, channels: int, padding: list[int]) -> tuple[Tensor, Tensor]:
    """The op, of images that ``why_not`` lets pass."""
    x = x.resolve_neg()
    images, given, height, width = x.shape
    last = memory_format(x) is torch.channels_last
    size = [s + 2 * p for s, p in zip((height, width), padding, strict=True)]
    pixels = size[0] * size[1]
    tiles = triton.cdiv(pixels, BLOCK)
    words = torch.empty((images, *size, 1), dtype=torch.int32, device=x.device)
    strange = torch.empty((images, tiles), dtype=torch.float32, device=x.device)
    launch(
        _quantize_int8_kernel, (images * tiles,), x,
        x, words, strange, ctypes.c_float(scale).value, float(zero), pixels, tiles, height, width, size[1], *padding,
        given * height * width, 1 if last else height * width, given if last else 1,
        CHANNELS=given, PADDED=any(padding), INTERPRETED=triton_interpret(), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return words.view(torch.int8).permute(0, 3, 1, 2), strange.sum(1)
