"""The mask of a ReLU at the end of a block, one bit an element: bit i % 8 of byte i // 8 is element i in memory order.

A kernel that writes y writes it too where the tile's innermost dimension is made of whole bytes; elsewhere it is made from
y. Reading needs no such tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.triton.device import index_type, launch

BLOCK = 512  # bytes a program makes from y


@triton.jit
def _bytes(passes, AXIS: tl.constexpr):
    """Eight booleans along an axis as a byte."""
    position = tl.arange(0, 8)
    position = position[None, None, :] if AXIS == 2 else position[None, :, None]
    return tl.sum(passes.to(tl.int32) << position, axis=AXIS).to(tl.uint8)


@triton.jit
def store_packed(
    mask_ptr, y, tile, elements, channels, plane,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The bits of a tile of y, rounded: channels (channels_last) or H*W are a multiple of eight."""
    passes = (y <= 0) == 0  # a NaN passes
    if CHANNELS_LAST:
        byte = _bytes(tl.reshape(passes, [BLOCK_E, BLOCK_C // 8, 8]), 2)
        element = (tile * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
        group = (tl.program_id(0).to(INDEX) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8))[None, :]
        offset = element * (channels // 8) + group
        valid = (element < elements) & (group < channels // 8)
    else:
        byte = _bytes(tl.reshape(passes, [BLOCK_E // 8, 8, BLOCK_C]), 1)
        group = (tile * (BLOCK_E // 8) + tl.arange(0, BLOCK_E // 8))[:, None]
        channel = (tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        row = plane // 8
        offset = (group // row * channels + channel) * row + group % row
        valid = (group < elements // 8) & (channel < channels)
    tl.store(mask_ptr + offset, byte, mask=valid)


@triton.jit
def masked(grad, mask_ptr, offset, valid, ACT: tl.constexpr):
    """The gradient behind the activation, of the elements at ``offset``."""
    if ACT == "relu":
        bits = tl.load(mask_ptr + offset // 8, mask=valid, other=0).to(tl.int32)
        grad = tl.where((bits >> (offset % 8).to(tl.int32) & 1) != 0, grad, 0.0)
    return grad


@triton.jit
def relu_mask_kernel(y_ptr, mask_ptr, numel, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    # bit i % 8 of byte i // 8 = not (y[i] <= 0)
    # a program makes BLOCK bytes; y in memory order
    # one read of the element size per element
    # exact
    # bits beyond the last element are 0
    byte = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    y = tl.load(y_ptr + element, mask=element < numel, other=0.0)
    bits = tl.sum(((y <= 0) == 0).to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(mask_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < numel)


def empty(x: Tensor, act: str) -> Tensor:
    return torch.empty((x.numel() + 7) // 8 if act == "relu" else 0, dtype=torch.uint8, device=x.device)


def packs(channels: int, plane: int, options: dict) -> bool:
    """Whether a kernel that writes y by such tiles can write the mask too."""
    if options["CHANNELS_LAST"]:
        return channels % 8 == 0 and options["BLOCK_C"] % 8 == 0
    return plane % 8 == 0 and options["BLOCK_E"] % 8 == 0


def make(y: Tensor, mask: Tensor) -> None:
    """Fill the mask from y."""
    index = index_type(y.numel())
    launch(relu_mask_kernel, (triton.cdiv(mask.numel(), BLOCK),), y, y, mask, y.numel(), index, BLOCK)
