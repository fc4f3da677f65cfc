"""VGG-16 with batch norm, the plain network that He et al. 2016 compare with (figure 3 left)."""

from typing import Any

import torch
from torch import Tensor, nn

from fastres.models._load import build
from fastres.nn import _sequence
from fastres.nn._module import FusedModule

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG(FusedModule):
    """Convolutions in stages, then three linear layers: drop-in for ``torchvision.models.VGG``.

    Args:
        features: the convolutions, any module; the runs of a plain ``nn.Sequential`` are fused.
        num_classes: outputs.
        init_weights: initialise as torchvision does; else as the layers do.
        dropout: probability in the classifier.
    """

    def __init__(
        self, features: nn.Module, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, num_classes),
        )
        if init_weights:
            for module in self.modules():
                _initialize(module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(_sequence.run(self.features, x))
        return self.classifier(torch.flatten(x, 1))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, 1)
        nn.init.constant_(module.bias, 0)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.constant_(module.bias, 0)


def _features() -> nn.Sequential:
    layers, channels = [], 3
    for planes, count in _STAGES:
        for _ in range(count):
            layers += [
                nn.Conv2d(channels, planes, kernel_size=3, padding=1),
                nn.BatchNorm2d(planes),
                nn.ReLU(True),
            ]
            channels = planes
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


def vgg16_bn(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-16 with batch norm (Simonyan and Zisserman 2015); as ``torchvision.models.vgg16_bn``."""
    if weights is not None:
        kwargs["init_weights"] = False
    return build(_vgg16_bn, "vgg16_bn", weights, progress, kwargs)


def _vgg16_bn(**kwargs: Any) -> VGG:
    return VGG(_features(), **kwargs)
