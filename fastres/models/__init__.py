"""The networks of the paper and their relatives, with torchvision's signatures, keys and weights per seed.

``fastres.models.cifar`` holds those for small images.
"""

from fastres.models import cifar
from fastres.models._load import load_weights
from fastres.models.resnet import (
    PlainNet,
    ResNet,
    plain,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fastres.models.vgg import VGG, vgg16_bn

__all__ = [
    "VGG",
    "PlainNet",
    "ResNet",
    "cifar",
    "load_weights",
    "plain",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "vgg16_bn",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
