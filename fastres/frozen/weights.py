"""The arithmetic of a plan's constants: batch norm, and what else scales and shifts channels, as rows of float32."""

import torch
from torch import Tensor


def own(parameter: Tensor) -> Tensor:
    """A copy in float32: the model may change later, and two layers may share one."""
    return parameter.detach().to(torch.float32, copy=True)


def batch_norm(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Mean, scale and shift of a batch norm (3, C): ``(x - mean) * scale + shift``."""
    scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
    return torch.stack([mean.float(), scale.float(), torch.zeros_like(scale.float()) if bias is None else bias.float()])


def of_channels(value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A constant as one float64 value for each channel of images (N, C, H, W); None where it differs among pixels or images."""
    if value is None or len(shape) != 4 or value.dim() > 4:
        return None
    by_channels = value.dim() > 2 and value.shape[-3] == shape[1]
    if value.numel() != (shape[1] if by_channels else 1):
        return None
    return value.double().flatten().expand(shape[1])


def scale_and_shift(scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * scale + shift``, of which one may be missing, as the rows of a batch norm in float64."""
    given = [each for each in (scale, shift) if each is not None]
    zeros = torch.zeros_like(given[0])
    return torch.stack([zeros, zeros + 1 if scale is None else scale, zeros if shift is None else shift])


def with_rows(weight: Tensor | None, bias: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution, or the rows of a batch norm, with ``* scale + shift`` behind it."""
    assert weight is not None
    _, scale, shift = rows
    if bias is not None:
        return (weight * scale.view(-1, 1, 1, 1)).float(), (bias * scale + shift).float()
    mean, own_scale, own_shift = weight.double()
    return torch.stack([mean, own_scale * scale, own_shift * scale + shift]).float(), None
