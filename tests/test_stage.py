"""Blocks in a row: the two gradients of a block's output kept apart, wherever nobody can tell, and nowhere else."""

import copy

import pytest
import torch
from tolerances import assert_close_to_truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastres
import fastres.nn as fnn
from fastres.experiments.twin import torch_twin
from fastres.nn import _fused, _stage
from fastres.nn._stage import Stage
from fastres.ops import REGISTRY
from fastres.ops._op import Op

LAST = torch.channels_last
STAGES = {  # and how many of their outputs come in two
    "basic": (lambda: Stage(*(fnn.BasicBlock(16, 16) for _ in range(4))), 3),
    "bottlenecks behind a projection": (
        lambda: Stage(fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2)), *(fnn.Bottleneck(32, 8) for _ in range(2))),
        2,
    ),
    "behind option A": (
        lambda: Stage(fnn.BasicBlock(16, 32, 2, fnn.shortcut("A", 16, 32, 2)), fnn.BasicBlock(32, 32)), 1,
    ),
    "projections everywhere": (
        lambda: Stage(*(fnn.BasicBlock(16, 16, 1, fnn.shortcut("C", 16, 16)) for _ in range(3))), 2,
    ),
    "a projection and option A behind": (
        lambda: Stage(
            fnn.BasicBlock(16, 16), fnn.BasicBlock(16, 24, 2, fnn.shortcut("B", 16, 24, 2)),
            fnn.BasicBlock(24, 32, 2, fnn.shortcut("A", 24, 32, 2)),
        ), 2,
    ),
    "plain": (lambda: Stage(fnn.PlainBlock(16, 16), fnn.PlainBlock(16, 16)), 0),
    "another norm": (lambda: Stage(*(fnn.BasicBlock(16, 16, norm_layer=lambda c: nn.GroupNorm(4, c)) for _ in range(2))), 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def op_by_op(monkeypatch):
    """As on a GPU, and for the smallest inputs."""
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})


@pytest.fixture
def parts(monkeypatch):
    """For every output in two that was made: how many gradients came back."""
    found, original = [], Op.call_split

    def call_split(op, *args, **options):
        both = original(op, *args, **options)
        if both is not None:
            index = len(found)
            found.append(0)
            for each in both[:2]:
                each.register_hook(lambda grad: found.__setitem__(index, found[index] + 1))
        return both

    monkeypatch.setattr(Op, "call_split", call_split)
    return found


def make(name="basic", blocks=4):
    torch.manual_seed(1)
    stage = STAGES[name][0]().to(memory_format=LAST)[:blocks]
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.5, 1)
    return stage


def one_by_one(stage):
    """The same blocks in a plain nn.Sequential."""
    return nn.Sequential(*copy.deepcopy(stage))


def images(dtype=torch.float32, seed=0):
    return torch.randn(8, 16, 9, 7, generator=torch.Generator().manual_seed(seed)).to(dtype, memory_format=LAST)


def weighted(y):
    return (y * torch.linspace(-1, 2, y.shape[3], dtype=y.dtype)).square().sum()


def step(stage, x, amp=False):
    """Output, all gradients and all buffers of a step."""
    stage.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = stage(x)
    weighted(y.to(x.dtype)).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **dict(stage.named_buffers())}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for what in found:
        assert torch.equal(found[what], expected[what]), what


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_has_the_bits_of_blocks_one_by_one(name, dtype, layout, parts):
    stage = make(name).to(dtype, memory_format=layout)
    other, x = one_by_one(stage), images(dtype).contiguous(memory_format=layout)
    found = step(stage, x)
    assert parts == [2] * STAGES[name][1]
    assert_same_bits(found, step(other, x))  # of two values a sum has one rounding, wherever it is formed
    assert len(parts) == STAGES[name][1]
    assert_same_bits(step(make(name).to(dtype, memory_format=layout), x), found)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["basic", "bottlenecks behind a projection", "behind option A"])
def test_a_step_is_torchs(name, amp, parts):
    stage, x = make(name, 2), images()
    plain, double = torch_twin(stage), torch_twin(stage).double()
    own, same, truth = step(stage, x, amp), step(plain, x, amp), step(double, x.double())
    assert parts == [2] and type(plain) is nn.Sequential
    for what in own:
        assert own[what].dtype == same[what].dtype
        if own[what].is_floating_point():
            assert_close_to_truth(own[what], same[what], truth[what], torch.bfloat16 if amp else torch.float32, what)


def seen_by(kind, stage):
    """Lets something see what goes between the first two blocks; the tensors that it saw."""
    seen, first, second = [], stage[0], stage[1]
    if kind == "forward hook":
        first.register_forward_hook(lambda module, args, y: seen.append(y))
    elif kind == "forward hook of the next block":
        second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif kind == "hook of a convolution":
        second.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif kind == "patched forward":
        forward = second.forward
        second.forward = lambda x: forward(seen.append(x) or x)
    elif kind == "patched forward of a convolution":
        forward = second.conv1.forward
        second.conv1.forward = lambda x: forward(seen.append(x) or x)
    elif kind == "hook of a projection":
        second.downsample.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif kind == "hook of a projection's convolution":
        second.downsample[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif kind == "subclass":

        class Seeing(fnn.BasicBlock):
            def forward(self, x):
                seen.append(x)
                return super().forward(x)

        second.__class__ = Seeing
    else:

        class Convolution(nn.Conv2d):
            def forward(self, x):
                seen.append(x)
                return super().forward(x)

        second.conv1.__class__ = Convolution
    return seen


@pytest.mark.parametrize(
    "kind",
    [
        "forward hook", "forward hook of the next block", "hook of a convolution", "patched forward",
        "patched forward of a convolution", "subclass", "subclass of a convolution", "hook of a projection",
        "hook of a projection's convolution",
    ],
)  # fmt: skip
def test_whoever_sees_a_value_sees_its_whole_gradient(kind, parts):
    stage, x, found = make("projections everywhere" if "projection" in kind else "basic"), images(), []
    for each in (stage, one_by_one(stage)):
        seen = seen_by(kind, each)
        found += torch.autograd.grad(weighted(each(x)), seen[0])
    assert 0 < len(parts) < len(stage) - 1  # between the blocks where nobody sees anything
    assert torch.equal(*found)


def test_a_forward_replaced_on_the_class_is_called(parts, monkeypatch):
    called, forward = [], fnn.BasicBlock.forward
    monkeypatch.setattr(fnn.BasicBlock, "forward", lambda self, x: called.append(self) or forward(self, x))
    make()(images())
    assert len(called) == 4 and not parts


def test_a_cpu_adds_the_gradients_by_itself(parts, monkeypatch):
    monkeypatch.setattr(_stage, "DEVICES", {"cuda"})
    make()(images())
    assert not parts


def test_global_hooks_modes_and_transforms_see_every_block(parts):
    stage, x = make(), images()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    stage(x)
    hook.remove()
    assert seen.count(fnn.BasicBlock) == 4 and not parts
    for module in stage.modules():
        module.track_running_stats = False  # a transform does not let buffers be written
    loss = lambda given: torch.func.functional_call(stage, given, (x,)).sum()  # noqa: E731
    torch.func.grad(loss)({name: parameter.detach() for name, parameter in stage.named_parameters()})
    names = [node.target for node in torch.fx.symbolic_trace(stage).graph.nodes if node.op == "call_module"]
    assert names[0] == "0.conv1"
    report = fastres.explain(stage, x)
    assert any("bn_add_act_train" in str(module) for module in report.modules)
    with torch.no_grad():
        stage(x)
    stage.eval()(x)
    stage.requires_grad_(False).train()(x)
    assert not parts


@pytest.mark.parametrize("frozen", ["0", "1.conv1", "1.bn2", "2"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    stage = make()
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    other = one_by_one(stage)
    assert_same_bits(step(stage, images()), step(other, images()))


def test_one_of_two_gradients_is_enough():
    stage, x = make(), images()
    args = stage[0].conv2(x), x, stage[0].bn2.weight, stage[0].bn2.bias, 1e-5, "relu"
    y, again, *_ = REGISTRY["bn_add_act_train"].call_split(*args)
    assert y.data_ptr() == again.data_ptr() and y._version == again._version
    whole, *_ = REGISTRY["bn_add_act_train"](*args)
    weight = stage[0].bn2.weight
    expected = torch.autograd.grad(weighted(whole), weight)[0]
    for one in (y, again):
        assert torch.equal(torch.autograd.grad(weighted(one), weight, retain_graph=True)[0], expected)
    both = torch.autograd.grad(weighted(y) + weighted(again), weight)[0]
    assert torch.equal(both, 2 * expected)
    with torch.no_grad():
        y.add_(1)
    assert again._version == y._version


def test_gradients_of_gradients():
    stage, x = make().double(), images(torch.float64)
    found = []
    for each in (stage, torch_twin(stage)):
        (grad,) = torch.autograd.grad(weighted(each(x.requires_grad_())), x, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *each.parameters()])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_retained_graphs(reentrant, parts):
    stage, x = make(), images().requires_grad_()
    other = copy.deepcopy(stage)
    y = stage(x)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert parts == [4, 4, 4]
    checkpoint(other, x, use_reentrant=reentrant).sum().backward()
    for one, two in zip(stage.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, 2 * two.grad)


def test_small_layers_stay_one_node(monkeypatch, parts):
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 2**20)
    stage, x = make(), images()
    other = one_by_one(stage)
    assert_same_bits(step(stage, x), step(other, x))
    assert not parts


def test_what_fails_raises_torchs_error_and_updates_nothing():
    stage = make()
    for x in (torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            stage(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stage(torch.randn(1, 16, 1, 1))
    assert not any(buffer.any() for name, buffer in stage.named_buffers() if name.endswith("mean"))


def test_compiled_it_is_blocks_one_by_one(parts):
    stage, x = make(), images()
    expected = step(copy.deepcopy(stage), x)
    parts.clear()
    found = step(torch.compile(stage, backend="eager", fullgraph=True), x)
    assert not parts
    for what, value in found.items():
        torch.testing.assert_close(value, expected[what.replace("_orig_mod.", "")], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seen", [False, True])
def test_stages_in_a_row_are_as_one(seen, parts):
    torch.manual_seed(0)
    model, x = fastres.models.cifar.resnet(20), torch.randn(4, 3, 16, 16)
    other = copy.deepcopy(model)
    for name in ("layer1", "layer2", "layer3"):
        setattr(other, name, one_by_one(getattr(other, name)))
    found = []
    for network in (model, other):
        if seen:
            network.layer2.register_forward_pre_hook(lambda module, args: found.append(args[0]))
            found.append(torch.autograd.grad(network(x).square().sum(), found.pop())[0])
        else:
            network(x).square().sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert len(parts) == (6 if seen else 8)  # those of three stages apart: the second is called
    assert torch.equal(*found)


def test_the_networks_are_made_of_stages():
    for model in (fastres.models.resnet18(), fastres.models.cifar.resnet(20)):
        assert type(model.layer2) is Stage and isinstance(model.layer2, nn.Sequential)
        assert type(model.layer2[1:]) is Stage
        assert type(torch_twin(model).layer2) is nn.Sequential


class Decorated(nn.Module):
    """A block that is none: something between its input and its first convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x * 0.5)) + x)


@pytest.mark.parametrize("name", STAGES)
def test_optimised_blocks_are_kept_apart_as_fastres_own(name, parts):
    stage, x = torch_twin(make(name)), images()
    other = nn.Sequential(*map(fastres.optimize, copy.deepcopy(stage)))
    network = fastres.optimize(nn.Sequential(stage))
    found = step(network, x)
    two = STAGES[name][1]
    assert parts == [2] * two
    assert_same_bits({key.replace("0.", "", 1): value for key, value in found.items()}, step(other, x))
    assert len(parts) == two
    with torch.no_grad():
        network(x)
    network.eval()(x)
    copy.deepcopy(network).train()(x)
    assert len(parts) == 2 * two
    assert type(fastres.restore(network)[0]) is nn.Sequential and type(network) is nn.Sequential


@pytest.mark.parametrize("kind", ["forward hook", "forward hook of the next block", "hook of a convolution", "patched forward"])
def test_whoever_sees_a_value_of_optimised_blocks_sees_its_whole_gradient(kind, parts):
    stage, x, found = torch_twin(make()), images(), []
    apart = nn.Sequential(*map(fastres.optimize, copy.deepcopy(stage)))
    for network in (fastres.optimize(nn.Sequential(stage)), nn.Sequential(apart)):
        seen = seen_by(kind, network[0])
        found += torch.autograd.grad(weighted(network(x)), seen[0])
    assert 0 < len(parts) < 3
    assert torch.equal(*found)


def test_what_is_no_block_is_called(parts):
    stage = nn.Sequential(*(Decorated() for _ in range(3)))
    network, x = fastres.optimize(nn.Sequential(stage)), images()
    other = nn.Sequential(*map(fastres.optimize, copy.deepcopy(fastres.restore(copy.deepcopy(network)))[0]))
    assert_same_bits({key.replace("0.", "", 1): value for key, value in step(network, x).items()}, step(other, x))
    assert not parts
