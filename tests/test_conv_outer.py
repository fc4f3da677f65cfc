"""The weight gradient of few pixels as outer products: geometry, threads, what is not finite, refusals, where it is chosen."""

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


def library(dtype=torch.float32):
    reason = native.why_not("cpu_conv_outer_products") or _conv_cpu.lacks(dtype)
    if reason:
        pytest.skip(reason)
    return native.op("cpu_conv_outer_products")


def integers(case, dtype, low=-4):
    n, channels, height, width, out_channels, *geometry = case
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(low, 5, shape, generator=g).to(dtype).contiguous(memory_format=LAST)

    x = draw(n, channels, height, width)
    weight = torch.zeros(out_channels, channels, *geometry[0])
    y = F.conv2d(x.float(), weight, None, *geometry[1:])
    return draw(*y.shape), x, geometry


def truth(grad_y, x, kernel, *geometry):
    return REGISTRY["conv_backward_weight"].reference(grad_y.double(), x.double(), kernel, *geometry, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_exact_on_small_integers(case, dtype):
    run = library(dtype)
    grad_y, x, geometry = integers(case, dtype)
    found = run(grad_y, x, *geometry)
    assert found.dtype == dtype and found.is_contiguous(memory_format=LAST)
    assert torch.equal(found, truth(grad_y, x, *geometry).to(dtype))


def test_long_sums_keep_the_accuracy_of_short_ones():
    run, g = library(), torch.Generator().manual_seed(1)
    grad_y, x = (torch.randn(128, c, 1, 1, generator=g).contiguous(memory_format=LAST) for c in (32, 64))
    geometry = (1, 1), (1, 1), (0, 0), (1, 1)
    exact = truth(grad_y, x, *geometry)
    plain = REGISTRY["conv_backward_weight"].reference(grad_y, x, *geometry, 1)
    assert_close_to_truth(run(grad_y, x, *geometry), plain, exact, torch.float32, "the gradient")


def test_the_same_bits_for_any_number_of_threads():
    run, g = library(), torch.Generator().manual_seed(2)
    x, grad_y = (torch.randn(4, c, 3, 3, generator=g).contiguous(memory_format=LAST) for c in (272, 144))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run(grad_y, x, (3, 3), (1, 1), (1, 1), (1, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("value", (torch.inf, torch.nan))
def test_what_is_not_finite_reaches_the_taps_that_read_it_and_padding_is_not_multiplied(value):
    """As in PyTorch's kernel of float32."""
    run = library()
    for place in (0, 1):
        grad_y, x, geometry = integers(GEOMETRIES["3x3"], torch.float32, low=1)
        (grad_y, x)[place][0, 0, 0, 0] = value
        found, plain = run(grad_y, x, *geometry), REGISTRY["conv_backward_weight"].reference(grad_y, x, *geometry, 1)
        assert torch.equal(found.isnan(), plain.isnan()) and torch.equal(found.nan_to_num(), plain.nan_to_num())
        assert not found.isfinite().all() and found.isfinite().any()


def test_the_native_op_checks_for_itself():
    run = library()
    grad_y, x, geometry = integers(GEOMETRIES["3x3"], torch.float32)
    wrong = {
        "dense in channels_last": (grad_y, x.contiguous(), *geometry),
        "float32 or bfloat16": (grad_y.double(), x.double(), *geometry),
        "of x's dtype, with the pixels": (grad_y.bfloat16(), x, *geometry),
        "with the pixels of the output": (grad_y[:1], x, *geometry),
        "no larger than the padded input": (grad_y, x, (9, 9), *geometry[1:]),
        "two numbers from 1": (grad_y, x, geometry[0], (0, 1), *geometry[2:]),
        "two numbers from 0": (grad_y, x, *geometry[:2], (1, 2**40), geometry[3]),
        "whole vectors": (grad_y, x[:, :8].contiguous(memory_format=LAST), *geometry),
    }
    for words, args in wrong.items():
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


def test_it_is_chosen_for_few_pixels_and_many_weights():
    library()
    weight = torch.zeros(128, 128, 3, 3)
    x = torch.zeros(2, 128, 3, 3).contiguous(memory_format=LAST)
    assert backends(x, weight, (1, 1), (1, 1)) == ["torch", "torch", "cpu"]
    assert backends(x, torch.zeros(512, 128, 1, 1), (1, 1), (0, 0)) == ["torch", "torch", "cpu"]
    assert backends(x.contiguous(), weight, (1, 1), (1, 1)) == ["torch", "torch", "torch"]
    assert backends(x[:, :16].contiguous(memory_format=LAST), weight[:16, :16], (1, 1), (1, 1)) == ["torch", "torch", "torch"]
    many = torch.zeros(15, 128, 3, 3).contiguous(memory_format=LAST)  # by whatever is chosen, not by this
    grad_y = F.conv2d(many, weight, None, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "op", lambda name: pytest.fail(name))
        assert REGISTRY["conv_backward_weight"](grad_y, many, (3, 3), (1, 1), (1, 1), (1, 1), 1).shape == weight.shape


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


def test_without_groups_only():
    x, weight = torch.zeros(1, 512, 2, 2).contiguous(memory_format=LAST), torch.zeros(512, 256, 3, 3)
    grad_y = F.conv2d(x, weight, None, 1, 1, 1, 2)
    args = grad_y, x, (3, 3), (1, 1), (1, 1), (1, 1), 2
    assert REGISTRY["conv_backward_weight"].explain(*args).backend.name == "torch"
    with fastres.use(conv_backward_weight="cpu"), pytest.raises(UnsupportedError, match="group"):
        REGISTRY["conv_backward_weight"](*args)
