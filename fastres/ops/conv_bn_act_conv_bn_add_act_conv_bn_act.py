"""conv_bn_act_conv_bn_add_act_conv_bn_act: y as ``conv_bn_act_conv_bn_add_act`` gives it, the end of a bottleneck block, and
z = act(batch_norm(conv2d(y))), the first convolution of the block after it (He et al. 2016, figure 5), in evaluation.

All arguments of that op, then next_weight (K3, K2, 1, 1), of stride 1 without padding, its batch norm and next_act as in
``conv_bn_act``. A kernel makes z from what it holds of y, which is written once and not read again. Accumulates in fp32, rounds
each output once. No backward: nothing but a frozen network calls it. Bytes moved: as that op's, next_weight and z.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres.errors import ArgumentError, ArgumentTypeError, must, renamed
from fastres.ops import _check, _conv
from fastres.ops import conv_bn_act_conv_bn_add_act as chain
from fastres.ops._op import Backend, Op, Sample
from fastres.ops.conv_bn_act import CONV_BN_ACT

SCHEMA = chain.SCHEMA.replace(
    ") -> Tensor",
    ", Tensor next_weight, Tensor? next_bias, Tensor? next_bn_weight, Tensor? next_bn_bias, Tensor next_mean, Tensor next_var,"
    " float next_eps, str next_act) -> (Tensor, Tensor)",
)
NAME = "conv_bn_act_conv_bn_add_act_conv_bn_act"
_CHAIN = 22  # arguments of ``conv_bn_act_conv_bn_add_act``
_NAMES = {"x": "x", "x and weight": "next_weight"}
_NAMES |= {name: f"next_{name}" for name in ("weight", "bias", "bn_weight", "bn_bias", "mean", "var", "eps", "act")}


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the first two convolutions take, and what the next takes after y."""
    *following, act = args[_CHAIN:]
    return args[:_CHAIN], (*following, *chain.AT_ONE, act)


def composed(first: Callable[..., Tensor], last: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """Two functions, with the arguments of ``conv_bn_act_conv_bn_add_act`` and of ``conv_bn_act``, one after the other."""
    of_chain, of_next = _split(args)
    y = first(*of_chain)
    return y, last(y, *of_next)


def reference(*args):
    return composed(chain.reference, CONV_BN_ACT.reference, *args)


def check(*args):
    of_chain, of_next = _split(args)
    try:
        chain.check(*of_chain)
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, NAME, {}) from None
    x, residual, next_weight = of_chain[0], of_chain[1], of_next[0]
    y = x.new_empty(1).expand(residual.shape)
    try:
        _conv.check(NAME, y, None, *of_next)
        _check.tensors(NAME, x=y, mean=of_next[4], var=of_next[5])
    except (ArgumentError, ArgumentTypeError) as error:
        raise renamed(error, NAME, _NAMES) from None
    if tuple(next_weight.shape[2:]) != (1, 1):
        raise must(NAME, "next_weight", "of a kernel of 1x1", tuple(next_weight.shape))


def fake(*args):
    of_chain, of_next = _split(args)
    y = chain.fake(*of_chain)
    return y, _conv.fake(y, of_next[0], *chain.AT_ONE[:3])


def samples(device, dtype):
    """Those of ``conv_bn_act_conv_bn_add_act``, each with a convolution to as many channels as it began with."""
    generator = torch.Generator().manual_seed(1)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for sample in chain.CONV_BN_ACT_CONV_BN_ADD_ACT.samples(device, dtype):
        x, residual, act = sample.args[0], sample.args[1], sample.args[-1]
        k, c = x.shape[1], residual.shape[1]
        norm = torch.randn(4, k, generator=generator, dtype=torch.float64)
        norm[3] = norm[3].square() + 0.5
        weight = torch.randn(k, c, 1, 1, generator=generator, dtype=torch.float64) / c**0.5
        weight, *others = (t.to(device, parameters) for t in (weight, *norm))
        found.append(Sample(sample.label, (*sample.args, weight, None, *others, 1e-5, act)))
    return found


def cost(*args):
    of_chain, (next_weight, *_) = _split(args)
    x, residual = of_chain[:2]
    moved, flops = chain.cost(*of_chain)
    pixels, values = residual.numel() // max(residual.shape[1], 1), next_weight.numel()
    return moved + (values + pixels * len(next_weight)) * x.element_size(), flops + 2 * pixels * values


def fallback(*args):
    return composed(chain.CONV_BN_ACT_CONV_BN_ADD_ACT.fallback, CONV_BN_ACT, *args)


def why_not_cuda(*args) -> str | None:
    of_chain, (next_weight, *_) = _split(args)
    reason = chain.why_not_cuda(*of_chain)
    if reason is None and len(next_weight) != of_chain[0].shape[1]:
        reason = f"its last convolution has as many channels out as x, {of_chain[0].shape[1]}, got {len(next_weight)}"
    return reason


def run_cuda(*args):
    of_chain, of_next = _split(args)
    return chain.run_cuda(*of_chain, following=(of_next[:6], of_next[6], of_next[-1]))


CONV_BN_ACT_CONV_BN_ADD_ACT_CONV_BN_ACT = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("cuda", why_not_cuda, lambda: run_cuda)],
    fallback=fallback,
)
