"""Triton bn_add_act: y = act(batch_norm(x) + residual), the tail of a block; bn_act's kernels with a residual."""

from torch import Tensor

from fastres.kernels.triton import bn_act, relu_mask


def bn_add_act(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    act: str,
) -> Tensor:  # fmt: skip
    return bn_act.apply(x, residual, weight, bias, mean, var, eps, act)


def bn_add_act_train(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = bn_act.statistics(x)
    mask = relu_mask.empty(x, act)
    wanted = mask if act == "relu" else None
    return bn_act.apply(x, residual, weight, bias, mean, var, eps, act, mask=wanted), mean, var, mask


def bn_add_act_backward(
    grad_y: Tensor, grad_y2: Tensor | None, mask: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = mask, x, weight, None, mean, var, eps, act, True
    grad_x, dz, grad_weight, grad_bias = bn_act.backward(grad_y, grad_y2, *args)
    assert dz is not None  # as a mask was given
    dtype = mean.dtype if weight is None else weight.dtype
    return grad_x, dz, grad_weight.to(dtype), grad_bias.to(dtype)
