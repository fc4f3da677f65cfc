"""Runs of plain modules as fused steps: the tail of a stem, and what an ``nn.Sequential`` holds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres.nn import _fused, _training
from fastres.nn._plain import has_hooks, kind_of, original_class, trains, why_not
from fastres.nn.shortcut import ZeroPadShortcut
from fastres.ops._known_stats import Known
from fastres.ops._recompute import Producer


def conv_bn_act_maxpool(conv: Any, bn: Any, act: Any, pool: Any, x: Tensor) -> Tensor:
    """``pool(act(bn(conv(x))))``: batch norm is fused with the pool where gradients flow, and on GPUs, where PyTorch pools
    slowly (837 µs for 256x64x112x112 in bfloat16 on an H200, 2026-11-27); else with the convolution.
    """
    if trains(bn) or torch.is_grad_enabled() or x.is_cuda:
        return _fused.bn_act_maxpool(bn, act, pool, *_fused.convolve_before(bn, act, conv, x, pool))
    return pool(_fused.conv_bn_act(conv, bn, act, x))


class Value(NamedTuple):
    """What goes from block to block: x for the convolutions and for the shortcut, one tensor or two that share memory; and how
    it was made, None where it is kept anyway."""

    x: Tensor
    shortcut: Tensor
    made: Producer | None = None


def recomputes(block: nn.Module, layers: Sequence[_fused.Layer]) -> bool:
    """Whether backward is to recompute what the layers pass on: it was asked for, and all batch norms are in training."""
    if _fused.RECOMPUTES not in block.__dict__ or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return all(trains(bn) for _, bn, _ in layers)


def block(owner: nn.Module, layers: Sequence[_fused.Layer], x: Tensor, downsample: Any) -> Tensor:
    """The layers of a block, and its shortcut added before the last act; downsample may be None."""
    if recomputes(owner, layers):
        return block_in_two(owner, layers, Value(x, x), downsample, False).x
    both = at_once(layers, Value(x, x), downsample, False)
    if both is not None:
        return both.x
    if type(downsample) is ZeroPadShortcut:
        return _fused.layers(layers, x, downsample(x))
    return conv_bn_add_act(*layers[-1], _fused.layers(layers[:-1], x), downsample, x)


def plain_block(owner: nn.Module, layers: Sequence[_fused.Layer], x: Tensor) -> Tensor:
    """The layers of a block without shortcut."""
    if recomputes(owner, layers):
        _, bn, act = layers[-1]
        return _fused.bn_act(bn, act, _up_to_norm(layers, Value(x, x), True)[0])
    return _fused.layers(layers, x)


def block_in_two(
    owner: nn.Module, layers: Sequence[_fused.Layer], value: Value, downsample: Any, split_output: bool
) -> Value:
    """``block`` in training, between blocks that hold a value as two tensors that share memory, one for their convolutions and
    one for their shortcut: each gets its part of the gradient, and no pass is spent on adding them.

    The output is one tensor twice without ``split_output``, and where it cannot be two; the input may be either. Blocks that
    recompute values keep every other output: the ones between are recomputed from those and from the convolutions' outputs.
    """
    again = recomputes(owner, layers)
    both = None if again else at_once(layers, value, downsample, split_output)
    if both is not None:
        return both
    made = value.made if again else None
    shortcut, (_, bn, act) = value.shortcut, layers[-1]
    steps, shortcut_bn = projection(downsample), None
    added_as_it_is = downsample is None or type(downsample) is ZeroPadShortcut
    if added_as_it_is:
        shortcut = shortcut if downsample is None else downsample(shortcut)
        y = None if again or downsample is None else _fused.in_one_node(layers, value.x, shortcut)
        if y is not None:
            return _twice(y)
    z, known = _up_to_norm(layers, value, again)
    own: Known = None
    if not added_as_it_is:
        if steps is None or must_be_called(downsample):
            shortcut = run(downsample, shortcut)
        else:
            *before, shortcut_conv, shortcut_bn = steps
            for step in before:
                shortcut = step(shortcut)
            if again:
                shortcut = _fused.convolve(shortcut_conv, shortcut, None if before else made)
            else:
                shortcut, own = _fused.convolve_before(shortcut_bn, None, shortcut_conv, shortcut)
    both_known = (known,) if shortcut_bn is None else (known, own)
    found = None
    if split_output or again:
        found = _training.in_training(bn, act, z, shortcut, shortcut_bn, split_output, both_known)
    if found is not None:
        is_kept = made is None and downsample is None and shortcut.dtype == z.dtype  # by the first convolution
        of_what_is_kept = shortcut_bn is not None or is_kept
        return Value(*found) if again and of_what_is_kept else Value(*found[:2])
    if shortcut_bn is None:
        return _twice(_fused.bn_act(bn, act, z, shortcut, known))
    return _twice(_fused.bn_add_bn_act(bn, shortcut_bn, act, z, shortcut, (known, own)))


def at_once(layers: Sequence[_fused.Layer], value: Value, downsample: Any, split_output: bool) -> Value | None:
    """The block as one node of autograd, where its shortcut is the identity or a plain projection; else None."""
    if type(downsample) is ZeroPadShortcut or not getattr(layers[0][1], "training", False):
        return None
    steps = projection(downsample)
    if downsample is not None and (steps is None or len(steps) != 2 or must_be_called(downsample)):
        return None
    if len({bn for _, bn, _ in layers} | set(steps or ())) < len(layers) + len(steps or ()):
        return None
    y = _fused.in_one_node(layers, value.x, value.shortcut, steps or (), split_output)
    if y is None:
        return None
    return Value(*y) if split_output else _twice(y)


def _twice(y: Tensor) -> Value:
    return Value(y, y)


def _up_to_norm(layers: Sequence[_fused.Layer], value: Value, again: bool) -> tuple[Tensor, Known]:
    """The layers up to the last batch norm, and the statistics of its input if they are known. ``again``: what the layers pass
    on is recomputed, not kept, and no statistics are asked for, since a batch norm is then recomputed with its own."""
    *first, (conv, bn, act) = layers
    x, _, made = value
    if not again:
        return _fused.convolve_before(bn, act, conv, _fused.layers(first, x))
    for layer in first:
        x, made = bn_act_made(*layer[1:], _fused.convolve(layer[0], x, made))
    return _fused.convolve(conv, x, made), None


def bn_act_made(bn: Any, act: Any, x: Tensor) -> tuple[Tensor, Producer | None]:
    """``act(bn(x))`` and how it was made, None where the modules must be called."""
    found = _training.in_training(bn, act, x)
    return (_fused.bn_act(bn, act, x), None) if found is None else (found[0], found[2])


def conv_bn_add_act(conv: Any, bn: Any, act: Any, x: Tensor, downsample: Any, shortcut: Tensor) -> Tensor:
    """The end of a block, ``act(bn(conv(x)) + downsample(shortcut))``; downsample may be None.

    Where downsample ends with a convolution and its batch norm: with gradients both norms and the addition are one op; without,
    both convolutions are one product if ``dispatch`` chooses a kernel for that, else each norm is folded into its convolution.
    A tracer sees one order of calls, with gradients or without: torch.jit.trace compares both.
    """
    with_gradients = trains(bn) or torch.is_grad_enabled() or _fused.is_followed(x)
    steps = projection(downsample) if with_gradients or _fused.may_join(x) else None
    if steps is None or must_be_called(downsample):
        return _fused.conv_bn_act(conv, bn, act, x, shortcut if downsample is None else run(downsample, shortcut))
    *first, shortcut_conv, shortcut_bn = steps
    if with_gradients:
        for step in first:
            shortcut = step(shortcut)
        x, known = _fused.convolve_before(bn, act, conv, x)
        shortcut, own = _fused.convolve_before(shortcut_bn, None, shortcut_conv, shortcut)
        return _fused.bn_add_bn_act(bn, shortcut_bn, act, x, shortcut, (known, own))
    if not first:
        y = _fused.conv_bn_add_conv_bn_act(conv, bn, act, x, shortcut_conv, shortcut_bn, shortcut)
        if y is not None:
            return y
    return _fused.conv_bn_act(conv, bn, act, x, run(downsample, shortcut))


def projection(module: Any) -> list[Any] | None:
    """The layers of a shortcut that ends with a convolution and its batch norm, in an ``nn.Sequential``; else None."""
    if module is None or original_class(module) is not nn.Sequential:
        return None
    steps = list(module)
    return steps if [kind_of(step) for step in steps[-2:]] == [nn.Conv2d, nn.BatchNorm2d] else None


def run(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; in a plain ``nn.Sequential`` conv-bn, conv-bn-relu and conv-bn-relu-maxpool fused."""
    if type(module) is not nn.Sequential or must_be_called(module):
        return module(x)
    steps: list[Any] = list(module)
    while steps:
        kinds = [kind_of(step) for step in steps[:4]]
        if kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
            conv, bn, act, pool, *steps = steps
            x = conv_bn_act_maxpool(conv, bn, act, pool, x)
        elif kinds[:3] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
            conv, bn, act, *steps = steps
            x = _fused.conv_bn_act(conv, bn, act, x)
        elif kinds[:2] == [nn.Conv2d, nn.BatchNorm2d]:
            conv, bn, *steps = steps
            x = _fused.conv_bn_act(conv, bn, None, x)
        else:
            step, *steps = steps
            x = step(x)
    return x


def must_be_called(module: nn.Module) -> bool:
    """Whether a hook, of the module or of all modules, or a patched forward expects the call."""
    return why_not() is not None or has_hooks(module) or "forward" in module.__dict__
