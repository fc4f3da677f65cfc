"""Consecutive blocks, between which the two gradients of a value are kept apart."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastres.nn import _fused, _sequence
from fastres.nn._plain import ORIGINAL, is_batch_norm, why_not
from fastres.nn.blocks import BasicBlock, Bottleneck
from fastres.nn.shortcut import ZeroPadShortcut
from fastres.ops._op import is_interposed

Parts = tuple[Sequence[_fused.Layer], nn.Module | None]  # the layers of a block, and its shortcut where it is not the identity
# Where it pays: a GPU moves a tenth less around batch norm. A CPU's steps take as long either way (ResNet-50, batch 8: 0.96 to
# 1.00 of the time in fp32 and bf16, AMD EPYC, 2 threads, 2026-11-27), with one more gradient alive.
DEVICES = {"cuda"}
# The method with which a class that optimize put on top of a block's own says what the block is made of; None for no block.
PARTS = "_fastres_parts"


# The forward of each block, unless somebody replaces it on the class.
_FORWARD = {kind: kind.forward for kind in (BasicBlock, Bottleneck)}


class Stage(nn.Sequential):
    """An ``nn.Sequential`` of blocks, with the same values, keys and gradients; see ``run``."""

    def forward(self, x: Tensor) -> Tensor:
        return run(self, x)


def run_all(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Consecutive stages, run as one where nobody expects their calls."""
    training = _is_plain_training(x)
    blocks: list[nn.Module] = []
    for stage in stages:
        if training and _is_plain(stage):
            blocks += cast(Stage, stage)
        else:
            blocks.append(stage)
    return run(blocks, x)


def _is_plain(stage: nn.Module) -> bool:
    """Whether it is a ``Stage``, perhaps with the class that optimize put on top, and nobody expects its call."""
    kind = type(stage)
    return vars(kind).get(ORIGINAL, kind) is Stage and not _sequence.must_be_called(stage)


def run(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The blocks, one after the other.

    The output of a block is read twice by the next one, by its first convolution and by its shortcut, and autograd adds the
    two gradients in a pass of its own. Where nobody else can see that output (plain blocks without hooks, in training, nothing
    following the call) it exists as two tensors that share memory, and the backward of the block's end reads both gradients
    instead of their sum. Blocks that recompute values tell the next one how they made their output. Everywhere else the blocks
    are called one by one.
    """
    blocks = list(blocks)
    plain = _is_plain_training(x)
    divides = plain and x.device.type in DEVICES
    opened = plain and (divides or any(_fused.RECOMPUTES in block.__dict__ for block in blocks))
    parts = [_open(block) if opened else None for block in blocks]
    value = _sequence.Value(x, x)
    for block, own, following in zip(blocks, parts, [*parts[1:], None], strict=True):
        splits = divides and own is not None and following is not None and _hides_input(following) and _ends_in_training(own)
        if own is not None and (splits or value.shortcut is not value.x or _sequence.recomputes(block, own[0])):
            value = _sequence.block_in_two(block, own[0], value, own[1], splits)
        else:
            y = block(value.x)
            value = _sequence.Value(y, y)
    return value.x


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
    """What a block is made of, if its own code is what its call would run."""
    if _sequence.must_be_called(block):
        return None
    if type(block).forward is _FORWARD.get(type(block)):
        return block._layers(), block.downsample
    return vars(type(block))[PARTS](block) if PARTS in vars(type(block)) else None


def _hides_input(parts: Parts) -> bool:
    """Whether only ops read a block's input: the first convolution is plain, and the shortcut is the identity, zero padding or
    a plain projection."""
    layers, downsample = parts
    if not _is_plain_convolution(layers[0][0]):
        return False
    if downsample is None or type(downsample) is ZeroPadShortcut:
        return downsample is None or not _sequence.must_be_called(downsample)
    steps = _sequence.projection(downsample)
    return (
        steps is not None
        and len(steps) == 2
        and not _sequence.must_be_called(downsample)
        and _is_plain_convolution(steps[0])
    )


def _is_plain_convolution(module: Any) -> bool:
    return type(module) is nn.Conv2d and why_not(module) is None


def _ends_in_training(parts: Parts) -> bool:
    _, norm, _ = parts[0][-1]
    return is_batch_norm(norm) and norm.training
