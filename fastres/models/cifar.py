"""The CIFAR-10 networks of He et al. 2016 (section 4.2) and their pre-activation form (He et al. 2016b).

A 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels on maps of 32, 16 and 8 pixels,
average pooling and a linear layer: 6n + 2 layers of two-layer blocks, 9n + 2 of bottlenecks. The shortcuts of
He et al. 2016 are option A.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import must
from fastres.models._load import build_from_file
from fastres.models.resnet import initialize
from fastres.nn import BasicBlock, PlainBlock, PreActBasicBlock, PreActBottleneck, conv3x3, shortcut
from fastres.nn._fused import bn_act, conv_bn_act
from fastres.nn._module import FusedModule
from fastres.nn._stage import Stage, run_all

CHANNELS = (16, 32, 64)


class CifarResNet(FusedModule):
    """A residual or plain network for small images; children ``conv1 bn1 relu layer1..3 avgpool fc``.

    Args:
        block: ``BasicBlock`` or ``PlainBlock``.
        blocks: n, the blocks in each stage.
        num_classes: outputs.
        shortcut: option A, B or C of section 4.1; None for plain blocks.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        block: Any,
        blocks: int,
        num_classes: int = 10,
        shortcut: str | None = "A",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, CHANNELS[0])
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = _stages(block, blocks, shortcut, nn.BatchNorm2d)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(CHANNELS[2] * block.expansion, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn_act(self.conv1, self.bn1, self.relu, x)
        x = run_all((self.layer1, self.layer2, self.layer3), x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarPreActResNet(FusedModule):
    """A pre-activation network for small images; children ``conv1 layer1..3 bn relu avgpool fc``.

    The last addition is followed by batch norm and ReLU (He et al. 2016b, appendix). Arguments as in
    ``CifarResNet``.
    """

    def __init__(
        self,
        block: Any,
        blocks: int,
        num_classes: int = 10,
        shortcut: str = "B",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, CHANNELS[0])
        self.layer1, self.layer2, self.layer3 = _stages(block, blocks, shortcut, None)
        self.bn = nn.BatchNorm2d(CHANNELS[2] * block.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(CHANNELS[2] * block.expansion, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = bn_act(self.bn, self.relu, x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stages(block: Any, blocks: int, option: str | None, norm_layer: Any) -> list[Stage]:
    """Three stages; the second and the third start with stride 2."""
    stages, inplanes = [], CHANNELS[0]
    for planes, stride in zip(CHANNELS, (1, 2, 2), strict=True):
        found = []
        for step in (stride, *[1] * (blocks - 1)):
            outplanes = planes * block.expansion
            downsample = None if option is None else shortcut(option, inplanes, outplanes, step, norm_layer)
            found.append(block(inplanes, planes, step, downsample))
            inplanes = outplanes
        stages.append(Stage(*found))
    return stages


def _blocks(name: str, depth: int, layers: int) -> int:
    """The n of ``layers * n + 2``."""
    if type(depth) is not int or depth < layers + 2 or (depth - 2) % layers:
        raise must(f"models.cifar.{name}", "depth", f"{layers}n + 2 with n at least 1", depth)
    return (depth - 2) // layers


def resnet(
    depth: int = 20, num_classes: int = 10, shortcut: str = "A", in_channels: int = 3, *, weights: Any = None
) -> CifarResNet:
    """The residual network of section 4.2, of 20, 32, 44, 56, 110 or any 6n + 2 layers.

    Args:
        depth: layers with weights, 6n + 2.
        num_classes: outputs.
        shortcut: ``"A"`` (the paper's: no parameters), ``"B"`` or ``"C"``, see ``fastres.nn.shortcut``.
        in_channels: channels of the images.
        weights: None or a checkpoint file.
    """
    make = partial(CifarResNet, BasicBlock, _blocks("resnet", depth, 6), num_classes, shortcut, in_channels)
    return build_from_file(make, "cifar.resnet", weights, {})


def plain(
    depth: int = 20, num_classes: int = 10, in_channels: int = 3, *, weights: Any = None
) -> CifarResNet:
    """The plain network of section 4.2: the layers of ``resnet`` without shortcuts; arguments as there."""
    make = partial(CifarResNet, PlainBlock, _blocks("plain", depth, 6), num_classes, None, in_channels)
    return build_from_file(make, "cifar.plain", weights, {})


def preact_resnet(
    depth: int = 164,
    num_classes: int = 10,
    shortcut: str = "B",
    in_channels: int = 3,
    bottleneck: bool = True,
    *,
    weights: Any = None,
) -> CifarPreActResNet:
    """The pre-activation network of He et al. 2016b: 164 or any 9n + 2 layers, or 110 of two-layer blocks.

    Args:
        depth: layers with weights, 9n + 2 with bottlenecks, else 6n + 2.
        num_classes, shortcut, in_channels, weights: as in ``resnet``.
        bottleneck: ``PreActBottleneck`` (ResNet-164, ResNet-1001) or ``PreActBasicBlock`` (ResNet-110).
    """
    block, layers = (PreActBottleneck, 9) if bottleneck else (PreActBasicBlock, 6)
    blocks = _blocks("preact_resnet", depth, layers)
    make = partial(CifarPreActResNet, block, blocks, num_classes, shortcut, in_channels)
    return build_from_file(make, "cifar.preact_resnet", weights, {})
