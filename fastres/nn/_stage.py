"""Blocks in a row, between which the two gradients of a value are kept apart: scheme b+ of fused training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn import _fused, _sequence
from fastres.nn.blocks import BasicBlock, Bottleneck
from fastres.ops._op import is_interposed

Parts = tuple[Sequence[_fused.Layer], nn.Module | None]  # the layers of a block, and its shortcut where it is not the identity
# The method by which a class that optimize put on top says what its block is made of, None where it is none.
PARTS = "_fastres_parts"


class Stage(nn.Sequential):
    """An ``nn.Sequential`` of blocks, with the same values, keys and gradients; see ``run``."""

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x)


def run(stage: nn.Sequential, x: Tensor) -> Tensor:
    """The blocks in a row.

    The output of a block is read twice by the next one, by its first convolution and by its shortcut, and autograd adds the
    two gradients in a pass of its own. Where nobody else can get hold of that output (plain blocks without hooks, in
    training, nothing following the call) it exists as two tensors of one memory, and the backward of the block's end reads
    both gradients instead of their sum. Everywhere else the blocks are called one by one.
    """
    blocks = list(stage)
    parts = [_open(block) for block in blocks] if _is_plain_training(x) else [None] * len(blocks)
    shortcut = x
    for block, own, following in zip(blocks, parts, [*parts[1:], None], strict=True):
        if own is not None and following is not None and following[1] is None and _ends_in_training(own):
            x, shortcut = _sequence.block_in_two(own[0], x, shortcut, own[1])
        elif own is not None and shortcut is not x:
            x = shortcut = _fused.layers(own[0], x, shortcut)
        else:
            x = shortcut = block(x)
    return x


def _is_plain_training(x: Any) -> bool:
    """Whether gradients flow, and nothing but autograd follows the call."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not is_interposed()
        and not _fused.is_followed(x)
    )


def _open(block: Any) -> Parts | None:
    """What a block is made of, if nobody but its own code waits for its call or sees its input."""
    if _sequence.must_be_called(block):
        return None
    parts: Parts | None = None
    if type(block) in (BasicBlock, Bottleneck):
        parts = block._layers(), block.downsample
    elif PARTS in vars(type(block)):
        parts = vars(type(block))[PARTS](block)
    if parts is None:
        return None
    first = parts[0][0][0]
    return parts if type(first) is nn.Conv2d and _fused.why_not(first) is None else None


def _ends_in_training(parts: Parts) -> bool:
    _, norm, _ = parts[0][-1]
    return type(norm) is nn.BatchNorm2d and norm.training
