"""The cuDNN backend of the convolution ops: convolution, bias, residual and ReLU in one call, batch norm folded.

``torch.cudnn_convolution_add_relu`` passes NaN on. Its sister without residual, ``cudnn_convolution_relu``, turns NaN into 0,
and a residual that is broadcast is read beyond its end (H200, torch 2.11, 2026-11-27): so only the end of a block runs by it.
It is chosen by default only where a device of the architecture has validated it.
"""

from typing import Any

import torch
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.ops import _fold

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CHANNELS = 8  # for a 7x7 stem in channels_last the fused call was 17 times slower than two (pytorch#68506)


def why_not(x: Tensor, residual: Tensor | None, weight: Tensor, groups: int, act: str) -> str | None:
    """Why cuDNN's fused call cannot run a convolution, beyond what all folded backends ask."""
    if x.device.type != "cuda":
        return f"cuDNN runs on cuda, the tensors are on {x.device.type}"
    if torch.version.hip is not None or not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "this PyTorch has no cuDNN, or torch.backends.cudnn.enabled is off"
    if x.dtype not in DTYPES:
        return f"its fused call is used for float32, float16 and bfloat16, got {x.dtype}"
    if residual is None:
        return "its fused call without a residual turns NaN into 0"
    if act != "relu":
        return f"its fused call always applies ReLU, got act={act!r}"
    if groups != 1:
        return f"its fused call is used for one group, got groups={groups}"
    if x.shape[1] < LEAST_CHANNELS:
        return f"its fused call is slow for fewer than {LEAST_CHANNELS} input channels, got {x.shape[1]}"
    return None


def run(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    """One fused call, in x's memory format; fp32 products use TF32 where ``torch.backends.cudnn`` allows it."""
    layout = memory_format(x)

    def finish(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w.to(x.dtype, memory_format=layout), b.to(x.dtype)

    parameters: tuple[Any, ...] = (weight, bias, bn_weight, bn_bias, mean, var)
    w, b = _fold.folded(parameters, eps, ("cudnn", x.dtype, layout), finish)
    y = torch.ops.aten.cudnn_convolution_add_relu(x, w, residual, 1.0, b, stride, padding, dilation, groups)
    return y.contiguous(memory_format=layout)
