"""A module replaced by one of another kind, itself fusible elsewhere, is called as what it is."""

import copy

import pytest
import torch
from torch import nn

from fastres.nn import BasicBlock


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("relu", nn.MaxPool2d(3, 1, 1)),
        ("bn1", nn.Conv2d(8, 8, 1)),
        ("conv1", nn.BatchNorm2d(8)),
        ("bn2", nn.GroupNorm(2, 8)),
        ("relu", nn.Identity()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_replaced_modules_are_called(name, module, training):
    torch.manual_seed(0)
    block = BasicBlock(8, 8).train(training)
    setattr(block, name, module)
    plain = copy.deepcopy(block)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        out = plain.bn2(plain.conv2(plain.relu(plain.bn1(plain.conv1(x)))))
        expected = plain.relu(out + x)
        torch.testing.assert_close(block(x), expected)
