"""Residual blocks with torchvision's constructor, attributes and keys, and their plain counterparts."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastres.errors import must
from fastres.nn import _sequence
from fastres.nn._fused import Layer
from fastres.nn._module import FusedModule
from fastres.nn.conv import conv1x1, conv3x3

Norm = Callable[..., Any]


def check_basic(groups: int, base_width: int, dilation: int, name: str = "BasicBlock") -> None:
    """Refuse, with torchvision's errors, what a block of two 3x3 convolutions does not have."""
    if groups != 1 or base_width != 64:
        raise ValueError(f"{name} only supports groups=1 and base_width=64")
    if dilation > 1:
        raise NotImplementedError(f"Dilation > 1 not supported in {name}")


class BasicBlock(FusedModule):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left): drop-in for torchvision's.

    Equivalent to ``relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))``, with torchvision's attributes and
    state-dict keys.

    Args:
        inplanes, planes: channels that enter and leave.
        stride: of the first convolution.
        downsample: the shortcut where it is not the identity, see ``shortcut``; any module.
        groups, base_width, dilation: only 1, 64 and 1, as in torchvision.
        norm_layer: called with the channels; None is ``nn.BatchNorm2d``, which alone is fused.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        check_basic(groups, base_width, dilation)
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return _sequence.block(self, self._layers(), x, *self._children("downsample"))

    def _layers(self) -> list[Layer]:
        conv1, bn1, conv2, bn2, relu = self._children("conv1", "bn1", "conv2", "bn2", "relu")
        return [(conv1, bn1, relu), (conv2, bn2, relu)]


class Bottleneck(FusedModule):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right): drop-in for torchvision's.

    Equivalent to ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))``, with
    torchvision's attributes and state-dict keys. As there, the stride is on the 3x3 convolution.

    Args:
        inplanes: channels that enter; ``4 * planes`` leave.
        planes: channels of the 3x3 convolution, times ``groups * base_width / 64``.
        stride, groups, dilation: of the 3x3 convolution.
        downsample: the shortcut where it is not the identity, see ``shortcut``; any module.
        base_width: 128 for wide networks; 4 or 8 a group for ResNeXt (Xie et al. 2017).
        norm_layer: called with the channels; None is ``nn.BatchNorm2d``, which alone is fused.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return _sequence.block(self, self._layers(), x, *self._children("downsample"))

    def _layers(self) -> list[Layer]:
        conv1, bn1, conv2, bn2, conv3, bn3, relu = self._children("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu")
        return [(conv1, bn1, relu), (conv2, bn2, relu), (conv3, bn3, relu)]


class PlainBlock(BasicBlock):
    """``BasicBlock`` without its shortcut: two layers of a plain network (He et al. 2016, section 3.3).

    Equivalent to ``relu(bn2(conv2(relu(bn1(conv1(x))))))``; arguments and keys as in ``BasicBlock``, with
    ``downsample`` None.
    """

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: None = None, *args: Any, **kwargs: Any
    ) -> None:
        _no_shortcut("nn.PlainBlock", downsample)
        super().__init__(inplanes, planes, stride, None, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return _sequence.plain_block(self, self._layers(), x)


class PlainBottleneck(Bottleneck):
    """``Bottleneck`` without its shortcut: three layers of a plain network.

    Equivalent to ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))))``; arguments and keys as in
    ``Bottleneck``, with ``downsample`` None.
    """

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: None = None, *args: Any, **kwargs: Any
    ) -> None:
        _no_shortcut("nn.PlainBottleneck", downsample)
        super().__init__(inplanes, planes, stride, None, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return _sequence.plain_block(self, self._layers(), x)


def _no_shortcut(block: str, downsample: object) -> None:
    if downsample is not None:
        raise must(block, "downsample", "None", type(downsample).__name__, "a plain block has no shortcut")
