"""The ops as functions, in the argument order of ``torch.nn.functional``.

All take and return real floating-point tensors. Activations have shape (N, C, H, W) and any strides; contiguous and
channels_last ones are fast. Wrong arguments raise ``fastres.ArgumentError`` (a ValueError) or ``ArgumentTypeError`` (a
TypeError) before any memory is touched. ``fastres.explain(op, *args)`` tells which backend a call gets and why.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import ArgumentError, ArgumentTypeError, must, must_type, renamed
from fastres.ops._running import check_momentum, check_running, is_training, needs_statistics, update_running
from fastres.ops.add_act import ADD_ACT
from fastres.ops.bn_act import BN_ACT, BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL, BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT, BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT, BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv import CONV
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_act_maxpool import CONV_BN_ACT_MAXPOOL
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT
from fastres.ops.conv_bn_add_conv_bn_act import CONV_BN_ADD_CONV_BN_ACT

Size = int | tuple[int, int]
P = ParamSpec("P")

_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_CONVOLUTION = {"weight": "conv_weight", "bias": "conv_bias", "bn_weight": "weight", "bn_bias": "bias", **_STATISTICS}
_SHORTCUT = {f"shortcut_{name}": f"shortcut_{known}" for name, known in _CONVOLUTION.items()}


def _names(**of_op: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Let errors of an op's checks name the function's own parameters; ``of_op`` maps the op's names to them."""

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            try:
                return function(*args, **kwargs)
            except (ArgumentError, ArgumentTypeError) as error:
                raise renamed(error, function.__name__, of_op) from None

        return call

    return decorate


def add_act(x: Tensor, residual: Tensor, act: str = "relu") -> Tensor:
    """Add a residual and activate: ``relu(x + residual)`` (He et al. 2016, equation 1).

    Args:
        x, residual: one shape, any rank; dtypes promote as in PyTorch.
        act: ``"relu"`` or ``"none"``.
    """
    return ADD_ACT(x, residual, act)


@_names(**_STATISTICS)
def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """Normalise and activate: ``relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))``.

    In training the running buffers, where given, are updated in place as ``F.batch_norm`` does (with the unbiased
    variance). ``momentum`` may be a tensor of one element, for a cumulative average without a synchronisation.
    """
    if not is_training("bn_act", training, momentum):
        needs_statistics("bn_act", running_mean, running_var)
        return BN_ACT(x, weight, bias, running_mean, running_var, eps, act)
    check_running("bn_act", x, running_mean, running_var)

    def update(y: Tensor, mean: Tensor, var: Tensor) -> None:
        update_running(x, running_mean, running_var, mean, var, momentum)

    return BN_ACT_TRAIN.by(None, x, weight, bias, eps, act, then=update)[0]


@_names(**_STATISTICS)
def bn_add_act(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """Normalise, add a residual and activate: ``relu(F.batch_norm(x, ...) + residual)``; buffers as in ``bn_act``."""
    if not is_training("bn_add_act", training, momentum):
        needs_statistics("bn_add_act", running_mean, running_var)
        return BN_ADD_ACT(x, residual, weight, bias, running_mean, running_var, eps, act)
    check_running("bn_add_act", x, running_mean, running_var)

    def update(y: Tensor, mean: Tensor, var: Tensor, mask: Tensor) -> None:
        update_running(x, running_mean, running_var, mean, var, momentum)

    return BN_ADD_ACT_TRAIN.by(None, x, residual, weight, bias, eps, act, then=update)[0]


@_names(**_STATISTICS, residual_mean="residual_running_mean", residual_var="residual_running_var")
def bn_add_bn_act(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_running_mean: Tensor | None = None,
    residual_running_var: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual_momentum: float | Tensor = 0.1,
    residual_eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """The end of a block with a projection: ``relu(F.batch_norm(x, ...) + F.batch_norm(residual, residual_...))``.

    The normalised residual is never written to memory. Both sets of buffers as in ``bn_act``; ``training`` holds for both.
    """
    op, r_mean, r_var = "bn_add_bn_act", residual_running_mean, residual_running_var
    norm, r_norm = (weight, bias), (residual_weight, residual_bias)
    check_momentum(op, residual_momentum, "residual_")
    if not is_training(op, training, momentum):
        needs_statistics(op, running_mean, running_var)
        needs_statistics(op, r_mean, r_var, "residual_")
        shortcut = *r_norm, r_mean, r_var, residual_eps
        return BN_ADD_BN_ACT(x, residual, *norm, running_mean, running_var, eps, *shortcut, act)
    check_running(op, x, running_mean, running_var)
    check_running(op, residual, r_mean, r_var, "residual_")

    def update(y: Tensor, mean: Tensor, var: Tensor, r_batch_mean: Tensor, r_batch_var: Tensor, mask: Tensor) -> None:
        update_running(x, running_mean, running_var, mean, var, momentum)
        update_running(residual, r_mean, r_var, r_batch_mean, r_batch_var, residual_momentum)

    return BN_ADD_BN_ACT_TRAIN.by(None, x, residual, *norm, eps, *r_norm, residual_eps, act, then=update)[0]


@_names(**_STATISTICS)
def bn_act_maxpool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: Size = 1,
) -> Tensor:
    """The stem's tail: ``F.max_pool2d(relu(F.batch_norm(x, ...)), kernel_size, stride, padding)``; buffers as in ``bn_act``."""
    window = pair(kernel_size), pair(stride), pair(padding)
    if not is_training("bn_act_maxpool", training, momentum):
        needs_statistics("bn_act_maxpool", running_mean, running_var)
        return BN_ACT_MAXPOOL(x, weight, bias, running_mean, running_var, eps, act, *window)
    check_running("bn_act_maxpool", x, running_mean, running_var)

    def update(y: Tensor, mean: Tensor, var: Tensor) -> None:
        update_running(x, running_mean, running_var, mean, var, momentum)

    return BN_ACT_MAXPOOL_TRAIN.by(None, x, weight, bias, eps, act, *window, then=update)[0]


@_names()
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve as a training step does: ``F.conv2d(x, weight, bias, stride, padding, dilation, groups)``.

    On the CPU, 3x3 kernels with stride 1 in float32 and bfloat16 use Winograd's F(2x2, 3x3), forward and for both gradients,
    where that is faster. On CUDA, the stem of a network in float16 or bfloat16, channels_last, has kernels of its own, forward
    and for the weight gradient. ``fastres.explain(fastres.functional.conv2d, x, weight, ...)`` says where, and why not.
    """
    return CONV(x, weight, bias, pair(stride), pair(padding), pair(dilation), groups)


@_names(**_CONVOLUTION)
def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """Convolve, normalise, activate: ``relu(F.batch_norm(F.conv2d(x, conv_weight, conv_bias, ...), ...))``.

    In evaluation without autograd one op runs, with batch norm folded into a cached copy of the weights; otherwise the
    convolution is PyTorch's and ``bn_act`` follows. ``conv_weight`` is (K, C / groups, R, S), padding in pixels.
    """
    return _conv(
        x, None, conv_weight, conv_bias, running_mean, running_var, weight, bias, training, momentum, eps,
        (pair(stride), pair(padding), pair(dilation), groups), act,
    )  # fmt: skip


@_names(**_CONVOLUTION)
def conv_bn_add_act(
    x: Tensor,
    residual: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """The end of a residual block: ``relu(F.batch_norm(F.conv2d(x, ...), ...) + residual)``; otherwise as ``conv_bn_act``."""
    if residual is None:
        raise must_type("conv_bn_add_act", "residual", "a torch.Tensor", residual)
    return _conv(
        x, residual, conv_weight, conv_bias, running_mean, running_var, weight, bias, training, momentum, eps,
        (pair(stride), pair(padding), pair(dilation), groups), act,
    )  # fmt: skip


@_names(**_CONVOLUTION, **_SHORTCUT)
def conv_bn_add_conv_bn_act(
    x: Tensor,
    shortcut: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut_conv_weight: Tensor,
    shortcut_conv_bias: Tensor | None,
    shortcut_running_mean: Tensor,
    shortcut_running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    eps: float = 1e-5,
    shortcut_eps: float = 1e-5,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    shortcut_stride: Size = 1,
    act: str = "relu",
) -> Tensor:
    """The end of a block with a projection, in evaluation: ``relu(F.batch_norm(F.conv2d(x, conv_weight, ...), ...) + s)``,
    ``s = F.batch_norm(F.conv2d(shortcut, shortcut_conv_weight, shortcut_conv_bias, shortcut_stride), shortcut_...)``.

    Where a kernel is chosen, it runs one product over the channels of both and never writes s; otherwise, and where gradients
    are needed, ``conv_bn_act`` and ``conv_bn_add_act`` run. ``shortcut_conv_weight`` is (K, C2, 1, 1). In training, use two
    convolutions and ``bn_add_bn_act``.
    """
    op = CONV_BN_ADD_CONV_BN_ACT
    x = _matched(op.name, x, conv_weight)
    shortcut = _matched(op.name, shortcut, shortcut_conv_weight, "shortcut", "shortcut_weight")
    statistics, own_statistics = (running_mean, running_var), (shortcut_running_mean, shortcut_running_var)
    geometry, own_stride = (pair(stride), pair(padding), pair(dilation), groups), pair(shortcut_stride)
    main = conv_weight, conv_bias, weight, bias, *statistics, eps, *geometry
    own = shortcut_conv_weight, shortcut_conv_bias, shortcut_weight, shortcut_bias, *own_statistics, shortcut_eps
    args = x, shortcut, *main, *own, own_stride, act
    apart = torch.compiler.is_compiling() or op.falls_back(*args)
    if not (apart or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args))):
        return op(*args)
    norm, own_norm = (*statistics, weight, bias), (*own_statistics, shortcut_weight, shortcut_bias)
    residual = conv_bn_act(shortcut, *own[:2], *own_norm, eps=shortcut_eps, stride=own_stride, act="none")
    return conv_bn_add_act(x, residual, *main[:2], *norm, False, 0.0, eps, *geometry, act)


@_names(**_CONVOLUTION)
def conv_bn_act_maxpool(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    act: str = "relu",
    kernel_size: Size = 3,
    pool_stride: Size = 2,
    pool_padding: Size = 1,
) -> Tensor:
    """The stem of a network, in evaluation: ``F.max_pool2d(conv_bn_act(...), kernel_size, pool_stride, pool_padding)``.

    Where a kernel is chosen, it never writes what it pools; otherwise, and where gradients are needed, two ops run.
    """
    op = CONV_BN_ACT_MAXPOOL
    x = _matched(op.name, x, conv_weight)
    geometry, window = (stride, padding, dilation), (kernel_size, pool_stride, pool_padding)
    args = (x, conv_weight, conv_bias, weight, bias, running_mean, running_var, eps, *map(pair, geometry), groups, act,
            *map(pair, window))  # fmt: skip
    apart = torch.compiler.is_compiling() or op.falls_back(*args)
    if apart or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)):
        assert op.fallback is not None
        return op.fallback(*args)
    return op(*args)


def _matched(op: str, x: Tensor, weight: Tensor, name: str = "x", of: str = "weight") -> Tensor:
    """x in the dtype in which its convolution computes: autocast's, or its weight's."""
    for parameter, tensor in ((name, x), (of, weight)):
        if not isinstance(tensor, Tensor):
            raise must_type(op, parameter, "a torch.Tensor", tensor)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        if x.is_floating_point() and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != weight.dtype:
        known = of.replace("weight", "conv_weight")
        raise must(op, name, f"of {known}'s dtype {weight.dtype}", x.dtype, "convert it, or use autocast")
    return x


def _conv(
    x: Tensor, residual: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool,
    momentum: float | Tensor, eps: float, geometry: tuple[Any, ...], act: str,
) -> Tensor:  # fmt: skip
    op = CONV_BN_ACT if residual is None else CONV_BN_ADD_ACT
    x = _matched(op.name, x, conv_weight)
    activations = (x,) if residual is None else (x, residual)
    args = (*activations, conv_weight, conv_bias, weight, bias, mean, var, eps, *geometry, act)
    if not is_training(op.name, training, momentum):
        needs_statistics(op.name, mean, var)
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return op(*args)
    elsewhere = any(isinstance(tensor, Tensor) and tensor.device != x.device for tensor in (conv_weight, conv_bias))
    if elsewhere or isinstance(geometry[1], str):
        op.check(*args)  # PyTorch's convolution would compute something from a meta tensor, and take "same"
    try:
        z = F.conv2d(x, conv_weight, conv_bias, *geometry)
    except Exception:
        op.check(*args)  # says what is wrong in this function's words, if it is an argument
        raise
    if residual is None:
        return bn_act(z, mean, var, weight, bias, training, momentum, eps, act)
    return bn_add_act(z, residual, mean, var, weight, bias, training, momentum, eps, act)


def pair(value: Any) -> Any:
    """A pair, where one whole number was given; the ops check the rest."""
    return (value, value) if type(value) is int else tuple(value) if isinstance(value, list) else value
