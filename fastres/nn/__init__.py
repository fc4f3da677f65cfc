"""Blocks of residual networks that run fused ops on the parameters of ordinary ``torch.nn`` children."""

from fastres.nn.blocks import BasicBlock, Bottleneck, PlainBlock, PlainBottleneck
from fastres.nn.conv import ConvBNAct2d, conv1x1, conv3x3
from fastres.nn.preact import PreActBasicBlock, PreActBottleneck
from fastres.nn.shortcut import ZeroPadShortcut, shortcut

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "PlainBlock",
    "PlainBottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ZeroPadShortcut",
    "conv1x1",
    "conv3x3",
    "shortcut",
]
