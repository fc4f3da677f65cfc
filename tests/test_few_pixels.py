"""Convolutions of few pixels and their gradients: any geometry, accuracy, threads, what is not finite, refusals, choices."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth
from torch import nn

import fastres
import fastres.nn as fnn
from fastres.errors import UnsupportedError
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cpu

pytestmark = pytest.mark.cpu
LAST = torch.channels_last
# Images, channels, height, width, output channels, kernel, stride, padding, dilation.
GEOMETRIES = {
    "one pixel": (3, 64, 1, 1, 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3": (2, 80, 4, 3, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride": (5, 16, 4, 5, 16, (3, 3), (2, 1), (1, 0), (1, 1)),
    "1x1": (7, 112, 2, 2, 80, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, stride": (2, 32, 7, 5, 16, (1, 1), (2, 3), (0, 0), (1, 1)),
    "dilated beyond the image": (1, 16, 2, 3, 16, (3, 3), (1, 1), (4, 4), (4, 4)),
    "5x2": (2, 48, 6, 7, 64, (5, 2), (1, 2), (3, 1), (1, 2)),
}


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """With AMX other kernels take more of the calls in bfloat16; these are right there too."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def library(dtype=torch.float32):
    """The native ops: of the output, and of the gradients of x and of the weights."""
    reason = native.why_not("cpu_conv_inner") or _conv_cpu.lacks(dtype)
    if reason:
        pytest.skip(reason)
    return [native.op(f"cpu_conv_{name}") for name in ("inner", "outer_input", "outer_weight")]


def draw(case, pick, dtype=torch.float32):
    """The gradient of the output, x, the weights, and the geometry behind the kernel."""
    n, channels, height, width, out_channels, kernel, *geometry = case
    x, weight = pick(n, channels, height, width), pick(out_channels, channels, *kernel)
    grad_y = pick(*F.conv2d(x, weight, None, *geometry).shape)
    return *(t.to(dtype).contiguous(memory_format=LAST) for t in (grad_y, x, weight)), geometry


def small(low=-4):
    """Integers whose sums float32 holds."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(low, 5, shape, generator=g).float()


def normal():
    g = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=g)


def results(grad_y, x, weight, geometry):
    """The output, and the gradients of x and of the weights, by the native ops."""
    forward, of_input, of_weight = library(x.dtype)
    of_both = of_input(grad_y, weight, x.shape[2:], *geometry), of_weight(grad_y, x, weight.shape[2:], *geometry)
    return forward(x, weight, *geometry), *of_both


def references(grad_y, x, weight, geometry, dtype=None):
    grad_y, x, weight = (t.to(dtype or t.dtype) for t in (grad_y, x, weight))
    y = REGISTRY["conv"].reference(x, weight, None, *geometry, 1)
    of_input = REGISTRY["conv_backward_input"].reference(grad_y, weight, tuple(x.shape[2:]), *geometry, 1)
    return y, of_input, REGISTRY["conv_backward_weight"].reference(grad_y, x, tuple(weight.shape[2:]), *geometry, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_exact_on_small_integers(case, dtype):
    library(dtype)
    operands = draw(case, small(), dtype)
    for found, exact in zip(results(*operands), references(*operands, torch.float64), strict=True):
        assert found.dtype == dtype and found.is_contiguous(memory_format=LAST)
        assert torch.equal(found, exact.to(dtype))


def test_long_sums_keep_the_accuracy_of_short_ones():
    operands = draw((128, 64, 1, 1, 1024, (1, 1), (1, 1), (0, 0), (1, 1)), normal())
    plain, exact = references(*operands), references(*operands, torch.float64)
    for found, same, truth in zip(results(*operands), plain, exact, strict=True):
        assert_close_to_truth(found, same, truth, torch.float32)


def test_the_same_bits_for_any_number_of_threads():
    operands = draw((4, 272, 3, 3, 144, (3, 3), (1, 1), (1, 1), (1, 1)), normal())
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(results(*operands))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, one, found[0])) for one in found)


@pytest.mark.parametrize("value", (torch.inf, torch.nan))
@pytest.mark.parametrize("place", range(3), ids=("grad_y", "x", "weight"))
def test_what_is_not_finite_goes_where_it_goes_in_torchs_float32_and_padding_is_not_multiplied(place, value):
    operands = draw(GEOMETRIES["3x3"], small(low=1))
    operands[place][0, 0, 0, 0] = value
    read = [place != 0, place != 1, place != 2]  # by the output, by x's gradient, by that of the weights
    for found, plain, reads in zip(results(*operands), references(*operands), read, strict=True):
        assert torch.equal(found.isnan(), plain.isnan()) and torch.equal(found.nan_to_num(), plain.nan_to_num())
        assert found.isfinite().any() and found.isfinite().all() != reads


def test_the_native_ops_check_for_themselves():
    forward, of_input, of_weight = library()
    grad_y, x, weight, geometry = draw(GEOMETRIES["3x3"], small())
    kernel, size = (3, 3), (4, 3)
    for run, args, words in (
        (forward, (x.contiguous(), weight, *geometry), "dense in channels_last"),
        (forward, (x, weight.contiguous(), *geometry), "dense in channels_last"),
        (forward, (x, weight.bfloat16(), *geometry), "of x's dtype"),
        (forward, (x[:, :64].contiguous(memory_format=LAST), weight, *geometry), "for its 64 channels"),
        (forward, (x, weight[:20], *geometry), "rows in whole vectors"),
        (forward, (x, weight, geometry[0], (0, 2**40), geometry[2]), "two numbers from 0"),
        (forward, (x, weight, *geometry[:2], (9, 9)), "no larger than the padded input"),
        (of_weight, (grad_y, x.contiguous(), kernel, *geometry), "dense in channels_last"),
        (of_weight, (grad_y.double(), x.double(), kernel, *geometry), "float32 or bfloat16"),
        (of_weight, (grad_y.bfloat16(), x, kernel, *geometry), "of x's dtype"),
        (of_weight, (grad_y[:1], x, kernel, *geometry), "of the output's shape"),
        (of_weight, (grad_y, x, (9, 9), *geometry), "no larger than the padded input"),
        (of_weight, (grad_y, x, kernel, (0, 1), *geometry[1:]), "two numbers from 1"),
        (of_weight, (grad_y, x, kernel, geometry[0], (1, 2**40), geometry[2]), "two numbers from 0"),
        (of_weight, (grad_y, x[:, :8].contiguous(memory_format=LAST), kernel, *geometry), "whole vectors"),
        (of_input, (grad_y, weight.contiguous(), size, *geometry), "dense in channels_last"),
        (of_input, (grad_y, weight[:16], size, *geometry), "for its 32 channels"),
        (of_input, (grad_y, weight.bfloat16(), size, *geometry), "of grad_y's dtype"),
        (of_input, (grad_y, weight, (5, 3), *geometry), "of the output's shape"),
        (of_input, (grad_y, weight, (0, 3), *geometry), "two numbers from 1"),
        (of_input, (grad_y, weight, (2**40, 3), *geometry), "two numbers from 1"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(*args)


def backends(x, weight, stride, padding):
    geometry = stride, padding, (1, 1), 1
    grad_y = F.conv2d(x, weight, None, *geometry[:3])
    return [
        REGISTRY["conv"].explain(x, weight, None, *geometry).backend.name,
        REGISTRY["conv_backward_input"].explain(grad_y, weight, tuple(x.shape[2:]), *geometry).backend.name,
        REGISTRY["conv_backward_weight"].explain(grad_y, x, tuple(weight.shape[2:]), *geometry).backend.name,
    ]


def test_they_are_chosen_for_few_pixels_and_many_weights():
    library()
    weight = torch.zeros(128, 128, 3, 3).contiguous(memory_format=LAST)
    x = torch.zeros(2, 128, 3, 3).contiguous(memory_format=LAST)
    assert backends(x, weight, (1, 1), (1, 1)) == ["cpu", "cpu", "cpu"]
    assert backends(torch.zeros(2, 128, 4, 4).contiguous(memory_format=LAST), weight, (1, 1), (1, 1)) == ["torch", "cpu", "cpu"]
    assert backends(x.bfloat16(), weight.bfloat16(), (1, 1), (1, 1))[0] == "torch"
    assert backends(x[:, :, :1, :1].bfloat16(), weight.bfloat16(), (1, 1), (1, 1)) == ["cpu", "cpu", "cpu"]
    assert backends(x, weight.contiguous(), (1, 1), (1, 1)) == ["torch", "torch", "cpu"]
    assert backends(x, torch.zeros(512, 128, 1, 1), (1, 1), (0, 0)) == ["cpu", "torch", "cpu"]  # of 18 pixels
    assert backends(x[:1], torch.zeros(512, 128, 1, 1), (2, 2), (0, 0)) == ["cpu", "cpu", "cpu"]
    assert backends(x.contiguous(), weight.contiguous(), (1, 1), (1, 1)) == ["torch", "torch", "torch"]
    assert backends(x[:, :16].contiguous(memory_format=LAST), weight[:16, :16], (1, 1), (1, 1)) == ["torch", "torch", "torch"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_block_on_tiny_images_trains_as_torch_does(dtype):
    library(dtype)
    torch.manual_seed(3)
    shortcut = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    block = fnn.BasicBlock(64, 128, 2, shortcut).to(memory_format=LAST)
    x = torch.randn(6, 64, 5, 5).contiguous(memory_format=LAST)
    found = {}
    runs = ("own", torch.float32, {}), ("plain", torch.float32, {"conv": "torch"}), ("exact", torch.float64, {})
    for name, kind, choice in runs:
        block.to(kind).zero_grad()
        with fastres.use(**choice), torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and name != "exact"):
            y = block(x.to(kind))
        y.float().square().sum().backward()
        found[name] = {key: p.grad for key, p in block.named_parameters()}
    for key, exact in found["exact"].items():
        assert_close_to_truth(found["own"][key], found["plain"][key], exact, dtype, key)


def test_a_network_down_to_one_pixel_compiles_and_has_the_gradients_of_its_own_calls():
    """Images of one pixel lie in memory as contiguous ones do, and as those in channels_last."""
    library()
    torch.manual_seed(4)
    layers = nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3, 1, 1)
    network = fastres.optimize(nn.Sequential(*layers))
    x, found = torch.randn(3, 64, 2, 2), []
    for run in (network, torch.compile(network, backend="aot_eager"), copy.deepcopy(network).double()):
        run.zero_grad()
        run(x.to(next(run.parameters()).dtype)).square().sum().backward()
        found.append([p.grad for p in run.parameters()])
    for own, compiled, exact in zip(*found, strict=True):
        assert_close_to_truth(own, compiled, exact, torch.float32)
    assert network[3].weight.grad.stride() == network[3].weight.stride()


def test_no_images_have_gradients_of_zeros():
    library()
    x = torch.zeros(0, 128, 2, 2).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(128, 128, 3, 3).contiguous(memory_format=LAST).requires_grad_()
    fastres.functional.conv2d(x, weight, padding=1).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


def test_without_groups_only():
    x = torch.zeros(1, 512, 2, 2).contiguous(memory_format=LAST)
    grad_y = F.conv2d(x, torch.zeros(512, 256, 3, 3), None, 1, 1, 1, 2)
    args = grad_y, x, (3, 3), (1, 1), (1, 1), (1, 1), 2
    assert REGISTRY["conv_backward_weight"].explain(*args).backend.name == "torch"
    with fastres.use(conv_backward_weight="cpu"), pytest.raises(UnsupportedError, match="group"):
        REGISTRY["conv_backward_weight"](*args)
