"""Triton quantize_int8: float32 images of at most four channels to words of four bytes, NHWC."""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.env import triton_interpret
from fastres.kernels.layout import memory_format
from fastres.kernels.triton.device import launch
from fastres.kernels.triton.int8 import byte, fused

WORD = 4  # channels of a pixel as the kernel writes it, and at most of what it reads
MOST_PIXELS = 2**28  # of an image
BLOCK = 1024  # pixels of a program of 256 threads: 16 bytes of each channel a thread, 16 of y
NUM_WARPS = 8


@triton.jit
def _quantize_int8_kernel(
    x_ptr, y_ptr, strange_ptr, scale, zero, pixels, tiles, stride_image, stride_channel, stride_pixel,
    CHANNELS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # y = saturate(round(x * scale + zero)) less 128, four channels a word; strange = NaN where a value is not finite, else 0
    # x of any strides by pixel and channel, y NHWC; a program owns BLOCK pixels of one image
    # four bytes of each channel and four of y per pixel, 16 a thread where the pixels of a channel are adjacent
    # float32, an fma rounded once, then to even and saturated; NaN to 0
    # channels beyond CHANNELS hold a byte of 0; the image's base is int64, offsets within it int32 (``MOST_PIXELS``)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    word = tl.zeros([BLOCK], tl.int32)
    strange = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHANNELS):
        x = tl.load(x_ptr + image * stride_image + c * stride_channel + pixel * stride_pixel, mask=inside, other=0.0)
        strange += x - x
        word |= byte(fused(x, scale, zero, INTERPRETED)) << (8 * c)
    tl.store(y_ptr + image * pixels + pixel, word ^ -0x7F7F7F80, mask=inside)
    tl.store(strange_ptr + tl.program_id(0), tl.sum(strange, 0))


def quantize_int8(x: Tensor, scale: float, zero: int, channels: int) -> tuple[Tensor, Tensor]:
    """The op, of images that ``why_not`` lets pass."""
    x = x.resolve_neg()
    images, given, height, width = x.shape
    pixels, last = height * width, memory_format(x) is torch.channels_last
    tiles = triton.cdiv(pixels, BLOCK)
    words = torch.empty((images, height, width, 1), dtype=torch.int32, device=x.device)
    strange = torch.empty((images, tiles), dtype=torch.float32, device=x.device)
    launch(
        _quantize_int8_kernel, (images * tiles,), x,
        x, words, strange, ctypes.c_float(scale).value, float(zero), pixels, tiles,
        given * pixels, 1 if last else pixels, given if last else 1,
        CHANNELS=given, INTERPRETED=triton_interpret(), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return words.view(torch.int8).permute(0, 3, 1, 2), strange.sum(1)
