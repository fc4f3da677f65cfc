"""optimize(memory="low"): less is kept for backward, by just what batch norms hand to convolutions, and no bit changes."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastres
import fastres.nn as fnn
from fastres.models import cifar, resnet18, resnet50, vgg16_bn
from fastres.nn import _fused, _stage
from fastres.ops.bn_act import BN_ACT_TRAIN, samples_train, train_again

LAST = torch.channels_last
BLOCKS = {
    "basic": lambda: fnn.BasicBlock(16, 16),
    "option A": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("A", 16, 32, 2)),
    "projection": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("B", 16, 32, 2)),
    "bottleneck": lambda: fnn.Bottleneck(16, 4),
    "bottleneck, projection": lambda: fnn.Bottleneck(16, 16, 2, fnn.shortcut("B", 16, 64, 2)),
    "ResNeXt": lambda: fnn.Bottleneck(16, 4, groups=4, base_width=32),
    "dilated": lambda: fnn.Bottleneck(16, 4, dilation=2),
    "plain": lambda: fnn.PlainBlock(16, 32, 2),
    "plain bottleneck": lambda: fnn.PlainBottleneck(16, 16),
    "pre-activation": lambda: fnn.PreActBasicBlock(16, 16),
    "pre-activation, option A": lambda: fnn.PreActBottleneck(16, 8, 2, fnn.shortcut("A", 16, 32, 2)),
    "pre-activation, projection": lambda: fnn.PreActBottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2, norm_layer=None)),
}
MADE = {"bottleneck": 2, "bottleneck, projection": 2, "ResNeXt": 2, "dilated": 2, "plain bottleneck": 2, "pre-activation": 2}
MADE |= {"pre-activation, option A": 3, "pre-activation, projection": 2}


def images(dtype=torch.float32, channels=16, size=8, batch=8, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name, dtype=torch.float32, layout=LAST):
    torch.manual_seed(1)
    return lively(BLOCKS[name]()).to(dtype, memory_format=layout)


def low(model, **options):
    """A copy that keeps less, with the memory format of the original."""
    return fastres.optimize(model, memory="low", inplace=False, channels_last=False, **options)


def train(model, x, steps=3, amp=False, around=lambda model, x: model(x)):
    """Outputs, gradients, parameters and buffers after steps of momentum SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = {}
    for index in range(steps):
        optimizer.zero_grad()
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = around(model, x * 1)  # autocast keeps its copies of leaves, whose gradients then meet in bfloat16
        y = y.to(x.dtype)
        (y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype)).square().mean().backward()
        found |= {f"y {index}": y.detach(), f"gradient of x {index}": x.grad}
        found |= {f"gradient of {name} {index}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return {**found, **{name: value.detach().clone() for name, value in model.state_dict().items()}}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for what in found:
        assert torch.equal(found[what], expected[what]), what


def saved(model, x, amp=False):
    """Bytes that a forward keeps for backward, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = model(x)
    return sum(kept.values()), y


def handed_on(model, x, amp=False):
    """Bytes of what the batch norms inside blocks hand to convolutions."""
    found, hooks = [], []
    for block in model.modules():
        layers = [name for name in ("bn1", "bn2", "bn3") if hasattr(block, name)]
        if not hasattr(block, "conv2"):
            continue
        if not isinstance(block, fnn.PreActBasicBlock | fnn.PreActBottleneck):
            layers.pop()
        elif isinstance(block.downsample, nn.Conv2d):
            layers.pop(0)
        for name in layers:
            size = lambda _, args, y: found.append(y.numel() * (2 if amp else y.element_size()))
            hook = getattr(block, name).register_forward_hook(size)
            hooks.append(hook)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        copy.deepcopy(model)(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(params=["one node", "op by op"])
def usual(request, monkeypatch):
    """How the model runs that keeps everything."""
    if request.param == "op by op":
        monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "amp"])
@pytest.mark.parametrize("name", BLOCKS)
def test_three_steps_have_the_same_bits(name, dtype, layout, usual):
    amp, dtype = dtype == "amp", torch.float32 if dtype == "amp" else dtype
    block, x = make(name, dtype, layout), images(dtype).contiguous(memory_format=layout)
    assert_same_bits(train(low(block), x, amp=amp), train(block, x, amp=amp))


@pytest.mark.parametrize("name", BLOCKS)
def test_three_steps_of_pytorchs_kernels_have_the_same_bits(name):
    block, x = make(name), images()
    with fastres.use("torch"):
        assert_same_bits(train(low(block), x), train(block, x))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_batch_norms_hand_to_convolutions_is_not_kept(name, amp, monkeypatch):
    block, x = make(name), images()
    least = saved(block, x, amp)[0]
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)  # where what autocast casts, and a residual, are not kept twice
    made = handed_on(block, x, amp)
    assert len(made) == MADE.get(name, 1)
    before, after = saved(block, x, amp)[0], saved(low(block), x, amp)[0]
    assert before - after == sum(made) and after < least


@pytest.mark.parametrize("make_network, size, most", [
    (lambda: resnet50(num_classes=10), 64, 0.845), (lambda: resnet18(num_classes=10), 64, 0.86),
    (lambda: cifar.resnet(20, shortcut="B"), 32, 0.79),
])  # fmt: skip
def test_networks_keep_less_to_the_same_bits(make_network, size, most, usual):
    torch.manual_seed(0)
    network, x = make_network(), images(channels=3, size=size, batch=4)
    other = low(network)
    before, after = saved(network, x)[0], saved(other, x)[0]
    assert before - after == sum(handed_on(network, x)) and after < most * before
    network, other = network.train(), low(network)
    assert_same_bits(train(other, x, 1), train(network, x, 1))


def test_blocks_in_a_row_whose_gradients_are_kept_apart_have_the_same_bits(monkeypatch):
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    torch.manual_seed(0)
    network, x = lively(cifar.resnet(14, shortcut="B")), images(channels=3, size=32)
    other = low(network)
    assert saved(other, x)[0] < 0.8 * saved(network, x)[0]
    assert_same_bits(train(low(network), x), train(network, x))


def test_others_networks_keep_less_to_the_same_bits():
    timm = pytest.importorskip("timm")
    from _torchvision import torchvision

    for make_network in (
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.resnext50_32x4d(num_classes=10),
        lambda: timm.create_model("resnet26", num_classes=10),
        lambda: timm.create_model("resnet10t", num_classes=10),
    ):
        torch.manual_seed(0)
        network, x = fastres.optimize(lively(make_network())), images(channels=3, size=64, batch=2)
        other = fastres.optimize(network, memory="low", inplace=False)
        assert saved(other, x)[0] < 0.9 * saved(network, x)[0]
        assert_same_bits(train(copy.deepcopy(other), x, 1), train(copy.deepcopy(network), x, 1))
        note = next(note for note in fastres.explain(other).notes if "memory='low'" in note)
        assert note.split()[1] == str(sum(hasattr(module, "conv2") for module in network.modules()))


def called(model, x):
    return model(x)


AROUND = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "saved on the CPU": lambda model, x: save_on_cpu()(called)(model, x) if False else _on_cpu(model, x),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
    "functional": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
}
