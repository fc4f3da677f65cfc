"""Pre-activation blocks of He et al. 2016b, "Identity Mappings in Deep Residual Networks" (figure 4e).

Batch norm and ReLU come before each convolution, and nothing is on the identity path. As in the paper's
networks, a projection takes the activated input; the resizing of option A takes the input itself, as the
identity would.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastres.nn import _sequence
from fastres.nn._fused import Layer, bn_act, conv_bn_act, convolve
from fastres.nn._module import FusedModule
from fastres.nn.blocks import Norm, check_basic
from fastres.nn.conv import conv1x1, conv3x3
from fastres.nn.shortcut import ZeroPadShortcut


def _identity(downsample: nn.Module | None, x: Tensor, activated: Tensor) -> Tensor:
    if downsample is None:
        return x
    return downsample(x if isinstance(downsample, ZeroPadShortcut) else activated)


def _recomputing(block: Any, layers: Sequence[Layer], x: Tensor) -> Tensor:
    """A block in training whose backward recomputes what its batch norms pass on."""
    out, handed = x, []
    for conv, bn, act in layers:
        y, made = _sequence.bn_act_made(bn, act, out)
        handed.append((y, made))
        out = convolve(conv, y, made)
    activated, made = handed[0]
    if type(block.downsample) is nn.Conv2d:
        return out + convolve(block.downsample, activated, made)
    return out + _identity(block.downsample, x, activated)


class PreActBasicBlock(FusedModule):
    """Two times BN-ReLU-conv3x3, and a clean identity.

    Equivalent to ``conv2(relu(bn2(conv1(a)))) + x`` with ``a = relu(bn1(x))``; with a projection,
    ``+ downsample(a)``.

    Args:
        inplanes, planes: channels that enter and leave.
        stride: of the first convolution.
        downsample: the shortcut where it is not the identity: ``shortcut(..., norm_layer=None)``.
        groups, base_width, dilation: only 1, 64 and 1.
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
        check_basic(groups, base_width, dilation, "PreActBasicBlock")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU()  # not in place: a norm_layer may hand the block's input on
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        layers = self._layers()
        if _sequence.recomputes(self, layers):
            return _recomputing(self, layers, x)
        activated = bn_act(self.bn1, self.relu, x)
        out = conv_bn_act(self.conv1, self.bn2, self.relu, activated)
        return convolve(self.conv2, out) + _identity(self.downsample, x, activated)

    def _layers(self) -> list[Layer]:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)]


class PreActBottleneck(FusedModule):
    """BN-ReLU before a 1x1, a 3x3 and a 1x1 convolution, and a clean identity.

    Equivalent to ``conv3(relu(bn3(conv2(relu(bn2(conv1(a))))))) + x`` with ``a = relu(bn1(x))``; with a
    projection, ``+ downsample(a)``. Arguments as in ``Bottleneck``; ``downsample`` is
    ``shortcut(..., norm_layer=None)``.
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
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU()  # not in place: a norm_layer may hand the block's input on
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        layers = self._layers()
        if _sequence.recomputes(self, layers):
            return _recomputing(self, layers, x)
        activated = bn_act(self.bn1, self.relu, x)
        out = conv_bn_act(self.conv1, self.bn2, self.relu, activated)
        out = conv_bn_act(self.conv2, self.bn3, self.relu, out)
        return convolve(self.conv3, out) + _identity(self.downsample, x, activated)

    def _layers(self) -> list[Layer]:
        first = [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)]
        return [*first, (self.conv3, self.bn3, self.relu)]
