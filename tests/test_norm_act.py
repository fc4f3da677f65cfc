"""timm's BatchNormAct2d, a batch norm that applies its activation itself: fused as the norm and the activation it holds."""

import copy
import functools

import _torchvision  # noqa: F401  timm imports torchvision
import pytest
import torch
from _modules import assert_same_modules, judge, lively, step
from torch import nn

import fastres
from fastres import nn as fnn
from fastres.nn import _plain

timm = pytest.importorskip("timm")
from timm.layers import BatchNormAct2d, ConvNormAct, convert_sync_batchnorm  # noqa: E402

pytestmark = pytest.mark.cpu
LAST = torch.channels_last


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block whose every layer is a convolution and such a norm, the last without activation."""

    def __init__(self, channels=8, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(channels, **options)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(channels, apply_act=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def assert_agrees(model, optimized, x, modes=(True, False)):
    """A training step, with buffers, then evaluation; each beside PyTorch's, whose inputs lie as ours are brought to."""
    x = x.contiguous(memory_format=LAST)
    for training in modes:
        every = [network.train(training) for network in (optimized, model, copy.deepcopy(model).double())]
        ours, theirs, truth = (step(lambda m, v: m(v), m, x.to(next(m.parameters()).dtype)) for m in every)
        judge([(ours, theirs, truth)], torch.float32)
    with torch.no_grad():
        ours, theirs, truth = ({"output": m.eval()(x.to(next(m.parameters()).dtype))} for m in every)
        judge([(ours, theirs, truth)], torch.float32)


def steps(model, training):
    """The steps of the model itself, as text."""
    return [str(each) for each in fastres.explain(model.train(training)).modules[0].steps]


def test_a_block_is_one_sequence_of_layers():
    model = lively(Block())
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert steps(optimized, True) == ["conv_bn_act(conv1, bn1, bn1.act)", "conv_bn_add_act(conv2, bn2, relu)"]
    assert steps(optimized, False) == steps(optimized, True)
    assert optimized._fastres.training.block.parts(optimized)[0][0][2] is optimized.bn1.act
    assert_agrees(model, optimized, images(4, 8, 9, 9))
    assert_same_modules(model, fastres.restore(optimized))


@pytest.mark.parametrize("momentum, track", [(None, True), (0.3, True), (0.1, False)])
def test_its_options_are_those_of_a_batch_norm(momentum, track):
    model = lively(Block(momentum=momentum, track_running_stats=track, eps=1e-3))
    assert_agrees(model, fastres.optimize(copy.deepcopy(model), strict=True), images(4, 8, 9, 9))


def test_a_block_keeps_less_to_the_same_bits():
    model = lively(Block())
    usual, low = (fastres.optimize(copy.deepcopy(model), memory=memory) for memory in (None, "low"))
    x = images(4, 8, 9, 9).contiguous(memory_format=LAST)
    ours, theirs = (step(lambda m, v: m(v), m.train(), x) for m in (low, usual))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_pre_activation_and_convolution_modules():
    torch.manual_seed(0)
    model = lively(nn.Sequential(BatchNormAct2d(8), ConvNormAct(8, 16, 3, stride=2), ConvNormAct(16, 8, 1, apply_act=False)))
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    report = fastres.explain(optimized)
    assert report.counts["bn_act"] == 1 and report.counts["conv_bn_act"] == 2
    assert_agrees(model, optimized, images(4, 8, 9, 9))


def test_a_shortcut_whose_norm_has_a_relu_of_its_own_keeps_it():
    """It comes before the addition: the norm must not join it."""

    class Projected(Block):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), BatchNormAct2d(8))

        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.downsample(x))

    model = lively(Projected())
    assert_agrees(model, fastres.optimize(copy.deepcopy(model), strict=True), images(4, 8, 9, 9))
    model.downsample[1].act = nn.Identity()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert "conv_bn_add_bn_act(conv2, bn2, relu, downsample)" in steps(optimized, True)
    assert_agrees(model, optimized, images(4, 8, 9, 9))


def test_a_norm_of_ours_may_be_one():
    """Its ReLU comes before the addition, and the block's own after it."""
    model = lively(fnn.BasicBlock(8, 8, norm_layer=functools.partial(BatchNormAct2d, inplace=False)))
    model.relu.inplace = False  # as PyTorch's autograd wants it behind another ReLU
    theirs = lively(Block(inplace=False))
    theirs.bn2 = copy.deepcopy(model.bn2)
    theirs.load_state_dict(model.state_dict())
    assert_agrees(theirs.train(), model.train(), images(4, 8, 9, 9))


@pytest.mark.parametrize("change, reason", [
    (lambda m: setattr(m.bn1, "act", nn.SiLU()), "BatchNormAct2d applies SiLU: only ReLU can be fused"),
    (lambda m: setattr(m.bn1, "drop", nn.Dropout2d(0.5)), "BatchNormAct2d drops values, or applies more than an activation"),
    (lambda m: m.bn1.drop.register_forward_hook(lambda *_: None), "BatchNormAct2d drops values, or applies more than an"),
    (lambda m: m.bn1.act.register_forward_hook(lambda *_: None), "ReLU has hooks, which must fire"),
    (lambda m: setattr(m.bn2, "act", nn.ReLU()), None),
    (lambda m: setattr(m.bn1, "act", nn.Identity()), None),
    (lambda m: setattr(m, "bn1", nn.BatchNorm2d(8)), None),
])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_it_holds_may_change(change, reason, when):
    """Before or after optimising; it never runs as something else, and explain says why it is called."""
    model = lively(Block())
    if when == "before":
        change(model)
    optimized = fastres.optimize(copy.deepcopy(model))
    if when == "after":
        for each in (model, optimized):
            change(each)
    if reason is not None:
        assert reason in str(fastres.explain(optimized))
    modes = (False,) if isinstance(model.bn1, BatchNormAct2d) and isinstance(model.bn1.drop, nn.Dropout2d) else (True, False)
    assert_agrees(model, optimized, images(4, 8, 9, 9), modes)


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_on_its_activation_fires_once(grad):
    model = fastres.optimize(lively(Block()).eval())
    calls = []
    model.bn1.act.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(grad):
        model(images(2, 8, 9, 9))
    assert calls == [1]


def test_timms_conversion_to_synchronised_norms_is_followed():
    model = convert_sync_batchnorm(fastres.optimize(lively(Block())))
    assert type(model.bn1).__name__ == "SyncBatchNormAct" and not fastres.explain(model).counts.get("conv_bn_act")
    assert not _plain.is_fusible_norm(model.bn1)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_to_one_graph(training):
    model = lively(Block()).train(training)
    optimized = fastres.optimize(copy.deepcopy(model))
    x = images(4, 8, 9, 9).contiguous(memory_format=LAST)
    y = torch.compile(optimized, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, model(x))


def test_it_can_be_traced():
    model = fastres.optimize(lively(Block()).eval())
    traced, x = torch.fx.symbolic_trace(model), images(2, 8, 9, 9).contiguous(memory_format=LAST)
    assert {"conv1", "bn1.act", "relu"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert torch.equal(traced(x), fastres.restore(model)(x))
