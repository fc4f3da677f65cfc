"""The ops as functions, in the argument order of ``torch.nn.functional``.

All take and return real floating tensors; activations are (N, C, H, W), contiguous or channels_last for speed, any strides
for correctness. Wrong arguments raise ``fastres.ArgumentError`` (a ValueError) or ``ArgumentTypeError`` (a TypeError)
before any memory is touched. ``fastres.explain(op, *args)`` tells which backend a call gets and why.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import must, must_type
from fastres.ops import _fold
from fastres.ops.add_act import ADD_ACT
from fastres.ops.bn_act import BN_ACT, BN_ACT_TRAIN
from fastres.ops.bn_act_maxpool import BN_ACT_MAXPOOL, BN_ACT_MAXPOOL_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT, BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT, BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_bn_act import CONV_BN_ACT
from fastres.ops.conv_bn_add_act import CONV_BN_ADD_ACT

Size = int | tuple[int, int]


def add_act(x: Tensor, residual: Tensor, act: str = "relu") -> Tensor:
    """Add a residual and activate: ``relu(x + residual)`` (He et al. 2016, equation 1).

    Args:
        x, residual: one shape, any rank; dtypes promote as in PyTorch.
        act: ``"relu"`` or ``"none"``.
    """
    return ADD_ACT(x, residual, act)


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
    if not training:
        _needs_statistics("bn_act", running_mean, running_var)
        return BN_ACT(x, weight, bias, running_mean, running_var, eps, act)
    _check_running("bn_act", x, running_mean, running_var)
    y, mean, var = BN_ACT_TRAIN(x, weight, bias, eps, act)
    update_running(x, running_mean, running_var, mean, var, momentum)
    return y


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
    if not training:
        _needs_statistics("bn_add_act", running_mean, running_var)
        return BN_ADD_ACT(x, residual, weight, bias, running_mean, running_var, eps, act)
    _check_running("bn_add_act", x, running_mean, running_var)
    y, mean, var = BN_ADD_ACT_TRAIN(x, residual, weight, bias, eps, act)
    update_running(x, running_mean, running_var, mean, var, momentum)
    return y


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

    The normalised residual is never written. Buffers of both as in ``bn_act``; one ``training`` holds for both.
    """
    op, r_mean, r_var = "bn_add_bn_act", residual_running_mean, residual_running_var
    norm, r_norm = (weight, bias), (residual_weight, residual_bias)
    if not training:
        _needs_statistics(op, running_mean, running_var)
        _needs_statistics(op, r_mean, r_var, "residual_")
        shortcut = *r_norm, r_mean, r_var, residual_eps
        return BN_ADD_BN_ACT(x, residual, *norm, running_mean, running_var, eps, *shortcut, act)
    _check_running(op, x, running_mean, running_var)
    _check_running(op, residual, r_mean, r_var, "residual_")
    y, mean, var, mean_of_residual, var_of_residual = BN_ADD_BN_ACT_TRAIN(
        x, residual, *norm, eps, *r_norm, residual_eps, act
    )
    update_running(x, running_mean, running_var, mean, var, momentum)
    update_running(residual, r_mean, r_var, mean_of_residual, var_of_residual, residual_momentum)
    return y


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
    window = _pair(kernel_size), _pair(stride), _pair(padding)
    if not training:
        _needs_statistics("bn_act_maxpool", running_mean, running_var)
        return BN_ACT_MAXPOOL(x, weight, bias, running_mean, running_var, eps, act, *window)
    _check_running("bn_act_maxpool", x, running_mean, running_var)
    y, mean, var = BN_ACT_MAXPOOL_TRAIN(x, weight, bias, eps, act, *window)
    update_running(x, running_mean, running_var, mean, var, momentum)
    return y


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
        (_pair(stride), _pair(padding), _pair(dilation), groups), act,
    )  # fmt: skip


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
        (_pair(stride), _pair(padding), _pair(dilation), groups), act,
    )  # fmt: skip


def _conv(x, residual, conv_weight, conv_bias, mean, var, weight, bias, training, momentum, eps, geometry, act):
    op = "conv_bn_act" if residual is None else "conv_bn_add_act"
    if not isinstance(x, Tensor):
        raise must_type(op, "x", "a torch.Tensor", x)
    if not isinstance(conv_weight, Tensor):
        raise must_type(op, "conv_weight", "a torch.Tensor", conv_weight)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != conv_weight.dtype:
        raise must(op, "x", f"of conv_weight's dtype {conv_weight.dtype}", x.dtype, "convert it, or use autocast")
    if not training:
        _needs_statistics(op, mean, var)
        if not (torch.is_grad_enabled() and _requires_grad(x, residual, conv_weight, conv_bias, weight, bias)):
            tail = (conv_weight, conv_bias, weight, bias, mean, var, eps, *geometry, act)
            return CONV_BN_ACT(x, *tail) if residual is None else CONV_BN_ADD_ACT(x, residual, *tail)
    z = F.conv2d(x, conv_weight, conv_bias, *geometry)
    if residual is None:
        return bn_act(z, mean, var, weight, bias, training, momentum, eps, act)
    return bn_add_act(z, residual, mean, var, weight, bias, training, momentum, eps, act)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def update_running(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance unbiased; an empty batch changes nothing."""
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if running_mean is None or running_var is None or values == 0:
        return
    with torch.no_grad():
        if isinstance(momentum, Tensor):
            running_mean.mul_(1 - momentum).add_(mean * momentum)
            running_var.mul_(1 - momentum).add_(var * (momentum * (values / (values - 1))))
        else:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(var, alpha=momentum * (values / (values - 1)))


def forget_folds(weights: Iterable[Tensor] | None = None) -> None:
    """Drop the folded copies of these convolution weights, or all, as needed after a write through ``tensor.data``."""
    _fold.forget(weights)


def _check_running(op: str, x: Tensor, mean: Any, var: Any, prefix: str = "") -> None:
    """Refuse running buffers that could only be half updated."""
    names = f"{prefix}running_mean and {prefix}running_var"
    if (mean is None) != (var is None):
        raise must(op, names, "both tensors or both None", f"{type(mean)} and {type(var)}")
    if mean is not None and not mean.shape == var.shape == x.shape[1:2]:
        raise must(op, names, f"of shape ({x.shape[1]},)", f"{tuple(mean.shape)} and {tuple(var.shape)}")


def _needs_statistics(op: str, mean: Tensor | None, var: Tensor | None, prefix: str = "") -> None:
    if mean is None or var is None:
        name = f"{prefix}running_mean" if mean is None else f"{prefix}running_var"
        raise must(
            op, name, "a tensor when training is False", None, "pass training=True to use the batch's statistics"
        )


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value
