"""A projection's batch norm in the block's last op: when it joins, what it then updates, and when it is called instead."""

import copy

import pytest
import torch
from _modules import compare, lively, plainly
from _torchvision import torchvision
from torch import nn

import fastres
import fastres.nn as fnn
from fastres import tuner

FUSED = {"bn_add_bn_act_train", "bn_add_bn_act_backward"}


def images(channels=16):
    return torch.randn(3, channels, 9, 9, generator=torch.Generator().manual_seed(0))


def block(**options):
    return lively(fnn.BasicBlock(16, 24, 2, fnn.shortcut("B", 16, 24, 2), **options))


def ops(module, x):
    """Names of the ops that a training step runs."""
    return {op.name for op, _ in tuner.record(module.train(), x).values()}


def step(forward, module, x):
    """Output, gradients and buffers of one training step of a copy."""
    module = copy.deepcopy(module)
    y = forward(module, x)
    y.square().sum().backward()
    return [y, *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()]


def assert_like_plain(module):
    x = images().double()
    module = module.double()
    for ours, theirs in zip(step(lambda m, x: m(x), module, x), step(plainly, module, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_projection_joins_in_training_only():
    assert ops(block(), images()) >= FUSED
    assert not ops(fnn.BasicBlock(16, 16), images()) & FUSED
    evaluated = block().eval()
    with torch.no_grad():
        assert {op.name for op, _ in tuner.record(evaluated, images()).values()} == {"conv_bn_act", "conv_bn_add_act"}
    compare(evaluated, images())  # evaluation under autograd


@pytest.mark.parametrize("momentum", [(0.1, 0.3), (None, 0.2), (0.0, None), (None, None)])
def test_both_norms_keep_their_own_momentum(momentum):
    module = block()
    module.bn2.momentum, module.downsample[1].momentum = momentum
    module.downsample[1].eps = 1e-2
    module.downsample[1].num_batches_tracked.fill_(3)
    assert ops(module, images()) >= FUSED
    assert_like_plain(module)


def test_norms_of_different_statistics_run_by_themselves():
    frozen, untracked = block(), block()
    frozen.downsample[1].eval()
    untracked.downsample[1] = nn.BatchNorm2d(24, affine=False, track_running_stats=False)
    for module, joined in ((frozen, False), (untracked, True)):
        assert_like_plain(module)
        found = {op.name for op, _ in tuner.record(copy.deepcopy(module).float(), images()).values()}
        assert bool(found & FUSED) == joined


def test_one_norm_in_both_places_is_updated_twice():
    module = block()
    module.downsample[1] = module.bn2
    assert not ops(copy.deepcopy(module), images()) & FUSED
    assert_like_plain(module)


@pytest.mark.parametrize("place", ["downsample", "downsample.0", "downsample.1", "bn2"])
def test_hooks_fire(place):
    module, fired = block(), []
    module.get_submodule(place).register_forward_hook(lambda *_: fired.append(place))
    joined = place == "downsample.0"  # the convolution is called in any case
    assert bool(ops(copy.deepcopy(module), images()) & FUSED) == joined
    fired.clear()
    module(images())
    assert fired == [place]


def test_other_norms_are_called():
    module = block()
    module.downsample[1] = nn.GroupNorm(3, 24)
    assert_like_plain(module)
    module = block(norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert_like_plain(module)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 64), ("resnet50", 256)])
def test_optimized_networks_join_theirs(name, channels):
    model = fastres.optimize(getattr(torchvision.models, name)().train(), strict=True)
    optimized = model.layer2[0]
    assert ops(optimized, images(channels)) >= FUSED
    optimized.downsample.register_forward_hook(lambda *_: None)
    assert not ops(optimized, images(channels)) & FUSED


class WritingShortcut(nn.Module):
    """Its shortcut starts by writing into the block's input, which the other branch reads afterwards."""

    def __init__(self):
        super().__init__()
        self.downsample = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        x = x * 1.0
        identity = self.downsample(x)
        return self.relu(self.bn(self.conv(x)) + identity)


def test_a_shortcut_that_writes_stays_where_it_is():
    torch.manual_seed(0)
    model, x = WritingShortcut().double(), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    optimized = fastres.optimize(copy.deepcopy(model))
    torch.testing.assert_close(optimized(x), model(x))


def test_a_forced_kernel_that_cannot_run_is_not_passed_over():
    reason = "'triton'.* cannot run this call"
    with torch.no_grad(), fastres.use(conv_bn_add_conv_bn_act="triton"), pytest.raises(fastres.UnsupportedError, match=reason):
        block().eval()(images())
    with torch.no_grad(), fastres.use(conv_bn_add_conv_bn_act="torch"):
        module = block().eval()
        torch.testing.assert_close(module(images()), plainly(module, images()))
