"""The mask of a ReLU at the end of a block: one bit an element, written by the ops' training beside y, read by backward.

Bit i % 8 of byte i // 8 is element i of y in memory order. It is set where the gradient passes, that is where
not (y <= 0): a NaN passes it, as in torch. Bits beyond the last element are 0. Without a ReLU the mask is empty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import must
from fastres.kernels.layout import memory_format
from fastres.ops import _check


def pack(y: Tensor, act: str) -> Tensor:
    """The mask of y, an output of ``act``."""
    if act != "relu":
        return y.new_empty(0, dtype=torch.uint8)
    in_order = (y.permute(0, 2, 3, 1) if memory_format(y) is torch.channels_last else y).reshape(-1)
    passes = (in_order <= 0).logical_not_().to(torch.uint8)
    bits = F.pad(passes, (0, -passes.numel() % 8)).view(-1, 8)
    return (bits << _positions(y)).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """Where the gradient passes: booleans of x's shape."""
    passes = (mask[:, None] >> _positions(mask) & 1).flatten()[: x.numel()].bool()
    if memory_format(x) is torch.channels_last:
        images, channels, height, width = x.shape
        return passes.view(images, height, width, channels).permute(0, 3, 1, 2)
    return passes.view(x.shape)


def _positions(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def gradient(grad_y: Tensor, mask: Tensor, x: Tensor, act: str) -> Tensor:
    """The gradient behind the activation, differentiable with respect to grad_y."""
    return torch.where(unpack(mask, x), grad_y, 0) if act == "relu" else grad_y


def needed(y: Tensor, act: str) -> Tensor | None:
    """What evaluation saves of y: nothing without a ReLU, so that a later activation may write into it."""
    return y if act == "relu" else None


def gradient_at(grad_y: Tensor, y: Tensor | None) -> Tensor:
    """The same, from what evaluation saves: ops of evaluation write no mask."""
    return grad_y if y is None else torch.ops.aten.threshold_backward(grad_y, y, 0)


def size(x: Tensor, act: str) -> int:
    return (x.numel() + 7) // 8 if act == "relu" else 0


def fake(x: Tensor, act: str) -> Tensor:
    return x.new_empty(size(x, act), dtype=torch.uint8)


def check(op: str, mask: Tensor, x: Tensor, act: str) -> None:
    _check.strided(op, "mask", mask)
    expected = (size(x, act),)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise must(op, "mask", f"of dtype torch.uint8 and shape {expected}", f"{mask.dtype} and {tuple(mask.shape)}")
    if mask.device != x.device:
        raise must(op, "mask", f"on the device of x ({x.device})", mask.device, "move one of them")


def why_not(mask: Tensor) -> str | None:
    """What every kernel requires of the mask."""
    return None if mask.is_contiguous() else f"the mask must be contiguous, got stride {mask.stride(0)}"
