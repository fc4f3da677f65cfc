"""Convolutions that find the statistics of their output: the kernel on a GPU as built, else executed on the CPU (see
_cuda_on_cpu.py)."""

import itertools

import _hopper
import pytest
import torch
import torch.nn.functional as F
from _cuda_calls import laid_out
from _hopper import CL, DTYPES, integers
from test_sm90_wide import CASES, ONE
from tolerances import assert_close_to_truth

from fastres import budget
from fastres.ops import REGISTRY, _conv_wide, conv_statistics

OP = REGISTRY["conv_statistics"]
ODD = "tails of channels, images that end inside a chunk"
FEW = (
    "few channels", ODD, "one row, one column", "1x1 of one step, many tiles, two blocks share x",
    "3x3 stride 2, by tap, partial depth",
)  # fmt: skip


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


def find(x, weight, geometry):
    packed = weight.permute(0, 2, 3, 1).contiguous()
    return torch.ops.fastres_C.sm90_conv_wide_statistics(x, packed, *geometry)


def exact_statistics(y):
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    return mean, var


def assert_statistics(found, y, dtype, what):
    """Of y as it is stored: against float64, held against what PyTorch's batch norm finds."""
    exact, same = exact_statistics(y), conv_statistics._statistics(y)
    spreads = budget.spreads("conv_statistics", (), (y, *exact))[1:]
    for actual, torch_same, truth, spread in zip(found, same, exact, spreads, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_truth(actual, torch_same, truth, torch.float32, what, spread)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_what_is_stored(device, dtype, name):
    """y to the bit, of sums that float holds and y rounds; the statistics, twice, of no more and no fewer pixels."""
    case = CASES[name]._replace(residual=False)
    (x, weight, _, _), _ = integers(case, dtype, device)
    weight = weight * 37
    y, *found = find(x, weight, case.geometry)
    exact = F.conv2d(x.double(), weight.double(), None, *case.geometry)
    assert torch.equal(y, exact.to(dtype)) and (dtype == torch.float16 or not torch.equal(y, exact))
    assert y.is_contiguous(memory_format=CL)
    assert_statistics(found, y, dtype, name)
    assert all(map(torch.equal, found, find(x, weight, case.geometry)[1:]))


def identity(*shape, dtype, device):
    """A weight of 1x1 that leaves its input as it is."""
    return torch.eye(shape[1], dtype=dtype, device=device)[:, :, None, None].contiguous(memory_format=CL)


def through(values):
    """y, mean and var where y is a copy of the values."""
    weight = identity(*values.shape, dtype=values.dtype, device=values.device)
    y, *found = find(values.contiguous(memory_format=CL), weight, (ONE, (0, 0), ONE))
    assert torch.equal(y, values)
    return y, found


@pytest.mark.parametrize("dtype", DTYPES)
def test_found_statistics_are_accurate(device, dtype):
    """Means far from 0, a channel of one value, two values, numbers whose sum float cannot hold."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 8, 13, 17, generator=generator, dtype=torch.float64)
    values[:, 0] += 1000
    values[:, 1] = values[:, 1] * 0.01 - 40
    values[:, 2] = 3.140625
    values[:, 3] *= 1e-4
    values[:, 4] = values[:, 4].sign() * 2.0**15
    if dtype == torch.bfloat16:
        values[:, 5] = 1e38
    y, found = through(values.to(device, dtype))
    finite = torch.arange(8) != 5 if dtype == torch.bfloat16 else torch.arange(8) >= 0  # squares of its own are no floats
    assert_statistics([t.cpu()[finite] for t in found], y.cpu()[:, finite], dtype, "accuracy")
    assert found[0][2] == 3.140625 and found[1][2] == 0
    assert found[0].isfinite().all()
    y, found = through(values[:2, :, :1, :1].to(device, dtype))
    assert_statistics(found, y, dtype, "two values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_what_is_not_finite(device, dtype):
    """One value too large for its type, in one channel; a channel of NaN; one pixel of NaN, in all of them."""
    x = torch.randn(3, 16, 9, 19, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    weight = identity(*x.shape, dtype=dtype, device=device)
    x[2, 3, 8, 18], weight[3, 3], weight[5, 5] = torch.finfo(dtype).max / 2, 4, torch.nan
    for nan in (False, True):
        if nan:
            x[1, 7, 2, 4] = torch.nan
        y, *found = find(x.contiguous(memory_format=CL), weight, (ONE, (0, 0), ONE))
        found = [t.cpu() for t in found]  # on a GPU PyTorch's mean of infinity is NaN or not, as its threads meet it
        for actual, expected in zip(found, conv_statistics._statistics(y.cpu()), strict=True):
            assert budget.same_classes(actual, expected)
        assert found[1].isnan().nonzero().flatten().tolist() == (list(range(16)) if nan else [3, 5])
        assert nan or found[0][3] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype):
    """Of x, of y, and of the statistics: none is read, none written."""
    case = CASES[ODD]._replace(residual=False)
    (x, weight, _, _), _ = integers(case, dtype, device)
    memory = torch.full((x.numel() + 4096,), torch.nan, dtype=dtype, device=device)
    inside = torch.as_strided(memory, x.shape, x.stride(), 2048).copy_(x)
    found = find(inside, weight, case.geometry)
    assert all(map(torch.equal, found, find(x, weight, case.geometry)))
    assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_keeps_the_budget(device, dtype):
    """Packing and alignment: every sample that the backend takes."""
    taken = []
    for sample, shifted in itertools.product(OP.samples(device, dtype), (False, True)):
        x, weight, *geometry = laid_out(sample.args, "channels_last")
        if _conv_wide.why_not_arguments(x, weight, *geometry):
            continue
        if shifted:  # by one element: not aligned; and weights that are not channels_last
            memory = torch.empty(x.numel() + 8, dtype=dtype, device=device)
            x, weight = torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x), weight.contiguous()
        args = (x, weight, *geometry)
        exact = OP.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        same, spreads = OP.reference(*args), budget.spreads(OP.name, args, exact)
        for found in zip(_conv_wide.run_statistics(*args), same, exact, spreads, strict=True):
            assert_close_to_truth(*found[:3], dtype, sample.label, found[3])
        taken.append(sample.label)
    assert {"1x1", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 dilated"} <= set(taken)


@pytest.mark.compile
def test_what_is_unsafe_raises():
    device = _hopper.device("emulated")
    case = CASES[ODD]
    (x, weight, _, _), _ = integers(case, torch.float16, device)
    geometry = case.geometry
    for args, text in (
        ((x.float(), weight, geometry), "x must be float16 or bfloat16"),
        ((x.contiguous(), weight, geometry), "x must be of 4 dimensions .* channels_last"),
        ((x, weight.bfloat16(), geometry), "weight must be of x's dtype"),
        ((x, weight[:12], geometry), "weight must be of multiples of 8 channels"),
        ((x, weight, ((9, 1), *geometry[1:])), "stride must be two integers from 1 to 8"),
        ((x, weight, (ONE, ONE, (9, 9))), "weight must be no larger"),
    ):
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_statistics: .*{text}.*, got "):
            find(*args)
