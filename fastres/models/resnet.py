"""The ImageNet networks of He et al. 2016 (table 1) and their relatives, under torchvision's names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import must
from fastres.models._load import build, build_from_file, expect
from fastres.nn import BasicBlock, Bottleneck, PlainBlock, PlainBottleneck, _sequence, shortcut
from fastres.nn._module import FusedModule
from fastres.nn._stage import Stage, run_all

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNet(FusedModule):
    """A residual network for ImageNet (He et al. 2016, table 1): drop-in for ``torchvision.models.ResNet``.

    Same arguments, attributes, state-dict keys, and weights for the same seed; the steps run fused.

    Args:
        block: ``BasicBlock``, ``Bottleneck`` or any class with their constructor.
        layers: blocks in each of the four stages.
        num_classes: outputs.
        zero_init_residual: start each block as its shortcut: last gamma 0 (Goyal et al. 2017).
        groups, width_per_group: of the 3x3 convolutions (Xie et al. 2017; Zagoruyko and Komodakis 2016).
        replace_stride_with_dilation: for each of the last three stages, dilate instead of striding.
        norm_layer: called with the channels; None is ``nn.BatchNorm2d``, which alone is fused.
        shortcut: option A, B or C of section 4.1; torchvision's networks are B.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        shortcut: str = "B",
    ) -> None:
        super().__init__()
        dilate = (
            [False, False, False] if replace_stride_with_dilation is None else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 64, 1, groups, width_per_group
        self.shortcut = shortcut
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialize(self, zero_init_residual)

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> Stage:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        found = []
        for index in range(max(1, blocks)):
            step, dilation = (stride, previous_dilation) if index == 0 else (1, self.dilation)
            downsample = self._make_shortcut(self.inplanes, planes * block.expansion, step)
            found.append(
                block(
                    self.inplanes,
                    planes,
                    step,
                    downsample,
                    self.groups,
                    self.base_width,
                    dilation,
                    self._norm_layer,
                )
            )
            self.inplanes = planes * block.expansion
        return Stage(*found)

    def _make_shortcut(self, inplanes: int, planes: int, stride: int) -> nn.Module | None:
        return shortcut(self.shortcut, inplanes, planes, stride, self._norm_layer)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = _sequence.conv_bn_act_maxpool(self.conv1, self.bn1, self.relu, self.maxpool, x)
        x = run_all((self.layer1, self.layer2, self.layer3, self.layer4), x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class PlainNet(ResNet):
    """A network of the same layers without shortcuts (He et al. 2016, section 3.3).

    Args:
        block: ``PlainBlock`` or ``PlainBottleneck``.
        layers, num_classes, norm_layer: as in ``ResNet``.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        num_classes: int = 1000,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(block, layers, num_classes, norm_layer=norm_layer)

    def _make_shortcut(self, inplanes: int, planes: int, stride: int) -> None:
        return None


def initialize(model: nn.Module, zero_init_residual: bool = False) -> None:
    """Initialise convolutions and norms in the order of the modules, as torchvision does (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)
    if zero_init_residual:
        zero_last_norms(model)


def zero_last_norms(model: nn.Module) -> int:
    """Start every residual block as its shortcut (Goyal et al. 2017), its last batch norm at 0; how many these are."""
    found = 0
    for module in model.modules():
        last = "bn3" if isinstance(module, Bottleneck) else "bn2" if isinstance(module, BasicBlock) else None
        if last is not None and getattr(module, last).weight is not None:
            nn.init.zeros_(getattr(module, last).weight)
            found += 1
    return found


def _resnet(
    name: str, depth: int, weights: Any, progress: bool, kwargs: dict[str, Any], **fixed: int
) -> ResNet:
    for parameter, value in fixed.items():
        expect(kwargs, parameter, value)
    block = BasicBlock if depth < 50 else Bottleneck
    return build(partial(ResNet, block, LAYERS[depth]), name, weights, progress, kwargs)


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (He et al. 2016, table 1); as ``torchvision.models.resnet18``."""
    return _resnet("resnet18", 18, weights, progress, kwargs)


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (He et al. 2016, table 1); as ``torchvision.models.resnet34``."""
    return _resnet("resnet34", 34, weights, progress, kwargs)


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (He et al. 2016, table 1); as ``torchvision.models.resnet50``."""
    return _resnet("resnet50", 50, weights, progress, kwargs)


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (He et al. 2016, table 1); as ``torchvision.models.resnet101``."""
    return _resnet("resnet101", 101, weights, progress, kwargs)


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (He et al. 2016, table 1); as ``torchvision.models.resnet152``."""
    return _resnet("resnet152", 152, weights, progress, kwargs)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 of 32 groups of width 4 (Xie et al. 2017); as ``torchvision.models.resnext50_32x4d``."""
    return _resnet("resnext50_32x4d", 50, weights, progress, kwargs, groups=32, width_per_group=4)


def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 of 32 groups of width 8 (Xie et al. 2017); as ``torchvision.models.resnext101_32x8d``."""
    return _resnet("resnext101_32x8d", 101, weights, progress, kwargs, groups=32, width_per_group=8)


def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 of 64 groups of width 4 (Xie et al. 2017); as ``torchvision.models.resnext101_64x4d``."""
    return _resnet("resnext101_64x4d", 101, weights, progress, kwargs, groups=64, width_per_group=4)


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 of twice the width (Zagoruyko et al. 2016); as ``torchvision.models.wide_resnet50_2``."""
    return _resnet("wide_resnet50_2", 50, weights, progress, kwargs, width_per_group=128)


def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 of twice the width (Zagoruyko et al. 2016); as ``torchvision.models.wide_resnet101_2``."""
    return _resnet("wide_resnet101_2", 101, weights, progress, kwargs, width_per_group=128)


def plain(depth: int, *, weights: Any = None, **kwargs: Any) -> PlainNet:
    """The plain network of 18, 34, 50, 101 or 152 layers (He et al. 2016, table 1 without shortcuts).

    Args:
        depth: layers with weights.
        weights: None or a checkpoint file.
        kwargs: ``num_classes`` and ``norm_layer``, as in ``ResNet``.
    """
    if type(depth) is not int or depth not in LAYERS:
        raise must("models.plain", "depth", f"one of {list(LAYERS)}", depth)
    block = PlainBlock if depth < 50 else PlainBottleneck
    return build_from_file(partial(PlainNet, block, LAYERS[depth]), "plain", weights, kwargs)
