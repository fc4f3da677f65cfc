"""A training step's convolutions in tile registers: exact sums, any geometry, threads, what is not finite, what is refused."""

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
    if native.why_not("cpu_conv_amx") or _conv_cpu.why_not_amx():
        pytest.skip(native.why_not("cpu_conv_amx") or _conv_cpu.why_not_amx())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def gradient(grad_y, x, kernel, *window):
    return native.op("cpu_conv_backward_weight_amx")(grad_y, x, kernel, *window)


def truth_of(grad_y, x, weight, window, of):
    """The gradient of x (0) or of the weight (1)."""
    wanted = [of == place for place in range(3)]
    tensors = (t.float() for t in (grad_y, x, weight))
    return torch.ops.aten.convolution_backward(*tensors, None, *window, False, (0, 0), 1, wanted)[of].bfloat16()


def integers(generator, *shape):
    return torch.randint(-4, 5, shape, generator=generator).bfloat16().contiguous(memory_format=LAST)


def draw(seed, dilates_strides=True):
    """The output's gradient, x, the weight and the window of a convolution: integers, of which products and sums are exact."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=g)]

    while True:
        kernel, stride = (pick(1, 1, 2, 3, 5), pick(1, 1, 2, 3, 4)), (pick(1, 1, 2, 3), pick(1, 1, 2, 3))
        padding, dilation = (pick(0, 0, 1, 2, 3), pick(0, 0, 1, 2)), (pick(1, 1, 2, 3), pick(1, 1, 2))
        if not dilates_strides:
            dilation = tuple(d if by == 1 else 1 for d, by in zip(dilation, stride, strict=True))
        size = pick(*range(1, 16)), pick(*range(1, 16))
        axes = zip(size, kernel, stride, padding, dilation, strict=True)
        out = [(s + 2 * p - d * (k - 1) - 1) // by + 1 for s, k, by, p, d in axes]
        if min(out) > 0:
            break
    images, channels, out_channels = pick(1, 2, 3, 4, 5), pick(16, 32, 48, 80, 96), pick(16, 32, 48, 64, 112)
    x, weight = integers(g, images, channels, *size), integers(g, out_channels, channels, *kernel)
    return integers(g, images, out_channels, *out), x, weight, (stride, padding, dilation)


SEEDS = [range(start, start + 50) for start in (0, 50, 100)]


@pytest.mark.parametrize("seeds", SEEDS)
def test_weight_gradients_are_exact_on_small_integers(seeds):
    for seed in seeds:
        grad_y, x, weight, window = draw(seed)
        expected = truth_of(grad_y, x, weight, window, 1)
        assert torch.equal(gradient(grad_y, x, weight.shape[2:], *window), expected), (seed, x.shape, weight.shape, window)


@pytest.mark.parametrize("seeds", SEEDS)
def test_outputs_and_input_gradients_are_exact_on_small_integers(seeds):
    for seed in seeds:
        grad_y, x, weight, window = draw(seed, dilates_strides=False)
        case = seed, x.shape, weight.shape, window
        y = F.conv2d(x.float(), weight.float(), None, *window).bfloat16()
        assert torch.equal(native.op("cpu_conv_amx")(x, weight, *window), y), case
        grad_x = native.op("cpu_conv_amx_input")(grad_y, weight, x.shape[2:], *window)
        assert torch.equal(grad_x, truth_of(grad_y, x, weight, window, 0)), case


def large(images, channels, out_channels, side, kernel):
    """So many pixels that they are multiplied in groups; small integers, few of them not zero."""
    g = torch.Generator().manual_seed(channels)
    x, grad_y = integers(g, images, channels, side, side), integers(g, images, out_channels, side, side)
    grad_y *= torch.rand(grad_y.shape, generator=g) < 0.1
    return grad_y, x, (kernel, kernel), ONE, (kernel // 2, kernel // 2), ONE


LARGE = {
    "groups that all threads share": (2, 96, 96, 37, 3),
    "parts with sums of their own": (2, 32, 32, 50, 3),
    "parts of several groups": (2, 256, 48, 60, 1),
}


@pytest.mark.parametrize("case", LARGE)
def test_exact_and_the_same_bits_for_any_number_of_threads(case):
    args = large(*LARGE[case])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = torch.empty(args[0].shape[1], args[1].shape[1], *args[2])
            assert torch.equal(gradient(*args), truth_of(*args[:2], weight, args[3:], 1))
    finally:
        torch.set_num_threads(threads)


WINDOWS = {  # images, channels, output channels, side, kernel, stride, padding; and whether y, grad x, grad weight are taken
    "3x3": ((6, 32, 64, 13, 3, 1, 1), (False, False, True)),
    "stride": ((6, 48, 80, 12, 3, 2, 1), (False, False, True)),
    "1x1, narrow to wide": ((6, 64, 256, 12, 1, 1, 0), (False, False, True)),
    "1x1, stride": ((6, 96, 32, 13, 1, 2, 0), (False, True, True)),
    "many weights": ((9, 256, 288, 5, 3, 1, 1), (True, True, True)),
    "many weights, stride": ((5, 256, 256, 11, 3, 2, 1), (True, True, True)),
}


def convolution(case):
    images, channels, out_channels, side, kernel, *_ = case
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(images, channels, side, side - 1, generator=g).bfloat16().contiguous(memory_format=LAST)
    weight = torch.randn(out_channels, channels, kernel, kernel, generator=g) / (channels * kernel * kernel) ** 0.5
    weight = weight.bfloat16().contiguous(memory_format=LAST)
    y = F.conv2d(x, weight, None, *case[5:])
    return x, weight, torch.randn(y.shape, generator=g).bfloat16().contiguous(memory_format=LAST)


@pytest.mark.parametrize("case", WINDOWS)
def test_a_training_step_takes_it_and_keeps_the_budget(case):
    window, taken = WINDOWS[case]
    x, weight, grad_y = convolution(window)
    stride, padding = (window[5],) * 2, (window[6],) * 2
    geometry = stride, padding, ONE, 1
    choices = (
        REGISTRY["conv"].explain(x, weight, None, *geometry),
        REGISTRY["conv_backward_input"].explain(grad_y, weight, tuple(x.shape[2:]), *geometry),
        REGISTRY["conv_backward_weight"].explain(grad_y, x, tuple(weight.shape[2:]), *geometry),
    )
    assert tuple(choice.backend.name == "cpu" for choice in choices) == taken
    found = []
    for convolve, dtype in ((functional.conv2d, torch.bfloat16), (F.conv2d, torch.bfloat16), (F.conv2d, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, torch.linspace(-1, 1, len(weight)).bfloat16())]
        y = convolve(*leaves, stride, padding)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))))
    for what, *tensors in zip(("y", "grad x", "grad weight", "grad bias"), *found, strict=True):
        assert_close_to_truth(*tensors, torch.bfloat16, what)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("which", ["x", "weight", "grad_y"])
def test_what_is_not_finite_stands_where_it_stands_in_torch(which, value):
    window, _ = WINDOWS["many weights"]
    tensors = dict(zip(("x", "weight", "grad_y"), convolution(window), strict=True))
    tensors[which][1, 2, 1, 0] = value
    found = []
    for convolve in (functional.conv2d, F.conv2d):
        leaves = [tensors[name].clone(memory_format=torch.preserve_format).requires_grad_() for name in ("x", "weight")]
        y = convolve(*leaves, None, 1, 1)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, tensors["grad_y"])))
    for own, same in zip(*found, strict=True):
        assert torch.equal(own.isnan(), same.isnan()) and torch.equal(own.isinf(), same.isinf())


def test_what_is_refused_says_why():
    x = torch.randn(4, 32, 12, 12).bfloat16().contiguous(memory_format=LAST)
    op = REGISTRY["conv_backward_weight"]

    def reason(grad_y=x, x=x, groups=1, kernel=ONE, padding=(0, 0), dilation=ONE):
        return op.explain(grad_y, x, kernel, ONE, padding, dilation, groups).refusals["cpu"]

    assert "multiples of 16 channels" in reason(grad_y=x[:, :24].contiguous(memory_format=LAST))
    assert "groups=2" in reason(groups=2)
    assert "channels_last" in reason(x=x.contiguous())
    assert "reach so far" in reason(kernel=(3, 3), padding=(8, 8), dilation=(8, 8))


def test_the_native_ops_check_for_themselves():
    x = torch.randn(4, 32, 8, 8).bfloat16().contiguous(memory_format=LAST)
    odd, weight = x[:, :24].contiguous(memory_format=LAST), torch.zeros(32, 32, 3, 3).bfloat16().contiguous(memory_format=LAST)
    of_weight = "cpu_conv_backward_weight_amx", (x, x, (3, 3), ONE, ONE, ONE)
    of_input = "cpu_conv_amx_input", (x, weight, (8, 8), ONE, ONE, ONE)
    forward = "cpu_conv_amx", (x, weight, ONE, ONE, ONE)
    for (name, args), place, value, match in (
        (of_weight, 1, x.contiguous(), "channels_last"),
        (of_weight, 0, x.float(), "bfloat16"),
        (of_weight, 0, x[:2], r"shape \(4, 32, 8, 8\)"),
        (of_weight, 1, odd, "multiples of 16"),
        (of_weight, 4, (0, 0), "output's shape"),
        (of_weight, 2, (3,), "kernel"),
        (of_weight, 3, (0, 1), "stride"),
        (of_weight, 4, (-1, 1), "padding"),
        (of_input, 2, (9, 8), "output's shape"),
        (of_input, 2, (0, 8), "size"),
        (of_input, 1, weight[:16].contiguous(memory_format=LAST), "32 channels"),
        (forward, 0, odd, "multiples of 16"),
        (forward, 1, weight.contiguous(), "channels_last"),
        (forward, 1, weight[:, :16].contiguous(memory_format=LAST), "32 channels"),
        (forward, 3, (-1, 0), "padding"),
    ):
        with pytest.raises(RuntimeError, match=match):
            native.op(name)(*args[:place], value, *args[place + 1 :])
    strided = torch.zeros(4, 32, 4, 8).bfloat16().contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError, match="1 on a side with dilation"):
        native.op("cpu_conv_amx_input")(strided, weight, (9, 8), (2, 1), (1, 1), (2, 1))


def test_explain_says_who_computes_the_gradients():
    model = fastres.optimize(torch.nn.Sequential(torch.nn.Conv2d(32, 64, 1, 2), torch.nn.BatchNorm2d(64), torch.nn.ReLU()))
    assert any("weight gradients are computed by AMX" in note for note in fastres.explain(model).notes)
