"""The same network in plain PyTorch: what fastres is compared with.

``torch_twin`` copies a model and gives each fastres block the forward that torchvision writes for it, in
``torch.nn`` modules and tensor operations alone; parameters, buffers and keys stay.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastres import models
from fastres import nn as fnn
from fastres.errors import UnsupportedError
from fastres.models.cifar import CifarPreActResNet, CifarResNet
from fastres.nn._module import FusedModule
from fastres.nn._stage import Stage


class Plain(nn.Module):
    """A module of plain PyTorch. It must not count as a fastres module, which ``fastres.optimize`` would leave alone."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = "plain_torch"


class TorchBasicBlock(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class TorchBottleneck(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class TorchPlainBlock(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class TorchPlainBottleneck(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)))


class _TorchPreAct(Plain):
    pads: bool  # whether the shortcut is option A, which takes the block's own input

    def identity(self, x: Tensor, activated: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        return self.downsample(x if self.pads else activated)


class TorchPreActBasicBlock(_TorchPreAct):
    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return out + self.identity(x, activated)


class TorchPreActBottleneck(_TorchPreAct):
    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        out = self.relu(self.bn2(self.conv1(activated)))
        out = self.conv3(self.relu(self.bn3(self.conv2(out))))
        return out + self.identity(x, activated)


class TorchConvBNAct2d(Plain):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out = out if residual is None else out + residual
        return out if self.act is None else self.act(out)


class TorchResNet(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class TorchCifarResNet(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class TorchCifarPreActResNet(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


class TorchVGG(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


TWINS: dict[type, type] = {
    Stage: nn.Sequential,
    fnn.BasicBlock: TorchBasicBlock,
    fnn.Bottleneck: TorchBottleneck,
    fnn.PlainBlock: TorchPlainBlock,
    fnn.PlainBottleneck: TorchPlainBottleneck,
    fnn.PreActBasicBlock: TorchPreActBasicBlock,
    fnn.PreActBottleneck: TorchPreActBottleneck,
    fnn.ConvBNAct2d: TorchConvBNAct2d,
    models.ResNet: TorchResNet,
    models.PlainNet: TorchResNet,
    models.VGG: TorchVGG,
    CifarResNet: TorchCifarResNet,
    CifarPreActResNet: TorchCifarPreActResNet,
}


def torch_twin(model: nn.Module) -> nn.Module:
    """A copy of the model whose blocks run plain PyTorch.

    Raises:
        UnsupportedError: it holds a fastres module, or a subclass of one, that has no twin here.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        kind = type(module)
        if kind in TWINS:
            module.__class__ = TWINS[kind]
            if isinstance(module, _TorchPreAct):
                module.pads = isinstance(module.downsample, fnn.ZeroPadShortcut)
        elif isinstance(module, FusedModule):
            raise UnsupportedError(f"fastres: {kind.__name__} has no plain PyTorch twin to be compared with")
    return twin
