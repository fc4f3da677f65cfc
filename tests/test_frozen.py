"""Frozen networks: the same answers as their models, for any images, from any thread; and what is refused."""

# ruff: noqa: E501

import copy
import os
import pickle
import subprocess
import sys
import threading

import _torchvision  # noqa: F401  # torchvision imports with a CPU torch
import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from tolerances import assert_close_to_truth
from torch import nn
from torch.utils._pytree import tree_flatten

import fastres
from fastres import models
from fastres import nn as fnn
from fastres.kernels import native
from fastres.ops import _conv_cpu

pytestmark = pytest.mark.cpu
timm, vision = pytest.importorskip("timm"), pytest.importorskip("torchvision").models


class Odd(nn.Module):
    """What the ready-made networks lack: input as a residual, pooling with ceil_mode, a leftover ReLU, no classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.last = nn.Conv2d(20, 7, (1, 3), stride=(2, 1), bias=False)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)) + x)
        y = F.max_pool2d(F.relu(y + self.bn(y)), 3, 2, 1, ceil_mode=True)
        y = y + F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
        return self.last(F.relu(y.clone()))


NETWORKS = {
    "resnet18": lambda: (vision.resnet18(), (2, 3, 64, 64)),
    "resnet50": lambda: (vision.resnet50(num_classes=10), (1, 3, 65, 50)),
    "dilated": lambda: (vision.resnet50(replace_stride_with_dilation=[False, True, True]), (1, 3, 64, 64)),
    "in groups": lambda: (models.resnext50_32x4d(num_classes=5), (2, 3, 64, 50)),
    "in groups that fill no vector": lambda: (timm.create_model("regnetx_002", num_classes=5), (2, 3, 64, 50)),
    "wide": lambda: (models.wide_resnet50_2(num_classes=5), (1, 3, 32, 32)),
    "ours": lambda: (models.resnet34(num_classes=12), (3, 3, 48, 48)),
    "optimised": lambda: (fastres.optimize(vision.resnet18()), (2, 3, 40, 40)),
    "cifar": lambda: (models.cifar.resnet(20), (2, 3, 32, 32)),
    "plain": lambda: (models.plain(18, num_classes=4), (1, 3, 64, 64)),
    "timm 26d": lambda: (timm.create_model("resnet26d"), (2, 3, 64, 64)),
    "flat features": lambda: (nn.Sequential(nn.Conv2d(3, 18, 3), nn.BatchNorm2d(18), nn.ReLU(), nn.Flatten()), (2, 3, 8, 9)),
    "mean of a large map": lambda: (nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (2, 3, 112, 96)),
    "timm, gated": lambda: (timm.create_model("seresnext26d_32x4d", num_classes=5), (3, 3, 64, 50)),
    "vgg": lambda: (vision.vgg11_bn(num_classes=3).features, (1, 3, 64, 64)),
    "pre-activation": lambda: (fnn.PreActBasicBlock(24, 24), (2, 24, 9, 9)),
    "few channels, dilated": lambda: (nn.Sequential(nn.Conv2d(3, 16, 3, padding=2, dilation=2), nn.Conv2d(16, 4, 1)), (2, 3, 11, 12)),
    "odd": lambda: (Odd(), (3, 20, 11, 8)),
}


def images(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small():
    torch.manual_seed(0)
    return lively(models.cifar.resnet(8)).eval()


def check(frozen, model, x, dtype=torch.float32):
    plain = fastres.restore(copy.deepcopy(model)).eval()
    with torch.no_grad(), fastres.use("torch"):
        truth = copy.deepcopy(plain).double()(x.double())
        same = plain.to(dtype)(x.to(dtype))
    (ys, form), (others, expected), (exact, _) = map(tree_flatten, (frozen(x), same, truth))
    assert form == expected  # the same containers
    for y, other, true in zip(ys, others, exact, strict=True):
        assert y.dtype == dtype and y.shape == other.shape and not y.requires_grad
        assert_close_to_truth(y, other, true, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, dtype):
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.eval()
    x = images(shape)
    check(fastres.freeze(model, x, dtype), model, x, dtype)


def test_the_compiler_is_not_imported():
    """Importing it takes longer than freezing."""
    text = """import sys, torch, fastres
x = torch.zeros(1, 3, 8, 8)
fastres.freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU()), x)(x)
sys.exit("torch._dynamo" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", text]).returncode == 0


def test_other_sizes_and_strides_are_planned_at_their_first_call():
    model = small()
    frozen = fastres.freeze(model, images((2, 3, 32, 32)))
    wide = images((4, 6, 40, 70))
    for x in (images((1, 3, 32, 32)), images((7, 3, 17, 40)), images((3, 3, 24, 24)).contiguous(memory_format=torch.channels_last),
              wide[:, ::2, 3:, ::2], wide[:1, :3].expand(3, -1, -1, -1), wide.transpose(2, 3)[:, :3]):  # fmt: skip
        check(frozen, model, x)
    assert frozen(images((0, 3, 32, 32))).shape == (0, 10)


@pytest.mark.skipif(bool(_conv_cpu.lacks(torch.bfloat16)), reason="no bfloat16")
@pytest.mark.parametrize("channels", [1, 3, 4, 20])
def test_float_images_are_rounded_to_bfloat16_as_pytorch_does(channels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()).eval()
    x = images((2, channels, 6, 37)) * torch.logspace(-40, 3, 37)
    x[0, 0, 3, 3:6] = torch.tensor([float("nan"), float("inf"), -0.0])
    frozen = fastres.freeze(model, x, torch.bfloat16)
    for images_ in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, 1:, 3:36], x.transpose(2, 3), x[..., ::2]):
        y, expected = frozen(images_), frozen(images_.bfloat16())
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("cache, thread", [(1 << 20, 1 << 40), (1 << 40, (1 << 19) // torch.get_num_threads())])
def test_a_batch_in_several_passes_is_what_its_images_are_alone(cache, thread, monkeypatch):
    monkeypatch.setattr("fastres.frozen.program.cache_bytes", lambda: cache)
    monkeypatch.setattr("fastres.frozen.program.MOST_LIVE", thread)
    model, x = small(), images((13, 3, 32, 32))
    frozen = fastres.freeze(model, x)
    assert len(set(frozen.program(x.shape).chunks)) > 1 and max(frozen.program(x.shape).chunks) > 1
    check(frozen, model, x)
    y = frozen(x)
    for index in (0, 7, 12):
        assert torch.equal(frozen(x[index : index + 1])[0], y[index])


def test_values_that_are_not_finite_pass_as_in_the_model():
    model, x = small(), images((3, 3, 32, 32))
    frozen = fastres.freeze(model, x)
    x[0, 0, 5, 5], x[1, 2, 0, 31] = float("nan"), float("inf")
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(frozen(x).isnan(), expected.isnan()) and expected.isnan().any() and expected[2].isfinite().all()


def test_calls_from_many_threads():
    frozen = fastres.freeze(small(), images((2, 3, 32, 32)))
    inputs = [images((1 + n % 3, 3, 24 + 4 * (n % 4), 32), seed=n) for n in range(24)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def work(start):
        for n in range(start, start + 48):
            if not torch.equal(frozen(inputs[n % 24]), expected[n % 24]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_same_whether_threads_share_the_layers_or_the_images():
    model, x = small(), images((12, 3, 32, 32))
    frozen, threads, results = fastres.freeze(model, x), torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3, 5, 12):
            torch.set_num_threads(count)
            y, plan = frozen(x), frozen.program(x.shape)
            results[plan.parts] = results.get(plan.parts, y)
            assert torch.equal(y, results[1])
            assert plan.arena_bytes % plan.parts == 0 and max(plan.chunks) <= 12 // plan.parts
    finally:
        torch.set_num_threads(threads)
    assert set(results) == {1, 2, 3, 12}
    check(frozen, model, x)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_team_smaller_than_wished(limit):
    """OpenMP may give fewer threads than PyTorch asks for: each does several shares."""
    text = """import torch, fastres
torch.manual_seed(0)
x, model = torch.randn(3, 3, 32, 32), fastres.models.cifar.resnet(8).eval()
frozen = fastres.freeze(model, x)
torch.set_num_threads(4)
y = frozen(x)
torch.set_num_threads(1)
assert torch.equal(frozen(x), y)"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(limit), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", "import fastres.models.cifar\n" + text], env=environment, timeout=60)
    assert done.returncode == 0


def test_the_model_is_left_alone_and_no_longer_needed():
    model, x = small(), images((2, 3, 32, 32))
    model.layer1.train()
    before = copy.deepcopy(model.state_dict())
    frozen = fastres.freeze(model, x)
    assert model.layer1.training and not model.training and type(model) is models.cifar.CifarResNet
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    y = frozen(x)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(frozen(x), y)
    assert torch.equal(frozen(images((1, 3, 20, 20))), copy.deepcopy(frozen)(images((1, 3, 20, 20))))
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), y)
    assert not frozen.state_dict() and not frozen.training


def test_what_is_planned_later_is_of_the_weights_that_were_frozen():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval()
    frozen, x = fastres.freeze(model, images((1, 32, 3, 3))), images((1, 32, 16, 16))
    with torch.no_grad():
        y = model(x)
        model[0].weight.zero_()
        model[0].bias.add_(1)
    assert (frozen(x) - y).abs().max() < 1e-4  # another algorithm than that of the example's size


CONSTANT = torch.ones(2, 16, 6, 6)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function, why",
    [
        (torch.tanh, "aten.tanh"), (lambda y: y if y.sum() > 0 else -y, "reads a value"), (lambda y: (y, 1), "return tensors"),
        (lambda y: F.max_pool2d(y, 2, dilation=2), "max_pool2d"), (lambda y: y.view(-1, 16), "aten.view"),
        (lambda y: y + 1.0, "aten.add"), (lambda y: torch.ones(3), "ones"), (lambda y: y.flatten(1)[:, :4], "slice"),
        (lambda y: y[:, ::2].relu() + y[:, 8:], "slice"), (nn.Conv2d(16, 8, 3, groups=4), "groups"), (F.dropout, "dropout|bernoulli"),
        (lambda y: y + CONSTANT, "aten.add"), (lambda y: y.mean(), "aten.mean"),
        (lambda y: y.mean((2, 3), dtype=torch.float64), "dtype"), (lambda y: y.view(torch.int32), "aten.view"),
        (lambda y: y.mean((2, 3), keepdim=True).squeeze(), "squeeze"), (lambda y: y.mean((2, 3), keepdim=True).squeeze(3), "must return"),
        (lambda y: torch.addmm(torch.ones(4), y.mean((2, 3)), torch.ones(4, 16).t(), beta=0.5), "addmm"),
        (lambda y: torch.addmm(torch.ones(1), y.mean((2, 3)), torch.ones(4, 16).t()), "addmm"), (lambda y: y[:1], "must return|slice"),
        (lambda y: torch.add(y, y, out=torch.empty_like(y)), "empty_like|add"), (lambda y: torch.add(*F.max_pool2d(y, 2, return_indices=True)), "no step of a plan"),
    ],
)  # fmt: skip
def test_what_a_plan_cannot_do_is_refused(function, why):
    with pytest.raises(fastres.UnsupportedError, match=why):
        fastres.freeze(Function(function), images((2, 3, 8, 8)))


def test_additions_and_relus_of_flat_values():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 1), nn.Linear(5 * 6 * 7, 4)

        def forward(self, x):
            y = self.conv(x)
            return self.linear(F.relu(y.flatten(1) + F.relu(y).flatten(1)))

    model, x = Flat().eval(), images((2, 3, 6, 7))
    with torch.no_grad():
        assert_close_to_truth(fastres.freeze(model, x)(x), model(x), copy.deepcopy(model).double()(x.double()), x.dtype)


def test_writes_that_others_would_see_are_refused():
    def shared(y):
        view = y[:, :, :, :]
        return view.relu_() + y

    class InPlace(nn.Module):
        def forward(self, x):
            return x.relu_()

    for model in (Function(shared), InPlace()):
        with pytest.raises(fastres.UnsupportedError, match=r"writes into|no step|computes nothing"):
            fastres.freeze(model, images((2, 3, 8, 8)))


def test_bad_arguments():
    model, x = small(), images((1, 3, 32, 32))
    no_parameter = copy.deepcopy(model)
    with torch.no_grad():
        no_parameter.conv1.weight[0, 0, 0, 0] = float("inf")
    cases = [
        ((None, x), TypeError, "model"), ((model, None), TypeError, "example"), ((model, x.numpy()), TypeError, "example"),
        ((model, x[0]), ValueError, "4 dimensions"), ((model, x.double()), ValueError, "float32 or bfloat16"),
        ((model, x[:0]), ValueError, "not empty"), ((model, x.to_sparse()), ValueError, "strided"),
        ((model, x, torch.float16), ValueError, "dtype"), ((model.to("meta"), x), ValueError, "on the CPU"),
        ((no_parameter, x), fastres.UnsupportedError, "conv1 must be finite"),
    ]  # fmt: skip
    for arguments, kind, word in cases:
        with pytest.raises(kind, match=word):
            fastres.freeze(*arguments)
    frozen = fastres.freeze(small(), x)
    for bad, word in (
        (images((1, 4, 32, 32)), "3 channels"), (x[0], "4 dimensions"), (x.double(), "dtype"), (images((1, 3, 0, 32)), "non-empty"),
        (x.clone().requires_grad_(), "without gradient"), (torch.randint(9, (1, 3, 32, 32)), "dtype"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            frozen(bad)
    vgg = fastres.freeze(vision.vgg11_bn(num_classes=2).features, images((1, 3, 32, 32)))
    with pytest.raises(ValueError, match="fits layer"):
        vgg(images((1, 3, 8, 8)))
    for call in (frozen.train, frozen.half, lambda: frozen.to("cpu"), lambda: fastres.freeze(frozen, x)):
        with pytest.raises((fastres.UnsupportedError, ValueError), match="frozen"):
            call()
    assert frozen.eval() is frozen


def test_a_program_cannot_leave_its_memory():
    x = images((2, 3, 32, 32))
    frozen = fastres.freeze(small(), x)
    plan = frozen.program(x.shape)
    arena, ys = torch.empty(plan.arena_bytes, dtype=torch.uint8), [torch.empty(2, 1, 1, 10)]
    run = native.op("cpu_plan")
    run(x, plan.rows, plan.constants, arena, ys, plan.parts)
    for place, value in ((3, -7), (3, -1 << 63), (7, -4), (3, plan.arena_bytes), (7, plan.arena_bytes), (9, 99), (12, 4096), (13, 500), (15, 1 << 40),
                         (16, 4096), (18, 0), (20, 0), (26, 1 << 30)):  # fmt: skip
        rows = plan.rows.clone()
        rows[3, place] = value
        with pytest.raises(RuntimeError, match=r"fastres\.freeze: .* must be"):
            run(x, rows, plan.constants, arena, ys, plan.parts)
    rows = plan.rows.clone()
    rows[3, [15, 26, 27]] = torch.tensor([1, 1, int(rows[3, 12])])  # one output channel of as many groups as channels
    with pytest.raises(RuntimeError, match="a convolution in groups must be"):
        run(x, rows, plan.constants, arena, ys, plan.parts)
    good = {"x": x, "program": plan.rows, "constants": plan.constants, "arena": arena, "ys": ys, "parts": plan.parts}
    for bad in ({"x": x[:1]}, {"program": plan.rows[:, :-1].contiguous()}, {"constants": plan.constants[1:]},
                {"arena": arena[:-1]}, {"ys": []}, {"ys": [ys[0][:1]]}, {"ys": [ys[0].bfloat16()]}, {"parts": 0}, {"parts": 3}, {"parts": 4}):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"fastres\.freeze: .* must be"):
            run(**good | bad)


def test_explain_shows_every_step_and_times_it_on_an_input():
    x = images((2, 3, 32, 32))
    frozen = fastres.freeze(small(), x)
    report = fastres.explain(frozen)
    assert [step.op for step in report.steps][:3] == ["pad", "conv+relu", "conv+relu"]
    assert report.steps[2].name == "layer1.0.conv1" and all(step.ms is None for step in report.steps)
    timed = fastres.explain(frozen, images((1, 3, 40, 40))).to_dict()
    assert timed["shape"] == (1, 3, 40, 40) and all(step["ms"] > 0 for step in timed["steps"])
    assert "layer3.0.conv2" in str(report) and "conv+add+relu" in str(report)


def test_sizes_at_which_the_network_would_do_something_else_are_refused():
    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return self.last(F.adaptive_avg_pool2d(self.conv(x), 8))

    class TwoHalves(Adaptive):
        def forward(self, x):
            return F.max_pool2d(self.conv(x), 2) + self.conv(x)[:, :, ::2, ::2]

    for model, bad in ((Adaptive(), (1, 3, 9, 9)), (TwoHalves(), (1, 3, 9, 9))):
        x = images((1, 3, 8, 8))
        frozen = fastres.freeze(model.eval(), x)
        check(frozen, model, x)
        with pytest.raises(ValueError, match="fits layer"):
            frozen(images(bad))


def test_algorithms_are_chosen_for_each_size_by_itself():
    model, small_images, large = small(), images((1, 3, 8, 8)), images((1, 3, 64, 64))
    first, second = fastres.freeze(model, small_images), fastres.freeze(model, large)
    assert torch.equal(first(large), second(large)) and torch.equal(first(small_images), second(small_images))
