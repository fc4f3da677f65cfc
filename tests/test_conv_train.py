"""A training step's convolutions on the CPU: Winograd forward and backward, autocast, layouts, what is not finite, explain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth
from torch import nn

import fastres
import fastres.nn as fnn
from fastres import functional
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cpu

pytestmark = pytest.mark.cpu
LAST = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """With AMX, bfloat16 is left to PyTorch: the kernels are right there too."""
    native.load()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def needs(dtype):
    if native.why_not("cpu_conv") or _conv_cpu.lacks(dtype):
        pytest.skip(native.why_not("cpu_conv") or _conv_cpu.lacks(dtype))


def draw(seed, dtype):
    """x, weight, the gradient of the output and the padding of a convolution that is worth a transform."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=g)]

    padding = (pick(0, 1, 2), pick(0, 1, 2))
    x = torch.randn(pick(4, 7), pick(16, 32, 48, 64, 80, 272), pick(9, 10, 13), pick(8, 11, 14), generator=g)
    weight = torch.randn(pick(16, 32, 48, 64, 96, 144), x.shape[1], 3, 3, generator=g) / (9 * x.shape[1]) ** 0.5
    y = F.conv2d(x, weight, None, 1, padding)
    grad_y = torch.randn(y.shape, generator=g)
    weight = weight.contiguous(memory_format=pick(LAST, torch.contiguous_format))
    return x.to(dtype, memory_format=LAST), weight.to(dtype), grad_y.to(dtype, memory_format=LAST), padding


def results(convolve, x, weight, grad_y, padding, bias=None):
    """The output and all gradients."""
    given = [t for t in (x, weight, bias) if t is not None]
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    y = convolve(*tensors[:2], tensors[2] if bias is not None else None, 1, padding)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad_y)]


def chosen(x, weight, padding):
    """The backends of the convolution and of its gradients by the input and the weights."""
    geometry = ((1, 1), padding, (1, 1), 1)
    grad_y = F.conv2d(x, weight, None, 1, padding)
    return [
        REGISTRY["conv"].explain(x, weight, None, *geometry).backend.name,
        REGISTRY["conv_backward_input"].explain(grad_y, weight, tuple(x.shape[2:]), *geometry).backend.name,
        REGISTRY["conv_backward_weight"].explain(grad_y, x, (3, 3), *geometry).backend.name,
    ]


SMALL = [(128, 64, 2, 64), (64, 32, 2, 48), (130, 16, 8, 16), (65, 16, 4, 32)]  # images, channels, side, output channels


def small(n, channels, side, out_channels, dtype):
    """A layer of a network for small images."""
    g = torch.Generator().manual_seed(n)
    x, grad_y = (torch.randn(n, c, side, side, generator=g) for c in (channels, out_channels))
    weight = (torch.randn(out_channels, channels, 3, 3, generator=g) / (9 * channels) ** 0.5).to(dtype)
    return x.to(dtype, memory_format=LAST), weight, grad_y.to(dtype, memory_format=LAST), (1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*range(12), *SMALL])
def test_any_shape(case, dtype):
    needs(dtype)
    x, weight, grad_y, padding = small(*case, dtype) if isinstance(case, tuple) else draw(case, dtype)
    assert chosen(x, weight, padding) == ["cpu"] * 3
    bias = torch.linspace(-1, 1, len(weight)).to(dtype)
    own = results(functional.conv2d, x, weight, grad_y, padding, bias)
    same = results(F.conv2d, x, weight, grad_y, padding, bias)
    truth = results(F.conv2d, x.double(), weight.double(), grad_y.double(), padding, bias.double())
    for what, *tensors in zip(("y", "grad x", "grad weight", "grad bias"), own, same, truth, strict=True):
        assert_close_to_truth(*tensors, dtype, f"{what} of {tuple(x.shape)} by {tuple(weight.shape)}, {padding}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [lambda dtype: draw(3, dtype), lambda dtype: small(*SMALL[2], dtype)])
def test_the_same_bits_for_any_number_of_threads_and_every_time(make, dtype):
    needs(dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(results(functional.conv2d, *make(dtype)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("which", ["x", "weight", "grad_y"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stands_where_it_stands_in_torch(dtype, which, value):
    needs(dtype)
    x, weight, grad_y, padding = draw(1, dtype)
    {"x": x, "weight": weight, "grad_y": grad_y}[which][1, 2, 1, 1] = value
    own, same = (results(run, x, weight, grad_y, padding) for run in (functional.conv2d, F.conv2d))
    for a, b in zip(own, same, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


def test_what_is_refused_says_why():
    needs(torch.float32)
    x, weight = torch.randn(4, 32, 8, 8).contiguous(memory_format=LAST), torch.randn(32, 32, 3, 3)

    def reason(x=x, weight=weight, **geometry):
        choice = fastres.explain(lambda *args: functional.conv2d(*args, **{"padding": 1, **geometry}), x, weight)
        return choice.refusals["cpu"]

    assert "channels_last" in reason(x.contiguous())
    assert "3x3 kernels with stride 1" in reason(stride=2) and "3x3" in reason(weight=torch.randn(32, 32, 1, 1))
    assert "do not repay" in reason(x[:1])
    assert "multiples of 16" in reason(weight=torch.randn(40, 32, 3, 3)) and "2 or at least 4" in reason(x[:, :, :3, :3])
    assert "so many pixels" in reason(torch.empty(1, 16, 400, 400).to(memory_format=LAST), torch.empty(16, 16, 3, 3))
    assert "float64" in reason(x.double(), weight.double())
    with fastres.use(conv="torch"):
        assert chosen(x, weight, (1, 1)) == ["torch"] * 3
    with fastres.use(conv="cpu"), pytest.raises(fastres.UnsupportedError, match="do not repay"):
        functional.conv2d(x[:1], weight, padding=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_block_trains_as_torch_in_either_layout(layout):
    torch.manual_seed(0)
    block = fnn.BasicBlock(32, 32).to(memory_format=layout)
    plain, double = copy.deepcopy(block), copy.deepcopy(block).double()
    x = torch.randn(8, 32, 10, 10).contiguous(memory_format=layout)
    with fastres.use("torch"):
        expected, truth = steps(plain, x), steps(double, x.double())
    for name, value in steps(block, x).items():
        assert_close_to_truth(value, expected[name], truth[name], torch.float32, name)


def steps(model, x, count=4):
    """The parameters and buffers after a few steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(count):
        optimizer.zero_grad()
        (model(x) * torch.linspace(-1, 1 + step, x.shape[3], dtype=x.dtype)).square().mean().backward()
        optimizer.step()
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def test_autocast_casts_as_torch_does():
    needs(torch.bfloat16)
    torch.manual_seed(0)
    layer = fnn.ConvBNAct2d(32, 64).to(memory_format=LAST)
    x = torch.randn(8, 32, 9, 9).contiguous(memory_format=LAST).requires_grad_()
    outputs = []
    for choice in (None, "torch"):
        with fastres.use(conv=choice), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        outputs.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.conv.weight))))
    double = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    y64 = double(x64)
    truth = (y64, *torch.autograd.grad(y64.square().sum(), (x64, double.conv.weight)))
    for own, same, exact in zip(*outputs, truth, strict=True):
        assert own.dtype == same.dtype and not torch.equal(own, same)
        assert_close_to_truth(own, same, exact, torch.bfloat16)


def test_autocast_to_another_dtype_and_hooks_are_left_to_torch():
    layer = fnn.ConvBNAct2d(32, 64).to(memory_format=LAST)
    x = torch.randn(8, 32, 9, 9).contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.float16):
        assert layer.conv(x).dtype == layer(x).dtype == torch.float16
    seen = []
    layer.conv.register_forward_hook(lambda *_: seen.append(1))
    layer(x)
    assert seen == [1]


def test_double_backward_runs_torchs_formula():
    x, weight = torch.randn(1, 32, 16, 16).contiguous(memory_format=LAST), torch.randn(32, 32, 3, 3) / 17
    found = []
    for convolve in (functional.conv2d, F.conv2d):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        grads = torch.autograd.grad(convolve(*leaves, None, 1, 1).square().sum(), leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(penalty, leaves))
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    grads = torch.autograd.grad(F.conv2d(*leaves, None, 1, 1).square().sum(), leaves, create_graph=True)
    truth = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
    for own, same, exact in zip(*found, truth, strict=True):
        assert_close_to_truth(own, same, exact, torch.float32)


def test_explain_tells_where_it_runs():
    needs(torch.float32)
    shortcut = nn.Sequential(nn.Conv2d(32, 64, 1, 2), nn.BatchNorm2d(64))
    model = nn.Sequential(fnn.BasicBlock(32, 32), fnn.BasicBlock(32, 64, 2, shortcut))
    fastres.optimize(model.train())
    report = fastres.explain(model, torch.randn(4, 32, 16, 16))
    # not the one of stride 2, nor the 1x1
    choices = [choice for module in report.modules for step in module.steps for choice in step.choices]
    assert [choice.op for choice in choices if choice.backend.name == "cpu"].count("conv") == 3
    assert any("conv: cpu" in note for note in report.notes)


@pytest.mark.parametrize("arguments, match", [
    (lambda x, w: (x, w.double()), "of x's dtype"),
    (lambda x, w: (x, w[:, :16]), "16 channels"),
    (lambda x, w: (x[0], w), "4 dimensions"),
])  # fmt: skip
def test_errors_name_the_argument(arguments, match):
    x, weight = torch.randn(4, 32, 8, 8), torch.randn(32, 32, 3, 3)
    with pytest.raises(fastres.ArgumentError, match=match):
        functional.conv2d(*arguments(x, weight), padding=1)


def test_the_native_ops_check_for_themselves():
    needs(torch.float32)
    conv, weight_grad = native.op("cpu_conv"), native.op("cpu_conv_backward_weight")
    x, weight = torch.randn(4, 32, 8, 8).contiguous(memory_format=LAST), torch.randn(32, 32, 3, 3)
    for args, match in (
        ((x.contiguous(), weight, [1, 1], False), "channels_last"),
        ((x, weight.double(), [1, 1], False), "dtype"),
        ((x, weight[:, :16], [1, 1], False), "32 channels"),
        ((x, weight, [1], False), "padding"),
        ((x[:, :, :1].contiguous(memory_format=LAST), weight, [0, 1], False), "padding"),
        ((x[:, :9].contiguous(memory_format=LAST), weight, [1, 1], False), "whole vectors"),
    ):
        with pytest.raises(RuntimeError, match=match):
            conv(*args)
    with pytest.raises(RuntimeError, match="pixels"):
        weight_grad(x, x, [0, 0])
