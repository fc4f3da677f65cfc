"""Batch norms in training that take the statistics which the convolution before found: the kernels on a GPU as built, else
executed on the CPU (see _cuda_on_cpu.py)."""

import copy
import itertools

import _hopper
import pytest
import torch
from _cuda_calls import laid_out, run
from _hopper import CL
from tolerances import assert_close_to_truth
from torch import nn

import fastres
import fastres.nn as fnn
from fastres.dispatch import Backend
from fastres.nn import _fused, _norm, _stage
from fastres.ops import REGISTRY, _bn, _chain, _conv_wide, _known_stats

OP = REGISTRY["conv_statistics"]
NORMS = ("bn_act_train", "bn_add_act_train", "bn_add_bn_act_train", "bn_act_maxpool_train")
ALL = (*NORMS, *(name.replace("train", "backward") for name in NORMS))


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


@pytest.fixture
def on_device(monkeypatch, device):
    """The native kernels as backends of the ops in training on the device, emulated too, where they are forced."""
    for name in ALL:
        run_native = getattr(torch.ops.fastres_C, f"cuda_{name}").default
        kernel = Backend("cuda", _bn.why_not, lambda run_native=run_native: run_native)
        others = tuple(b for b in REGISTRY[name].backends if b.name != "cuda")
        monkeypatch.setattr(REGISTRY[name], "backends", (kernel, *others))
    wide = Backend("cuda_wide", _conv_wide.why_not_arguments, lambda: _conv_wide.run_statistics)
    monkeypatch.setattr(OP, "backends", (wide, OP.backends[-1]))
    monkeypatch.setattr(_fused, "WHOLE", {"cuda", "cpu"})
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # some gradients are compared to the bit
    return device


def kernels(backend="cuda_wide"):
    return fastres.use(conv_statistics=backend, **dict.fromkeys(ALL, "cuda"))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
def test_given_statistics_make_the_bits_of_training(on_device, name, layout):
    """Outputs and masks: of vectors, of channels that forbid them, of float32, with ReLU and without."""
    for dtype, sample in itertools.product((torch.float32, torch.bfloat16), REGISTRY[name].samples(on_device, torch.float32)):
        args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in laid_out(sample.args, layout)]
        expected = run(name, *args)
        known = [tuple(expected[1:3]), tuple(expected[3:5])][: 1 + (name == "bn_add_bn_act_train")]
        with kernels():
            found = _known_stats.runner(REGISTRY[name], args, known)(*args)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), sample.label


def stem():
    """The end of a deep one."""
    layers = fnn.conv3x3(16, 24), nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    return fastres.optimize(nn.Sequential(*layers))


def stage():
    """The block in the middle runs layer by layer, of which one does not ask."""
    middle = fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2))
    middle.conv2.register_forward_hook(nothing)
    return _stage.Stage(fnn.BasicBlock(16, 16), middle, fnn.BasicBlock(32, 32))


def nothing(*args):
    pass


ALONE = {"pre-activation": 1, "stage": 1}  # of convolutions
BLOCKS = {
    "basic": lambda: fnn.BasicBlock(16, 16),
    "layer": lambda: fnn.ConvBNAct2d(16, 24, 1),
    "plain": lambda: fnn.PlainBottleneck(16, 8, 2),
    "pre-activation": lambda: fnn.PreActBasicBlock(16, 16),
    "stem": stem,
    "stage": stage,
    "bottlenecks": lambda: _stage.Stage(
        fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2)), fnn.Bottleneck(32, 8)
    ),
}


def step(model, x, seed):
    """A training step: output, gradients, then what the batch norms keep."""
    model, x = copy.deepcopy(model), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype != torch.float64):
        y = model(x)
    y.backward(seed.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.fixture
def spared(monkeypatch):
    """The statistics that batch norms took."""
    found, original = [], _known_stats.runner

    def runner(op, args, known):
        run_given = original(op, args, known)
        found.extend([] if run_given is None else known)
        return run_given

    for module in (_norm, _chain):
        monkeypatch.setattr(module, "runner", runner)
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step_keeps_the_budget(on_device, name, spared):
    """Values, gradients and running statistics, with autocast's weights; the pass over y is spared for every batch norm."""
    torch.manual_seed(0)
    model = BLOCKS[name]().to(on_device, memory_format=CL)
    for module in model.modules():  # no value so near to 0 that rounding decides what a ReLU does
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 6.0)
            module.bias.data[::3] = -6.0
    x = torch.randn(3, 16, 11, 13, device=on_device).bfloat16().contiguous(memory_format=CL)
    pairs = sum(isinstance(m, nn.Conv2d) for m in model.modules()) - ALONE.get(name, 0)
    with fastres.use("torch"):
        seed = torch.randn(model(x.float()).shape, device=on_device)
        same, exact = step(model, x, seed), step(copy.deepcopy(model).double(), x.double(), seed)
    ways = []
    for backend in ("torch", "cuda_wide"):
        with kernels(backend):
            ways.append(step(model, x, seed))
        assert len(spared) == (0 if backend == "torch" else pairs)
    for found in ways:
        for index, (actual, torch_same, truth) in enumerate(zip(found, same, exact, strict=True)):
            assert_close_to_truth(actual, torch_same, truth, torch.bfloat16, f"{name} {index}")


def half_block(device):
    """A block in bfloat16, images, and the gradient of its output."""
    torch.manual_seed(0)
    block = fnn.BasicBlock(16, 16).to(device, torch.bfloat16, memory_format=CL)
    x = torch.randn(3, 16, 7, 9, device=device).bfloat16().contiguous(memory_format=CL)
    return block, x, torch.ones(3, 16, 7, 9, device=device)


def assert_followed(block, x, seed, calls, counts):
    """The calls of a kernel: of the block plain and checkpointed, which give the same; and once it has run with a
    hook, and with what makes values again in backward, too."""
    heard = []
    plain = step(block, x, seed)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    again = torch.utils.checkpoint.checkpoint(copy.deepcopy(block), leaf, use_reentrant=False)
    again.backward(torch.ones_like(again))
    assert torch.equal(again, plain[0]) and torch.equal(leaf.grad, plain[1]) and len(calls) == counts[0]
    block.bn1.register_forward_hook(lambda *args: heard.append(args))
    step(block, x, seed)
    block.bn1._forward_hooks.clear()
    setattr(block, _fused.RECOMPUTES, True)
    step(block, x, seed)
    assert len(heard) == 1 and len(calls) == counts[1]


def test_what_follows_the_call_is_not_passed_by(on_device, spared):
    """A checkpointed block gives the same; layers with hooks, and blocks that make values again in backward, do not ask."""
    with kernels():
        assert_followed(*half_block(on_device), spared, (6, 7))


def images(device, dtype=torch.bfloat16):
    x = torch.randn(3, 16, 7, 9, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).contiguous(memory_format=CL)


def layer(device, **options):
    torch.manual_seed(0)
    return fnn.ConvBNAct2d(16, 24, **options).to(device, torch.bfloat16, memory_format=CL)


def test_nothing_is_asked_where_no_kernel_may_be_chosen(monkeypatch):
    """On a CPU, with nothing forced: the convolution and the op behind it run as they would."""
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    cpu = torch.device("cpu")
    for name in ("layer", "plain", "pre-activation", "stem", "stage"):
        torch.manual_seed(0)
        model = BLOCKS[name]()
        y = model(images(cpu, torch.float32))
        with monkeypatch.context() as patch:
            patch.setattr(_fused, "CONV_STATISTICS", None)  # which would be asked
            assert torch.equal(copy.deepcopy(model)(images(cpu, torch.float32)), y), name
    with fastres.use(bn_act="torch"), monkeypatch.context() as patch, pytest.raises(AttributeError):
        patch.setattr(_fused, "CONV_STATISTICS", None)
        BLOCKS["layer"]()(images(cpu, torch.float32))


HEARD = {
    "convolution": lambda module, hook: module.conv.register_forward_hook(hook),
    "before the convolution": lambda module, hook: module.conv.register_forward_pre_hook(hook),
    "batch norm": lambda module, hook: module.bn.register_forward_hook(hook),
    "activation": lambda module, hook: module.act.register_forward_hook(hook),
    "backward": lambda module, hook: module.conv.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("place", HEARD)
def test_hooks_of_a_layer_fire(on_device, spared, place):
    module, x, heard = layer(on_device), images(on_device), []
    with kernels():
        with torch.no_grad():
            module(x)
        assert len(spared) == 1
        HEARD[place](module, lambda *args: heard.append(args) and None)
        module(x.requires_grad_()).sum().backward()
    assert len(heard) == 1 and len(spared) == 1


def test_only_batch_norms_in_training_ask(on_device, spared):
    """Not those in evaluation, nor what is not exactly ``nn.BatchNorm2d``; not before another activation or pool."""
    x = images(on_device)

    def asks(bn, act=None, pool=None, **options):
        module = layer(on_device, **options)
        with kernels():
            return _fused.convolve_before(bn.to(on_device), act, module.conv, x, pool)[1] is not None

    assert asks(nn.BatchNorm2d(24)) and asks(nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3))
    for norm in (nn.BatchNorm2d(24).eval(), nn.SyncBatchNorm(24), type("Own", (nn.BatchNorm2d,), {})(24), nn.GroupNorm(4, 24)):
        assert not asks(norm)
    assert not asks(nn.BatchNorm2d(24), nn.GELU()) and not asks(nn.BatchNorm2d(24), nn.ReLU(), nn.AvgPool2d(3))
    assert not asks(nn.BatchNorm2d(24), bias=True)
    with kernels():
        layer(on_device).eval()(x)
    assert not spared


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}], ids=str)
def test_running_statistics_are_kept(on_device, spared, options):
    """As PyTorch keeps them: what the layer that finds its statistics itself has after two batches, to the budget."""
    module, x = layer(on_device), images(on_device)
    module.bn = nn.BatchNorm2d(24, **options).to(on_device)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    for batch in (x, 2 * x + 1):
        with kernels():
            module(batch)
        with fastres.use("torch"):
            plain(batch), exact(batch.double())
    assert len(spared) == 2 and len(list(module.buffers())) == (0 if "track_running_stats" in options else 3)
    for found, same, truth in zip(module.buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_close_to_truth(found, same, truth, torch.bfloat16, str(options))  # of a convolution that is rounded to it


def test_frozen_parameters_get_no_gradient(on_device, spared):
    x = images(on_device)
    for frozen in ({"conv.weight"}, {"bn.weight", "bn.bias"}, {"conv.weight", "bn.weight", "bn.bias"}):
        module, leaf, grads = layer(on_device), x.clone().requires_grad_(), []
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for backend in ("torch", "cuda_wide"):
            with kernels(backend):
                module.zero_grad()
                leaf.grad = None
                module(leaf).float().square().sum().backward()
            grads.append({name: p.grad for name, p in [("x", leaf), *module.named_parameters()] if p.grad is not None})
        one, other = grads
        assert set(one) == set(other) == {"x", "conv.weight", "bn.weight", "bn.bias"} - frozen
        for name, grad in one.items():
            torch.testing.assert_close(other[name], grad, rtol=0.05, atol=0.05 * grad.abs().max().item())
    assert len(spared) == 3


def test_explain_says_whether_a_layer_asks(on_device, monkeypatch):
    """By which kernel and why; or what stood in the way."""
    block, x = fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2)), images(on_device)
    block.to(on_device, torch.bfloat16, memory_format=CL)

    def told():
        with kernels():
            report = fastres.explain(block, x)
        ran = [choice.backend.name for m in report.modules for s in m.steps for choice in s.choices if s.op == OP.name]
        return ran, [text for module in report.modules for step in module.steps for text in step.statistics], str(report)

    found = "convolution and statistics in one kernel, conv_statistics: cuda_wide, forced by fastres.use"
    ran, texts, shown = told()
    assert ran == ["cuda_wide"] * 4 and texts == [found] * 4 and f"bn_add_bn_act_train: cuda ({found})" in shown
    block.conv2.register_forward_hook(lambda *args: None)
    ran, texts, _ = told()
    assert ran == ["cuda_wide"] * 3 and texts.count(found) == 3
    assert [text for text in texts if text != found] == [
        "not conv_statistics: its caller runs its modules one by one, or recomputes in backward what they pass on"
    ]

