"""Convolutions as residual networks use them, and ConvBNAct2d."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastres.errors import must
from fastres.nn import _fused
from fastres.nn._module import FusedModule

Pair = int | tuple[int, int]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 ``nn.Conv2d`` without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 ``nn.Conv2d`` without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class ConvBNAct2d(FusedModule):
    """Convolution, batch norm, an optional residual and ReLU in one module (He et al. 2016, section 3.4).

    Equivalent to ``relu(bn(conv(x)) + residual)`` with the children ``conv``, ``bn`` and ``act``. In
    evaluation without autograd one op runs, batch norm folded into a copy of the weights; otherwise the
    convolution and one op after it.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in ``nn.Conv2d``.
        padding: pixels of zeros on each side; None keeps the size at stride 1 and odd kernels.
        act: ``"relu"``, ``"none"``, or any module, which then runs as it is.
        norm_layer: called with out_channels; None is ``nn.BatchNorm2d``, which alone is fused.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = False,
        act: str | nn.Module = "relu",
        norm_layer: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if act not in ("relu", "none") and not isinstance(act, nn.Module):
            raise must("nn.ConvBNAct2d", "act", '"relu", "none" or a module', repr(act))
        if padding is None:
            kernel, spread = _pair(kernel_size), _pair(dilation)
            padding = (spread[0] * (kernel[0] - 1) // 2, spread[1] * (kernel[1] - 1) // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.act = {"relu": nn.ReLU(inplace=True), "none": None}[act] if isinstance(act, str) else act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _fused.conv_bn_act(self.conv, self.bn, self.act, x, residual)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
