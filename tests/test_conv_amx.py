"""The weight gradient in tile registers: exact sums, any geometry, threads, what is not finite, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth

import fastres
from fastres import functional
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cpu

pytestmark = pytest.mark.cpu
LAST = torch.channels_last
ONE = (1, 1)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Where the registers are emulated, torch does not know of them."""
    if native.why_not("cpu_conv_backward_weight_amx") or _conv_cpu.why_not_amx():
        pytest.skip(native.why_not("cpu_conv_backward_weight_amx") or _conv_cpu.why_not_amx())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def gradient(grad_y, x, kernel, stride, padding, dilation):
    return native.op("cpu_conv_backward_weight_amx")(grad_y, x, kernel, stride, padding, dilation)


def truth_of(grad_y, x, kernel, stride, padding, dilation):
    weight = torch.empty(grad_y.shape[1], x.shape[1], *kernel)
    args = grad_y.float(), x.float(), weight, None, stride, padding, dilation, False, (0, 0), 1, (False, True, False)
    return torch.ops.aten.convolution_backward(*args)[1]


def integers(generator, *shape):
    return torch.randint(-4, 5, shape, generator=generator).bfloat16().contiguous(memory_format=LAST)


def draw(seed):
    """The arguments of a gradient: small integers, of which products and sums are exact."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=g)]

    while True:
        kernel, stride = (pick(1, 1, 2, 3, 5), pick(1, 1, 2, 3, 4)), (pick(1, 1, 2, 3), pick(1, 1, 2, 3))
        padding, dilation = (pick(0, 0, 1, 2, 3), pick(0, 0, 1, 2)), (pick(1, 1, 2, 3), pick(1, 1, 2))
        size = pick(*range(1, 16)), pick(*range(1, 16))
        axes = zip(size, kernel, stride, padding, dilation, strict=True)
        out = [(s + 2 * p - d * (k - 1) - 1) // by + 1 for s, k, by, p, d in axes]
        if min(out) > 0:
            break
    images = pick(1, 2, 3, 4, 5)
    x = integers(g, images, pick(16, 32, 48, 80, 96), *size)
    return integers(g, images, pick(16, 32, 48, 64, 112), *out), x, kernel, stride, padding, dilation


@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in (0, 50, 100)])
def test_exact_on_small_integers(seeds):
    for seed in seeds:
        args = draw(seed)
        assert torch.equal(gradient(*args), truth_of(*args).bfloat16()), (seed, args[0].shape, args[1].shape, args[2:])


def large(images, channels, out_channels, side, kernel):
    """So many pixels that they are multiplied in groups; small integers, few of them not zero."""
    g = torch.Generator().manual_seed(channels)
    x, grad_y = integers(g, images, channels, side, side), integers(g, images, out_channels, side, side)
    grad_y *= torch.rand(grad_y.shape, generator=g) < 0.1
    return grad_y, x, (kernel, kernel), ONE, (kernel // 2, kernel // 2), ONE


LARGE = {
    "groups that all threads share": (2, 288, 256, 36, 3),
    "parts with sums of their own": (5, 32, 32, 50, 3),
    "parts of several groups": (8, 256, 48, 60, 1),
}


@pytest.mark.parametrize("case", LARGE)
def test_exact_and_the_same_bits_for_any_number_of_threads(case):
    args = large(*LARGE[case])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(gradient(*args), truth_of(*args).bfloat16())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("channels, out_channels, kernel, stride, padding", [
    (32, 64, 3, 1, 1), (48, 80, 3, 2, 1), (64, 256, 1, 1, 0), (96, 32, 1, 2, 0), (16, 48, 5, 1, 2),
])  # fmt: skip
def test_a_training_step_takes_it_and_keeps_the_budget(channels, out_channels, kernel, stride, padding):
    torch.manual_seed(0)
    x = torch.randn(6, channels, 12, 13).bfloat16().contiguous(memory_format=LAST)
    weight = (torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5).bfloat16()
    grad_y = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    choice = REGISTRY["conv_backward_weight"].explain(grad_y, x, (kernel,) * 2, (stride,) * 2, (padding,) * 2, ONE, 1)
    assert choice.backend.name == "cpu"
    found = []
    for convolve, dtype in ((functional.conv2d, torch.bfloat16), (F.conv2d, torch.bfloat16), (F.conv2d, torch.float64)):
        leaf = weight.to(dtype).requires_grad_()
        y = convolve(x.to(dtype), leaf, None, stride, padding)
        found += torch.autograd.grad(y, leaf, grad_y.to(dtype))
    assert_close_to_truth(*found, torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("which", ["x", "grad_y"])
def test_what_is_not_finite_stands_where_it_stands_in_torch(which, value):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(4, 32, 8, 8), "grad_y": torch.randn(4, 64, 8, 8)}
    tensors[which][1, 2, 1, 0] = value
    grad_y, x = (tensors[name].bfloat16().contiguous(memory_format=LAST) for name in ("grad_y", "x"))
    args = grad_y, x, (3, 3), ONE, ONE, ONE, 1
    op = REGISTRY["conv_backward_weight"]
    own, same = op(*args), op.reference(*args)
    assert torch.equal(own.isnan(), same.isnan()) and torch.equal(own.isinf(), same.isinf())


def test_what_is_refused_says_why():
    x = torch.randn(4, 32, 12, 12).bfloat16().contiguous(memory_format=LAST)
    op = REGISTRY["conv_backward_weight"]

    def reason(grad_y=x, x=x, groups=1):
        return op.explain(grad_y, x, (1, 1), ONE, (0, 0), ONE, groups).refusals["cpu"]

    assert "multiples of 16 channels" in reason(grad_y=x[:, :24].contiguous(memory_format=LAST))
    assert "groups=2" in reason(groups=2)
    assert "channels_last" in reason(x=x.contiguous())


def test_the_native_op_checks_for_itself():
    x = torch.randn(4, 32, 8, 8).bfloat16().contiguous(memory_format=LAST)
    for args, match in (
        ((x, x.contiguous(), (3, 3), ONE, ONE, ONE), "channels_last"),
        ((x.float(), x, (3, 3), ONE, ONE, ONE), "bfloat16"),
        ((x[:2], x, (3, 3), ONE, ONE, ONE), "4 images"),
        ((x, x[:, :24].contiguous(memory_format=LAST), (3, 3), ONE, ONE, ONE), "multiples of 16"),
        ((x, x, (3, 3), ONE, (0, 0), ONE), "output's shape"),
        ((x, x, (3,), ONE, ONE, ONE), "kernel"),
        ((x, x, (3, 3), (0, 1), ONE, ONE), "stride"),
        ((x, x, (3, 3), ONE, (-1, 1), ONE), "padding"),
    ):
        with pytest.raises(RuntimeError, match=match):
            gradient(*args)


def test_explain_says_who_computes_the_gradients():
    model = fastres.optimize(torch.nn.Sequential(torch.nn.Conv2d(32, 64, 1, 2), torch.nn.BatchNorm2d(64), torch.nn.ReLU()))
    assert any("weight gradients are computed by AMX" in note for note in fastres.explain(model).notes)
