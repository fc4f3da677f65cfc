"""torchvision's FrozenBatchNorm2d, the norm of its detection networks: fused as a batch norm in evaluation, in both modes."""

import copy

import pytest
import torch
from _modules import assert_same_modules, judge, saved, step
from _torchvision import torchvision
from tolerances import assert_close_to_truth
from torch import nn

import fastres.models
from fastres import functional
from fastres import nn as fnn
from fastres.experiments.twin import torch_twin
from fastres.nn import _plain
from fastres.ops import _node

pytestmark = pytest.mark.cpu
LAST = torch.channels_last
Frozen = torchvision.ops.FrozenBatchNorm2d
X = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


def statistics(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, Frozen):
            for tensor, (low, high) in zip(module.buffers(), ((0.5, 1.5), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5)), strict=True):
                tensor.uniform_(low, high)
    return model


def call(module, x):
    return module(x)


def network(name="resnet18", of=torchvision.models):
    torch.manual_seed(0)
    return statistics(getattr(of, name)(num_classes=10, norm_layer=Frozen))


@pytest.mark.parametrize(
    "name, of", [("resnet18", torchvision.models), ("resnet50", torchvision.models), ("resnet18", fastres.models)]
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_networks(name, of, training):
    model = network(name, of).train(training)
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert optimized.state_dict().keys() == model.state_dict().keys()
    model = torch_twin(model) if of is fastres.models else model
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = model(X.contiguous(memory_format=LAST))
        truth = exact(X.double())
    with torch.no_grad():
        assert_close_to_truth(optimized(X), expected, truth, torch.float32, "logits")
    before = {key: value.clone() for key, value in optimized.state_dict().items()}
    theirs, truth = (step(call, m, x) for m, x in ((model, X.contiguous(memory_format=LAST)), (exact, X.double())))
    judge([(step(call, optimized, X), theirs, truth)], torch.float32)
    assert all(torch.equal(value, before[key]) for key, value in optimized.state_dict().items())
    if of is torchvision.models:
        assert fastres.explain(optimized).counts.get("conv_bn_act") == {"resnet18": 11, "resnet50": 36}[name]
        assert_same_modules(model, fastres.restore(optimized))


@torch.no_grad()
def test_the_dtype_is_what_pytorch_gives():
    """Products with float32 buffers promote: under autocast PyTorch's frozen norm gives float32 for bfloat16."""
    block = statistics(fnn.BasicBlock(16, 16, norm_layer=Frozen))
    theirs = statistics(torchvision.models.resnet.BasicBlock(16, 16, norm_layer=Frozen))
    theirs.load_state_dict(block.state_dict())
    x = X[:1].repeat(1, 6, 1, 1)[:, :16]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), theirs(x)
        assert y.dtype == expected.dtype == torch.float32 and torch.equal(y, expected)
    y, expected = block.bfloat16()(x.bfloat16()), theirs.bfloat16()(x.bfloat16())
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_close_to_truth(y, expected, copy.deepcopy(theirs).double()(x.bfloat16().double()), torch.bfloat16, "block")


def test_what_must_be_called_is_called(monkeypatch):
    block, x = statistics(fnn.BasicBlock(8, 8, norm_layer=Frozen)), torch.randn(2, 8, 6, 6)
    y, seen = block(x), []
    handle = block.bn1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(block(x), y)
    handle.remove()
    assert seen and _plain.why_not(block.bn1) is None
    bias = block.bn1._buffers.pop("bias")
    object.__setattr__(block.bn1, "bias", bias)
    assert "elsewhere" in _plain.why_not(block.bn1)
    torch.testing.assert_close(block(x), y)
    monkeypatch.setattr(Frozen, "forward", lambda self, x: x * 0)
    assert "replaced on the class" in _plain.why_not(block.bn1) and not torch.equal(block(x), y)

    class FrozenBatchNorm2d(nn.Module):
        """Of the same name, from elsewhere."""

    assert "not one of the plain modules" in _plain.why_not(FrozenBatchNorm2d())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Frozen])
def test_explain_says_what_is_one_node(monkeypatch, norm):
    """Blocks whose norms train are; those with a frozen norm, or one in evaluation, are not."""
    nodes, run = [], _node.run
    monkeypatch.setattr(_node, "run", lambda *args: nodes.append(1) or run(*args))
    model = fastres.models.ResNet(fnn.BasicBlock, [1, 1, 1, 1], norm_layer=norm).train()

    def told(model):
        fastres.optimize(model)(X)
        (note,) = [note for note in fastres.explain(model).notes if "one autograd node" in note] or [None]
        return note, bool(nodes)

    note, is_node = told(model)
    assert is_node == (norm is nn.BatchNorm2d) == (note is not None and "op by op" not in note)
    if norm is nn.BatchNorm2d:
        nodes.clear()
        for block in (model.layer1, model.layer2):
            block.eval()
        note, is_node = told(model)
        assert is_node and "one in evaluation, run op by op" in note


@torch.no_grad()
def test_as_one_plan():
    model = network().eval()
    optimized = fastres.optimize(copy.deepcopy(model))
    assert any("one native plan" in note for note in fastres.explain(optimized, X).notes)
    for frozen in (fastres.freeze(model, X), fastres.freeze(optimized, X)):
        assert [layer.kind for layer in frozen.network.layers].count("bn") == 0
        assert_close_to_truth(frozen(X), model(X), copy.deepcopy(model).double()(X.double()), torch.float32, "logits")
        model.bn1.weight.mul_(2)
        frozen.update(model)
        assert_close_to_truth(frozen(X), model(X), copy.deepcopy(model).double()(X.double()), torch.float32, "updated")
        model.bn1.weight.div_(2)
    before = optimized(X)
    optimized.layer1[0].bn1.running_var.mul_(4)
    assert not torch.allclose(optimized(X), before)


def test_memory_low_asks_for_a_batch_norm_in_training():
    with pytest.raises(fastres.UnsupportedError, match="memory"):
        fastres.optimize(network().train(), memory="low")


def test_the_backbone_of_a_detector():
    model = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5
    )  # fmt: skip
    model = statistics(model).train()
    optimized = fastres.optimize(copy.deepcopy(model))
    assert "inputs are brought to channels_last" in fastres.explain(optimized).notes
    exact = copy.deepcopy(model).double()
    theirs, truth = model(X.contiguous(memory_format=LAST)), exact(X.double())
    for key, y in optimized(X).items():
        assert_close_to_truth(y, theirs[key], truth[key], torch.float32, key)
    assert saved(optimized, X) < 1.02 * saved(model, X)  # statistics of each norm, not what it normalised


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
def test_gradients_beside_constant_parameters(act, layout):
    """Of batch norm in evaluation, whose x is not kept: once and twice, against differences in float64."""
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 4, 3, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_() for _ in range(2))
    weight, bias, mean = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    given = mean, mean.abs() + 0.5, weight, bias
    calls = {
        "bn_act": (lambda x: functional.bn_act(x, *given, act=act), (x,)),
        "bn_act without parameters": (lambda x: functional.bn_act(x, *given[:2], act=act), (x,)),
        "bn_add_act": (lambda x, r: functional.bn_add_act(x, r, *given, act=act), (x, residual)),
        "bn_add_bn_act": (lambda x, r: functional.bn_add_bn_act(x, r, *given, *given, act=act), (x, residual)),
    }
    kept = []
    for function, inputs in calls.values():
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            y = function(*inputs)
        activations = [tensor for tensor in kept if tensor.dim() == 4]
        assert [tensor.data_ptr() for tensor in activations] == [y.data_ptr()] * (act == "relu")
