"""optimize(memory="low"): less is kept for backward, by just what batch norms hand to convolutions, and no bit changes."""

import copy
import pickle

import pytest
import torch
from _modules import lively, saved
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fastres
import fastres.nn as fnn
from fastres.kernels import native
from fastres.models import cifar, resnet18, resnet50, resnext50_32x4d, vgg16_bn
from fastres.nn import _fused, _stage
from fastres.ops import REGISTRY
from fastres.ops._recompute import Producer

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
MADE |= {"pre-activation, option A": 3, "pre-activation, projection": 3}


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


def handed_on(model, x, amp=False):
    """Bytes of what the batch norms inside blocks hand to convolutions."""
    found, hooks = [], []
    for block in model.modules():
        layers = [name for name in ("bn1", "bn2", "bn3") if hasattr(block, name)]
        if not hasattr(block, "conv2"):
            continue
        if not isinstance(block, fnn.PreActBasicBlock | fnn.PreActBottleneck):
            layers.pop()
        for name in layers:
            hooks.append(getattr(block, name).register_forward_hook(lambda _, args, y: found.append(y)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        copy.deepcopy(model)(x)
    for hook in hooks:
        hook.remove()
    return [y.numel() * (2 if amp else y.element_size()) for y in found]


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
    least = saved(block, x, amp)
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)  # where what autocast casts, and a residual, are not kept twice
    made = handed_on(block, x, amp)
    assert len(made) == MADE.get(name, 1)
    before, after = saved(block, x, amp), saved(low(block), x, amp)
    if amp and name == "pre-activation, projection":
        made.append(made[0])  # autocast makes a copy for each of the two convolutions
    assert before - after == sum(made) and after < least


def outputs(model, x, names, amp):
    """Bytes of the outputs of these blocks."""
    found, model = [], copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, args, y: found.append(y.nbytes))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        model(x)
    return found


NETWORKS = {  # size of images, the blocks whose outputs are not kept, what of everything is kept at most
    "resnet50": (
        lambda: resnet50(num_classes=10), 64,
        "layer1.0 layer1.2 layer2.0 layer2.2 layer3.0 layer3.2 layer3.4 layer4.0", 0.70,
    ),
    "resnext50": (
        lambda: resnext50_32x4d(num_classes=10), 64,
        "layer1.0 layer1.2 layer2.0 layer2.2 layer3.0 layer3.2 layer3.4 layer4.0", 0.70,
    ),
    "resnet18": (lambda: resnet18(num_classes=10), 64, "layer1.0 layer2.0 layer3.0 layer4.0", 0.77),
    "cifar": (lambda: cifar.resnet(20, shortcut="B"), 32, "layer1.0 layer1.2 layer2.0 layer2.2 layer3.0", 0.65),
    "cifar, option A": (lambda: cifar.resnet(20), 32, "layer1.0 layer1.2 layer2.1 layer3.1", 0.66),
    "cifar, option C": (
        lambda: cifar.resnet(20, shortcut="C"), 32,
        "layer1.0 layer1.1 layer1.2 layer2.0 layer2.1 layer2.2 layer3.0 layer3.1", 0.67,
    ),
    "plain": (lambda: cifar.plain(20), 32, "", 0.78),
    "pre-activation": (lambda: cifar.preact_resnet(20), 32, "", 0.55),
}  # fmt: skip


@pytest.mark.parametrize("apart, amp", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_less_to_the_same_bits(name, apart, amp, monkeypatch):
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    if apart:
        monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    make_network, size, names, most = NETWORKS[name]
    torch.manual_seed(0)
    network, x = lively(make_network()), images(channels=3, size=size, batch=4)
    other = low(network)
    before, after = saved(network, x, amp), saved(other, x, amp)
    if not (amp and name == "pre-activation"):  # whose values of float32 are cast for some convolutions alone
        assert before - after == sum(handed_on(network, x, amp)) + sum(outputs(network, x, names.split(), amp))
    assert amp or after < most * before  # autocast's copies of weights are kept by either
    assert_same_bits(train(low(network), x, 2, amp), train(network, x, 2, amp))


def on_the_cpu(model, x):
    with save_on_cpu():
        return model(x)


AROUND = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "saved elsewhere": on_the_cpu,
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
    "functional call": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
}


@pytest.mark.parametrize("around", AROUND)
def test_whatever_runs_the_model_gets_the_same_bits(around):
    model, x = nn.Sequential(make("bottleneck, projection"), lively(fnn.Bottleneck(64, 16))), images()
    assert_same_bits(train(low(model), x, 2, around=AROUND[around]), train(model, x, 2, around=AROUND[around]))


def change(block, kind):
    """Makes layers of a block unlike those that are one node; what was seen of them."""
    seen = []
    if kind == "hook of a batch norm":
        block.bn1.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    elif kind == "hook of a convolution":
        block.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    elif kind == "backward hook":
        block.relu = nn.ReLU()  # in place it would write into what the hook's function returned
        block.bn2.register_full_backward_hook(lambda module, gradients, _: seen.append(gradients[0].shape))
    elif kind == "frozen statistics":
        block.bn1.eval()
    elif kind == "another activation":
        block.relu = nn.GELU()
    elif kind == "another norm":
        block.bn2 = nn.GroupNorm(2, block.bn2.num_features)
    elif kind == "frozen parameters":
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight"):
            block.get_parameter(name).requires_grad_(False)
    elif kind == "no running statistics":
        block.bn1 = nn.BatchNorm2d(block.bn1.num_features, track_running_stats=False, affine=False)
    elif kind == "cumulative average":
        block.bn2.momentum = None
    elif kind == "biases":
        block.conv2.bias = nn.Parameter(torch.linspace(-1, 1, block.conv2.out_channels))
    return seen


CHANGES = [
    "hook of a batch norm", "hook of a convolution", "backward hook", "frozen statistics", "another activation", "another norm",
    "frozen parameters", "no running statistics", "cumulative average", "biases",
]  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["basic", "bottleneck, projection", "pre-activation"])
def test_changed_layers_do_as_they_always_do(name, kind, monkeypatch):
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    block, other, x = make(name), low(make(name)), images()
    theirs, ours = change(block, kind), change(other, kind)
    assert_same_bits(train(other, x), train(block, x))
    assert ours == theirs and len(ours) == (3 if "hook" in kind else 0)


def test_a_second_derivative_is_the_same():
    for block in (make("bottleneck, projection"), make("pre-activation, option A"), lively(in_a_row())):
        block, x = block.double(), images(torch.float64)
        found = []
        for model in (low(block), block):
            leaves = [x.clone().requires_grad_(), *model.parameters()]
            first = torch.autograd.grad(model(leaves[0]).square().mean(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
            found.append([*first, *second])
        for own, same in zip(*found, strict=True):
            torch.testing.assert_close(own, same, rtol=1e-9, atol=1e-12)


def in_a_row():
    torch.manual_seed(1)
    projection = fnn.BasicBlock(16, 32, 2, fnn.shortcut("B", 16, 32, 2))
    return _stage.Stage(fnn.BasicBlock(16, 16), fnn.BasicBlock(16, 16), fnn.BasicBlock(16, 16), projection)


def test_a_value_that_a_hook_writes_into_is_kept():
    stage, other, seen = lively(in_a_row()), low(lively(in_a_row())), []
    for model in (stage, other):
        model[3].conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0].mul_(2)) and None)
    assert_same_bits(train(other, images(), 2), train(stage, images(), 2))
    assert len(seen) == 4


def test_blocks_of_one_layer_and_calls_of_other_shortcuts_do_as_they_always_do():
    class Called(nn.Conv2d):
        pass

    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x)

    torch.manual_seed(1)
    called = nn.Sequential(Called(16, 16, 1), nn.BatchNorm2d(16))
    model = lively(_stage.Stage(fnn.BasicBlock(16, 16), OneLayer(), fnn.BasicBlock(16, 16, 1, called), fnn.BasicBlock(16, 16)))
    same = fastres.optimize(model, inplace=False, channels_last=False)
    assert_same_bits(train(low(model), images(), 2), train(same, images(), 2))
    assert any("memory='low': 3 blocks" in note for note in fastres.explain(low(model)).notes)


def test_backward_twice_and_parameters_written_in_between():
    block, x = make("bottleneck"), images()
    other = low(block)
    y = other(x)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    block(x).sum().backward()
    assert all(torch.equal(2 * p.grad, q.grad) for p, q in zip(block.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        other.bn1.bias.add_(1)  # of which the convolution's input would be made
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_evaluation_and_no_gradients_are_as_ever():
    for name in BLOCKS:
        block, x = make(name), images()
        other = low(block)
        with torch.no_grad():
            assert torch.equal(other(x), block(x))
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(other.eval()(x), block.eval()(x))


def test_the_option_goes_with_copies_and_pickles_and_ends_with_restore():
    network, x = resnet18(num_classes=10), images(channels=3, size=64, batch=2)
    keys, attributes = list(network.state_dict()), [set(vars(module)) for module in network.modules()]
    before = saved(network, x)
    fastres.optimize(network, memory="low", channels_last=False)
    after = saved(network, x)
    assert after < 0.9 * before and list(network.state_dict()) == keys
    assert saved(copy.deepcopy(network), x) == after == saved(pickle.loads(pickle.dumps(network)), x)
    fastres.optimize(network, memory="low", skip="layer1.*", channels_last=False)
    assert after < saved(network, x) < before
    fastres.optimize(network, channels_last=False)
    assert saved(network, x) == before
    fastres.restore(fastres.optimize(network, memory="low"))
    assert saved(network, x) == before and [set(vars(module)) for module in network.modules()] == attributes


@pytest.mark.parametrize("wrong", ["lo", "", True, 0, ["low"]])
def test_other_values_are_refused(wrong):
    with pytest.raises(ValueError, match=r"fastres\.optimize: memory must be None or 'low', got "):
        fastres.optimize(resnet18(num_classes=10), memory=wrong)


@pytest.mark.parametrize("model, skip", [
    (lambda: vgg16_bn(num_classes=10), ()),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), ()),
    (lambda: resnet18(num_classes=10), ("layer*",)),
    (lambda: fnn.BasicBlock(16, 16, norm_layer=lambda channels: nn.GroupNorm(2, channels)), ()),
])  # fmt: skip
def test_a_model_that_can_keep_no_less_is_refused_and_left_alone(model, skip):
    model = model()
    before = [(type(module), set(vars(module))) for module in model.modules()]
    with pytest.raises(fastres.UnsupportedError, match="memory='low' needs residual blocks"):
        fastres.optimize(model, memory="low", skip=skip)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


def laid(arg, layout):
    return arg.contiguous(memory_format=layout) if isinstance(arg, torch.Tensor) and arg.dim() == 4 else arg


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("name", ["bn_act_train", "bn_add_act_train", "bn_add_bn_act_train"])
def test_what_is_made_again_has_the_bits_of_the_first_time(name, layout, dtype, backend):
    op = REGISTRY[name]
    if backend == "cpu" and native.why_not("cpu_bn_act") is not None:
        pytest.skip(native.why_not("cpu_bn_act"))
    with fastres.use(backend):
        for sample in op.samples(torch.device("cpu"), dtype):
            args = [laid(arg, layout) for arg in sample.args]
            y, *statistics = op(*args)
            statistics = statistics[: 2 * sum(name.endswith("eps") for name in op.parameters)]
            made = Producer(op, tuple(args), tuple(statistics), y._version)
            bare = made.with_tensors((None,) * len(made.tensors()))
            assert not any(isinstance(value, torch.Tensor) for value in (*bare.args, *bare.statistics))
            assert torch.equal(bare.with_tensors(tuple(made.tensors())).recompute(), y), sample.label
