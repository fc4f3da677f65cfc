"""Wrong inputs and arguments of blocks: PyTorch's own error, or one that says what must be."""

import copy

import numpy
import pytest
import torch
from _modules import BAD_INPUTS, compare, inference, lively, plainly
from _torchvision import torchvision
from torch import nn

import fastres
import fastres.nn as fnn

MAKERS = [lambda: fnn.BasicBlock(16, 16), lambda: fnn.Bottleneck(16, 4), lambda: fnn.PreActBottleneck(16, 4)]


@pytest.mark.parametrize("x", BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs_raise_as_in_pytorch(make, x, training):
    block = make().train(training)
    for context in (torch.no_grad, torch.enable_grad):
        other = copy.deepcopy(block)
        with pytest.raises(Exception) as theirs, context():
            plainly(other, x)
        with pytest.raises((theirs.type, fastres.ArgumentTypeError)), context():
            block(x)
        if not isinstance(block, fnn.PreActBottleneck):  # where batch norm comes before the layer that refuses
            assert all(torch.equal(value, other.state_dict()[name]) for name, value in block.state_dict().items())


def test_one_value_a_channel_raises_in_training_and_empty_batches_pass():
    block = lively(fnn.BasicBlock(16, 16))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.zeros(1, 16, 1, 1))
    for training in (True, False):
        compare(block.train(training), torch.zeros(0, 16, 9, 9))
        compare(block.train(training), torch.zeros(0, 16, 9, 9), run=inference)


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 128}, {"dilation": 2}])
def test_basic_blocks_refuse_as_torchvision(options):
    with pytest.raises((ValueError, NotImplementedError)) as theirs:
        torchvision.models.resnet.BasicBlock(16, 16, **options)
    with pytest.raises(theirs.type) as ours:
        fnn.BasicBlock(16, 16, **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fnn.shortcut("D", 16, 16), "option must be one of"),
        (lambda: fnn.shortcut("A", 16, 8), "planes must be at least inplanes"),
        (lambda: fnn.ZeroPadShortcut(16, 32, 0), "stride must be at least 1"),
        (lambda: fnn.ConvBNAct2d(16, 16, act="gelu"), "act must be"),
        (lambda: fnn.PlainBlock(16, 16, 1, nn.Identity()), "downsample must be None"),
        (lambda: fnn.PlainBottleneck(16, 4, 1, nn.Identity()), "downsample must be None"),
    ],
)
def test_wrong_arguments_say_what_must_be(make, text):
    with pytest.raises(fastres.ArgumentError, match=f"fastres.nn.*{text}.*got"):
        make()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [3, [1.0], numpy.zeros((2, 16, 9, 9), "float32")])
def test_a_residual_is_a_tensor(residual, training):
    with pytest.raises(fastres.ArgumentTypeError, match=r"residual must be a torch\.Tensor, got"):
        fnn.ConvBNAct2d(16, 16).train(training)(torch.zeros(2, 16, 9, 9), residual)


@pytest.mark.parametrize("training", [True, False])
def test_what_pytorchs_modules_take_passes(training):
    """Options that PyTorch takes and the ops do not: the layers are called one by one."""
    whole = numpy.int64
    block = nn.Sequential(
        nn.Conv2d(16, 32, 3, stride=whole(2), groups=whole(2)),
        nn.BatchNorm2d(32, eps=numpy.float32(1e-4), momentum=numpy.float32(0.2)),
        nn.ReLU(),
        nn.MaxPool2d(whole(3), whole(2), whole(1)),
    )
    x = torch.randn(2, 16, 9, 9)
    block.train(training)
    expected = copy.deepcopy(block)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(fastres.optimize(copy.deepcopy(block), channels_last=False)(x), copy.deepcopy(expected)(x))
