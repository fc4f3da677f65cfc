"""Single operations behind a convolution in a frozen network: those a plan has steps for, and those it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from tolerances import assert_close_to_truth
from torch import nn

import fastres
from fastres.ops import _conv_cpu

pytestmark = pytest.mark.cpu
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Behind(nn.Module):
    """A function of a convolution's output (2, 16, 6, 6), and of a batch norm of that many channels."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv, self.bn = function, nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.small, self.scale = nn.Conv2d(16, 24, 6), nn.Conv2d(16, 16, 1)
        self.line, self.square = nn.Conv1d(1, 1, 5, padding=4, dilation=2), nn.Linear(16, 16)

    def forward(self, x):
        return self.function(self, self.conv(x))


class Pointwise(nn.Module):
    """A function of the images' own values."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(F.max_pool2d(x, 1))


def statistics(m):
    return m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias


def bn_act(m, y, act):
    return fastres.functional.bn_act(y, *statistics(m), act=act)


def named(m, y):
    with torch.profiler.record_function("a range of a profile"):
        return m.bn(y)


def gate(m, y):
    """A factor for each channel of each image, by the image (Hu et al., *Squeeze-and-Excitation Networks*, 2018)."""
    return m.scale(y.mean((2, 3), keepdim=True)).sigmoid()


STEPS = {
    "channels gated": lambda m, y: y * gate(m, y),
    "channels gated, added to and cut at zero": lambda m, y: F.relu(gate(m, y) * y + m.bn(y)),
    "channels gated in place, behind a ReLU": lambda m, y: y.relu_().mul_(gate(m, y)).relu_(),
    "a gate that is no sigmoid": lambda m, y: y.add_(y * m.scale(F.adaptive_avg_pool2d(y, 1))),
    "a gate that gates a gate": lambda m, y: y * (gate(m, y) * gate(m, y.relu())),
    "two values gated alike": lambda m, y: (g := gate(m, y)) * y + g * m.bn(y),
    "probabilities": lambda m, y: m.small(y).flatten(1).sigmoid(),
    "a hard gate": lambda m, y: y * F.hardsigmoid(m.scale(y.mean((2, 3), keepdim=True))),
    "sigmoids gated": lambda m, y: (z := y.sigmoid()) * gate(m, z) + gate(m, y) * F.hardsigmoid(y),
    "hard gates of one pixel": lambda m, y: (z := m.small(y)) * F.hardsigmoid(z),
    "SiLU": lambda m, y: m.bn(F.silu(y)) + y,
    "SiLU in place of what others read": lambda m, y: F.silu(z := m.bn(y)) + m.scale(F.silu(z + y, inplace=True)),
    "sigmoids of pixels": lambda m, y: m.scale(y).sigmoid(),
    "hard swish": lambda m, y: F.relu(F.hardswish(m.bn(y)) + F.hardswish(y, inplace=True)),
    "leaky ReLUs": lambda m, y: m.bn(F.leaky_relu(y, 0.2)) + F.leaky_relu(y, inplace=True),
    "ReLU6": lambda m, y: m.bn(F.relu6(y)) + F.relu6(y.div_(m.bn.running_var.view(-1, 1, 1) * 0.1), inplace=True),
    "bounds": lambda m, y: F.hardtanh(F.hardtanh(m.bn(y)), -0.5, 0.25),
    "features bounded": lambda m, y: F.relu6(F.silu(m.small(y).flatten(1))),
    "what has a name for a profiler": named,
    "our batch norm": lambda m, y: bn_act(m, y, "relu"),
    "our batch norm without ReLU": lambda m, y: bn_act(m, y, "none"),
    "our batch norm and a residual": lambda m, y: fastres.functional.bn_add_act(y, y, *statistics(m)),
    "our batch norm and a residual without ReLU": lambda m, y: fastres.functional.bn_add_act(y, y, *statistics(m), act="none"),
    "our addition": lambda m, y: fastres.functional.add_act(y, m.bn(y)),
    "a batch norm of a value that has other users": lambda m, y: m.bn(y) + y,
    "a scale for each channel": lambda m, y: y * m.bn.weight.view(1, -1, 1, 1),
    "a shift and a scale in place": lambda m, y: y.add_(m.bn.bias.view(-1, 1, 1)).mul_(m.bn.weight[:1]),
    "a quotient": lambda m, y: y / m.bn.running_var[0],
    "a difference behind a ReLU": lambda m, y: y.relu() - m.bn.bias[:, None, None],
    "a shift behind a batch norm that others read": lambda m, y: (z := m.bn(y)) + (m.bn.bias[:, None, None] + z),
    "values brought to a mean and a deviation": lambda m, y: m.small(
        (y.relu() - m.bn.bias[:, None, None]) / m.bn.running_var[:, None, None]
    ),
    "weights that the network computes": lambda m, y: F.conv2d(y, m.small.weight / m.small.weight.std(), m.small.bias * 2),
    "a matrix without bias": lambda m, y: F.linear(y.flatten(1), m.small.weight.flatten(1)),
    "zeros for channels": lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 8)),
    "zeros for channels, then a part": lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 8))[:, :, ::2, ::2],
    "a part, then zeros for channels": lambda m, y: F.pad(y[:, :, ::2, ::3], (0, 0, 0, 0, 0, 8)),
    "rows alone": lambda m, y: y[:, :, ::2],
    "pixels squeezed": lambda m, y: m.small(y).squeeze(3).squeeze(2),
    "both pixels squeezed": lambda m, y: m.small(y).squeeze((2, 3)),
    "the mean as a pool": lambda m, y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "a pool to its own size": lambda m, y: F.adaptive_avg_pool2d(y, 6),
    "pools whose last window would lie in the padding": lambda m, y: F.max_pool2d(y, 2, 4, 1, ceil_mode=True),
    "an average of windows": lambda m, y: F.avg_pool2d(y, 2, ceil_mode=True),
    "a pool divided by a number": lambda m, y: F.avg_pool2d(y, 2, divisor_override=3),
    "a pool that counts its padding": lambda m, y: F.avg_pool2d(y, (3, 2), (2, 1), 1),
    "values side by side": lambda m, y: torch.cat([y, m.bn(y), m.scale(y).relu()], 1),
    "values side by side, one of them twice": lambda m, y: m.bn(torch.cat([y[:, :4], y[:, :8], y[:, 2:6]], 1)).relu(),
    "values side by side, one written to later": lambda m, y: torch.cat([torch.cat([y, m.bn(y)], 1), m.scale(y.relu_()), y], 1),
    "features side by side": lambda m, y: torch.cat([y.mean((2, 3)), m.small(y).flatten(1), m.bn(y).mean((2, 3))], 1).relu(),
    "parts of the channels": lambda m, y: torch.cat([part.relu() for part in reversed(y.chunk(3, 1))], 1),
    "parts of the channels of given sizes": lambda m, y: torch.add(*m.bn(y).split([5, 6, 5], 1)[::2]),
    "features convolved, as a gate": lambda m, y: (
        y * m.line(y.mean((2, 3)).view(2, 1, -1)).sigmoid().view(2, -1, 1, 1).expand_as(y)
    ),
    "features convolved, as the first factor": lambda m, y: m.line(
        F.adaptive_avg_pool2d(y, 1).view(2, 1, 16)
    ).sigmoid().reshape(2, 16, 1, 1).expand(-1, -1, 6, 6) * m.bn(y),
    "features convolved": lambda m, y: F.relu(m.small(y).flatten(1) + m.line(m.small(y).view(2, 1, 24)).view(2, 24)),
    "a gate of linear layers": lambda m, y: y * m.square(y.mean((2, 3))).sigmoid().view(2, 16, 1, 1).expand_as(y),
    "the last channels": lambda m, y: y[:, -3:],
    "channels of a part of the channels": lambda m, y: y[:, 2:-3][:, 1:7].relu(),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_computes_what_pytorch_does(name):
    torch.manual_seed(0)
    model = lively(Behind(STEPS[name])).eval()
    frozen = fastres.freeze(model, X)
    with torch.no_grad(), fastres.use("torch"):
        expected, exact = model(X), copy.deepcopy(model).double()(X.double())
        assert_close_to_truth(frozen(X), expected, exact, torch.float32, name)
        x = X.clone()
        x[1, :, 3, 3] = torch.nan
        assert torch.equal(frozen(x).isnan(), model(x).isnan())


REFUSED = {
    "a sum of images of other sizes, flattened": (
        lambda m, y: y[:, :, ::2].flatten(1) + y[:, :, :, ::2].flatten(1), "aten.add",
    ),
    "a pool that counts its padding up to a last window": (
        lambda m, y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True), "aten.avg_pool2d",
    ),
    "images one after the other": (lambda m, y: torch.cat([y, y]), "aten.cat"),
    "images above each other": (lambda m, y: torch.cat([y, y], 2), "aten.cat"),
    "flattened images side by side": (lambda m, y: torch.cat([y.flatten(1), y.flatten(1)], 1), "aten.cat"),
    "a parameter beside the images": (
        lambda m, y: torch.cat([y, m.bn.weight.view(1, 16, 1, 1).expand(2, 16, 6, 6)], 1), "aten.cat",
    ),
    "features expanded": (lambda m, y: y + y.mean((2, 3), keepdim=True).expand_as(y), "no step of a plan"),
    "features expanded, then convolved": (lambda m, y: m.small(y.mean((2, 3), keepdim=True).expand_as(y)), "no step of a plan"),
    "features convolved with a stride": (
        lambda m, y: F.conv1d(y.mean((2, 3)).view(2, 1, 16), m.line.weight, stride=2), "convolution",
    ),
    "pixels convolved in a line": (
        lambda m, y: y + F.conv1d(y.flatten(1).view(2, 1, -1), m.line.weight, padding=2).view(2, 16, 6, 6),
        "convolution|aten.view",
    ),
    "features in a line, side by side": (lambda m, y: torch.cat([y.mean((2, 3)).view(2, 1, 16)] * 2, 1), "aten.cat"),
    "halves of the images": (lambda m, y: torch.add(*y.chunk(2, 2)), "aten.slice"),
    "every other channel": (lambda m, y: y[:, ::2], "aten.slice"),
    "a pool to another size": (lambda m, y: F.adaptive_avg_pool2d(y, 3), "adaptive_avg_pool2d"),
    "a matrix that the network computes": (
        lambda m, y: torch.addmm(m.bn.bias[:2], y.mean((2, 3)), y.mean((2, 3)).t()), "aten.addmm|aten.t",
    ),
    "a scale for each pixel": (lambda m, y: y * m.small.weight[0, :, :, :], "aten.mul"),
    "a random scale": (lambda m, y: y * torch.rand_like(m.bn.weight)[:, None, None], "aten.rand_like|aten.mul"),
    "a scale that the images give": (lambda m, y: y * y.mean((0, 2, 3), keepdim=True), "aten.mul"),
    "a gate for each pixel": (lambda m, y: y * y.sigmoid(), "aten.mul"),
    "one gate for all channels": (lambda m, y: y * gate(m, y).mean(1, keepdim=True), "aten.mean|aten.mul"),
    "a gate of as many pixels": (lambda m, y: y * F.relu(y), "aten.mul"),
    "a number": (lambda m, y: y * 2, "aten.mul"),
    "a quotient without its remainder": (lambda m, y: torch.div(y, m.bn.running_var[0], rounding_mode="floor"), "aten.div"),
    "a part of the weights that the images choose": (
        lambda m, y: y * m.bn.weight[y.mean((0, 2, 3)).long().clamp(0, 15)][:, None, None], "aten.mul|dtype",
    ),
    "a view of a parameter, written": (lambda m, y: y * m.bn.weight.view(-1, 1, 1).mul_(1), "into its input or its parameters"),
    "a pad of pixels": (lambda m, y: F.pad(y, (1, 1)), "aten.constant_pad_nd"),
    "a pad that is not zero": (lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 8), value=1.0), "aten.constant_pad_nd"),
    "a norm with computed parameters": (
        lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, y.mean((0, 2, 3))), "aten.mean|batch_norm",
    ),
    "a norm by its own batch": (lambda m, y: F.batch_norm(y, None, None, training=True), "batch_norm"),
    "parts of the channels, written": (lambda m, y: y.split(8, 1)[1].relu_(), "memory that a view shares"),
    "a part of the rows": (lambda m, y: y[:, :, 1:], "aten.slice"),
    "a transposed convolution": (lambda m, y: F.conv_transpose2d(y, m.small.weight.permute(1, 0, 2, 3)), "convolution"),
    "nothing": (lambda m, y: m.bn.weight.expand(2, 16), "plan|nothing|step"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_step_does_is_named(name):
    function, words = REFUSED[name]
    with pytest.raises(fastres.UnsupportedError, match=words):
        fastres.freeze(Behind(function).eval(), X)


FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_of_all_sorts_of_numbers(name, dtype):
    """Of those that are not finite, zeros and subnormals too, and wherever in a vector they lie."""
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    inf, least, largest = torch.inf, torch.finfo(dtype).tiny, torch.finfo(dtype).max
    special = [0.0, -0.0, inf, -inf, torch.nan, least, -least, least / 8, -least / 8, largest, -largest]
    special += [3.0, -3.0, 88.8, -88.8, -104.0]
    x = torch.cat([torch.tensor(special), torch.linspace(-95, 95, 1011), 3 * X.flatten()[:300]])[: 3 * 17 * 26]
    x = x.to(dtype).view(1, 3, 17, -1)
    frozen = fastres.freeze(Pointwise(FUNCTIONS[name]), X, dtype)
    y, expected, exact = frozen(x), FUNCTIONS[name](x), FUNCTIONS[name](x.double())
    for same in (torch.isnan, torch.isinf):
        assert torch.equal(same(y), same(expected))
    zeros = expected == 0
    assert torch.equal(y[zeros], expected[zeros]) and torch.equal(y[zeros].signbit(), expected[zeros].signbit())
    usual = exact.isfinite() & (exact.abs() > least) & (x.abs() < 85)
    assert_close_to_truth(y[usual], expected[usual], exact[usual], dtype, name)
    far = ((y.double() - exact).abs() / exact.abs())[usual].max()
    assert far <= 2 * ((expected.double() - exact).abs() / exact.abs())[usual].max() + 2 * torch.finfo(dtype).eps
