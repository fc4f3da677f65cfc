"""What kernels are held against beside PyTorch: the ops whose work they do, as they are chosen, and cuDNN's marks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CHAIN, JOINED, SEVERAL
from benchmarks.cases import STEM as POOLED_STEM
from fastres.frozen import calls
from fastres.ops import REGISTRY, _fold
from fastres.ops import conv_bn_act_conv_bn_add_act as chain
from fastres.ops import conv_bn_act_conv_bn_add_act_conv_bn_act as long_chain
from fastres.ops import conv_bn_add_conv_bn_act as projection
from fastres.ops._op import Op


def apart(op: Op, args: tuple[Any, ...]) -> dict[str, Callable]:
    """What an op that does the work of several is held against: those as they are chosen; of several convolutions cuDNN's fused
    calls too; a projected shortcut has no ReLU and so no fused call, but PyTorch's convolution and batch norm."""
    assert op.fallback is not None
    found: dict[str, Callable] = {"apart": op.fallback}
    if op.name == POOLED_STEM:  # and in evaluation with batch norm folded into the convolution, as frozen networks may
        found["conv_bn_act, then pool"] = convolved_then_pooled(args)
        return found
    if op.name not in SEVERAL:
        return found
    adding = next(b for b in REGISTRY["conv_bn_add_act"].backends if b.name == "cudnn")

    def by_cudnn(last: Callable) -> Callable:
        if op.name == JOINED:
            return functools.partial(projection.composed, REGISTRY["conv_bn_act"].reference, last)
        both = functools.partial(chain.composed, cudnn_relu, last)
        return both if op.name == CHAIN else functools.partial(long_chain.composed, both, cudnn_relu)

    if args[0].is_cuda and adding.why_not(args[0], args[1], *args[2:13], "relu") is None:
        found["cudnn"] = by_cudnn(adding.load())
    return found


def convolved_then_pooled(args: tuple[Any, ...]) -> Callable:
    """A stem as frozen networks run it in two: batch norm in the convolution, the pool behind a norm that changes nothing."""
    first, last = REGISTRY["conv_bn_act"], REGISTRY["bn_act_maxpool"]
    nothing = calls.identity_norm(len(args[5]), args[5].device)
    return lambda x, *rest: last(first(x, *rest[:-3]), None, None, *nothing, calls.EPS, "none", *rest[-3:])


def cudnn_relu(x: Tensor, *rest: Any) -> Tensor:
    """cuDNN's fused convolution without residual, as a mark to be held against: fastres has no use for it, since it turns NaN
    into 0."""

    def finish(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.to(x.dtype, memory_format=torch.channels_last), bias.to(x.dtype)

    weight, bias = _fold.folded(rest[:6], rest[6], ("cudnn_relu", x.dtype), finish)
    return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *rest[7:11])


def cudnn_alone(op: Op, args: tuple[Any, ...]) -> dict[str, Callable]:
    """cuDNN's mark beside the backends of an op of one convolution."""
    fits = op.name == "conv_bn_act" and args[0].is_cuda and args[-1] == "relu" and args[0].shape[1] % 8 == 0
    return {"cudnn": cudnn_relu} if fits else {}
