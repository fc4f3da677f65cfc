"""Convolutions of few input channels on CUDA and the backends around them: the kernels on a GPU as built, else executed on the
CPU (see _cuda_on_cpu.py).
"""

import copy
import itertools
from typing import NamedTuple

import _cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth

import fastres
import fastres.nn as fnn
from fastres import tune, tuner
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cuda, _conv_rows

CL = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """Images, channels, height, width, channels out; kernel, stride, padding."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (7, 7)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (3, 3)


# Few images are cut into single rows; it takes some hundred for parts of several.
CASES = {
    "stem": Case(1, 3, 32, 32, 64),
    "stem, rows that are not aligned": Case(2, 3, 19, 17, 64),
    "stem, several parts of a block": Case(3, 3, 41, 64, 64),
    "one pixel": Case(1, 3, 1, 1, 64),
    "columns in parts": Case(1, 3, 9, 600, 64),
    "few images, one row": Case(2, 3, 7, 40, 8, padding=(0, 0)),
    "more than one block of channels": Case(1, 3, 11, 16, 136),
    "for small images": Case(2, 3, 8, 8, 16, (3, 3), (1, 1), (1, 1)),
    "for small images, odd": Case(3, 3, 9, 13, 40, (3, 3), (1, 1), (1, 1)),
    "wide windows, odd offsets": Case(1, 3, 9, 8, 24, (2, 7), (1, 1), (1, 3)),
    "one channel": Case(2, 1, 12, 24, 32, (5, 9), (2, 3), (2, 4)),
    "four channels": Case(1, 4, 14, 16, 64, (3, 3), (2, 2), (1, 1)),
    "two parts of a block": Case(800, 3, 3, 8, 8, (3, 3), (1, 1), (1, 1)),
    "a ring that goes round": Case(396, 3, 2, 128, 8, (1, 3), (1, 1), (0, 1)),
    "stem, parts of several rows": Case(400, 3, 6, 8, 64),
    "rows and columns in parts": Case(200, 3, 2, 136, 8, (3, 3), (1, 1), (1, 1)),
    "even windows, no padding": Case(1, 3, 16, 16, 96, (4, 4), (4, 4), (0, 0)),
}


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("emulated", marks=pytest.mark.compile)]
)
def device(request):
    if request.param == "emulated":
        _cuda_on_cpu.load()
        return torch.device("cpu")
    if reason := native.why_not_cuda() or _conv_rows.why_not_device(torch.device("cuda")):
        pytest.skip(reason)
    return torch.device("cuda")


def integers(case, dtype, device):
    """x, weight, bias and grad_y of small integers, of which every order of additions gives the same, exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(most, *size):
        return torch.randint(-most, most + 1, size, generator=generator).double()

    x, weight, bias = draw(2, case.n, case.c, case.h, case.w), draw(2, case.k, case.c, *case.kernel), draw(4, case.k)
    y = F.conv2d(x, weight, bias, case.stride, case.padding)
    grad_y = draw(1, *y.shape) * (torch.rand(y.shape, generator=generator) < 0.3)
    x, weight, grad_y = (t.to(device, dtype).contiguous(memory_format=CL) for t in (x, weight, grad_y))
    return x, weight, bias.float().to(device), grad_y, y


def forward(x, weight, bias, case, act="none"):
    packed = torch.ops.fastres_C.conv_rows_pack(weight.permute(0, 2, 3, 1).contiguous(), case.padding[1])
    geometry = map(list, (case.kernel, case.stride, case.padding))
    return torch.ops.fastres_C.conv_rows(x, packed, bias, len(weight), *geometry, act)


def gradient(grad_y, x, case):
    geometry = map(list, (case.kernel, case.stride, case.padding))
    return torch.ops.fastres_C.conv_rows_backward_weight(grad_y, x, *geometry).permute(0, 3, 1, 2)


def torch_gradient(grad_y, x, case):
    weight = torch.zeros(case.k, case.c, *case.kernel, dtype=x.dtype, device=x.device, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, weight, None, case.stride, case.padding), weight, grad_y)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_exact_on_small_integers(device, dtype, name):
    case = CASES[name]
    x, weight, bias, _, exact = integers(case, dtype, device)
    for act in ("relu", "none"):
        y = forward(x, weight, bias, case, act)
        assert torch.equal(y, (exact.relu() if act == "relu" else exact).to(y))
        assert y.is_contiguous(memory_format=CL)
    assert torch.equal(forward(x, weight, None, case), (exact - bias.double().cpu().view(-1, 1, 1)).to(y))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_exact_on_small_integers(device, dtype, name):
    case = CASES[name]
    x, _, _, grad_y, _ = integers(case, dtype, device)
    exact = torch_gradient(grad_y.double(), x.double(), case)
    assert torch.equal(gradient(grad_y, x, case), exact.to(dtype))


@pytest.mark.parametrize("name", ["stem, rows that are not aligned", "stem", "for small images, odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stands_where_it_stands_in_torch(device, dtype, name):
    """Also right beside a window, whose values share its registers."""
    case = CASES[name]
    x, weight, bias, grad_y, _ = integers(case, dtype, device)
    x[0, 0, 2, 1], x[-1, 2, -1, -1], x[0, 1, case.h // 2, case.w // 2] = torch.nan, torch.inf, -torch.inf
    x[0, 2, 4, 6] = torch.nan  # of the stem: right before the window of the sixth pixel
    z = F.conv2d(x.double(), weight.double(), bias.double(), case.stride, case.padding)
    for act in ("relu", "none"):
        assert same(forward(x, weight, bias, case, act), (z.relu() if act == "relu" else z).to(dtype))
    assert same(gradient(grad_y, x, case), torch_gradient(grad_y.double(), x.double(), case).to(dtype))
    x = x.nan_to_num(0, 0, 0)
    x[0, 0, 0, 0], grad_y[0, :, :2, :2] = torch.inf, 1  # under the first pixel, which those beyond a part stand for
    assert same(gradient(grad_y, x, case), torch_gradient(grad_y.double(), x.double(), case).to(dtype), torch.isinf)
    x[0, 0, 0, 0], grad_y[0, 3, 3, 3] = 0, torch.nan  # all of its window lies within the image
    assert same(gradient(grad_y, x, case), torch_gradient(grad_y.double(), x.double(), case).to(dtype))


def same(found, expected, wanted=torch.isnan):
    nan = expected.isnan()
    return bool(wanted(expected).any()) and torch.equal(found.isnan(), nan) and torch.equal(found[~nan], expected[~nan])


@pytest.mark.parametrize("name", ["stem, several parts of a block", "more than one block of channels"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype, name):
    """Neither read, being full of NaN, nor written."""
    case = CASES[name]
    x, weight, bias, grad_y, exact = integers(case, dtype, device)

    def inside(t):
        memory = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device)
        return torch.as_strided(memory, t.shape, t.stride(), 2048).copy_(t), memory

    (x, x_memory), (grad_y, grad_memory) = inside(x), inside(grad_y)
    assert torch.equal(forward(x, weight, bias, case), exact.to(weight))
    assert torch.equal(gradient(grad_y, x, case), torch_gradient(grad_y.double(), x.double(), case).to(dtype))
    for memory in (x_memory, grad_memory):
        assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("name", ["conv", "conv_bn_act", "conv_backward_weight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backends_keep_the_budget(device, dtype, name):
    """Packing, fold, alignment, layout of the output: every sample that they take."""
    op, taken = REGISTRY[name], []
    for sample, shifted in itertools.product(op.samples(device, dtype), (False, True)):
        args = [a.contiguous(memory_format=CL) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args]
        x = args[1 if name == "conv_backward_weight" else 0]
        kernel = (args[0].shape[1], x.shape[1], *args[2]) if name == "conv_backward_weight" else args[1].shape
        geometry = args[-5:-1] if name == "conv_bn_act" else args[-4:]
        if _conv_rows.why_not_arguments(x, x.dtype, kernel, *geometry):
            continue
        given = [off(a) if shifted and isinstance(a, torch.Tensor) and a.dtype == dtype and a.dim() == 4 else a for a in args]
        if name == "conv_bn_act":
            y = _conv_cuda.run(given[0], None, *given[1:])
        else:
            y = (_conv_rows.run if name == "conv" else _conv_rows.run_weight)(*given)
        exact = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        expected = op.reference(*args)
        assert_close_to_truth(y, expected, exact, dtype, sample.label)
        assert y.stride() == expected.stride() and y.dtype == expected.dtype
        taken.append(sample.label)
    assert taken.count("7x7 stem") == 2


def off(t):
    """The same by one element further in memory: not aligned."""
    memory = torch.empty(t.numel() + 8, dtype=t.dtype, device=t.device)
    return torch.as_strided(memory, t.shape, t.stride(), 1).copy_(t)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stem_trains_as_torch(dtype):
    """Under autocast and forced, forward and all gradients, also that by the images, which is PyTorch's."""
    torch.manual_seed(0)
    layer = fnn.ConvBNAct2d(3, 64, 7, 2, padding=3).to("cuda", memory_format=CL)
    x = torch.randn(4, 3, 64, 48, device="cuda").contiguous(memory_format=CL).requires_grad_()
    outputs = []
    for choice in ("cuda", "torch"):
        calls = tuner.recorded(lambda choice=choice: outputs.append(step(layer, x, choice, dtype)))
        assert any(key.startswith("conv_backward_weight|") for key in calls)
    truth = step(copy.deepcopy(layer).double(), x.detach().double().requires_grad_(), "torch", torch.float64)
    for own, expected, exact in zip(*outputs, truth, strict=True):
        assert own.dtype == expected.dtype
        assert_close_to_truth(own, expected, exact, dtype)


def step(layer, x, choice, dtype):
    with fastres.use(conv=choice), torch.autocast("cuda", dtype, enabled=dtype != torch.float64):
        y = layer(x)
    return (y, *torch.autograd.grad(y.double().square().sum(), (x, layer.conv.weight)))


@pytest.mark.compile
def test_what_is_unsafe_raises():
    _cuda_on_cpu.load()
    case = CASES["stem"]
    x, weight, bias, grad_y, _ = integers(case, torch.float16, torch.device("cpu"))
    packed = torch.ops.fastres_C.conv_rows_pack(weight.permute(0, 2, 3, 1).contiguous(), 3)
    seven, two, three = [7, 7], [2, 2], [3, 3]
    forward_calls = [
        ((x.float(), packed, bias, 64, seven, two, three, "relu"), "x must be float16 or bfloat16"),
        ((x[0], packed, bias, 64, seven, two, three, "relu"), "x must be of 4 dimensions"),
        ((x.contiguous(), packed, bias, 64, seven, two, three, "relu"), "x must be dense and channels_last"),
        ((off(x), packed, bias, 64, seven, two, three, "relu"), "x must be aligned to 16 bytes"),
        ((x, packed[:-1], bias, 64, seven, two, three, "relu"), "packed must be packed weights"),
        ((x, packed.bfloat16(), bias, 64, seven, two, three, "relu"), "packed must be packed weights"),
        ((x, packed, bias, 128, seven, two, three, "relu"), "packed must be packed weights"),
        ((x, packed, bias[1:], 64, seven, two, three, "relu"), r"bias must be of size \(64,\)"),
        ((x, packed, bias, 60, seven, two, three, "relu"), "weight must be of a multiple of 8 output channels"),
        ((x, packed, bias, 64, [8, 7], two, three, "relu"), "kernel must be two integers from 1 to 7"),
        ((x, packed, bias, 64, [7, 2], two, three, "relu"), "a row of the window must be of 9 to 24 values"),
        ((x, packed, bias, 64, seven, [0, 2], three, "relu"), "stride must be two integers from 1 to 8"),
        ((x, packed, bias, 64, seven, two, [3, -1], "relu"), "padding must be two integers from 0 to 127"),
        ((x[:, :, :3].contiguous(memory_format=CL), packed, bias, 64, seven, two, [0, 0], "relu"), "kernel must be no larger"),
        ((x, packed, bias, 64, seven, two, three, "gelu"), "act must be 'relu' or 'none'"),
    ]
    gradient_calls = [
        ((grad_y.bfloat16(), x, seven, two, three), "grad_y must be of the dtype of x"),
        ((grad_y[:, :, 1:], x, seven, two, three), r"grad_y must be \(1, C_out, 16, 16\)"),
        ((grad_y.contiguous(), x, seven, two, three), "grad_y must be dense and channels_last"),
        ((off(grad_y), x, seven, two, three), "grad_y must be aligned"),
        ((grad_y, x, [7, 9], two, three), "a row of the window"),
    ]
    wrong = [(torch.ops.fastres_C.conv_rows, args, text) for args, text in forward_calls]
    wrong += [(torch.ops.fastres_C.conv_rows_backward_weight, args, text) for args, text in gradient_calls]
    pack = torch.ops.fastres_C.conv_rows_pack
    laid_out = weight.permute(0, 2, 3, 1)
    wrong += [(pack, (weight, 3), "weight must be contiguous"), (pack, (laid_out.float(), 3), "weight must be float16")]
    for call, args, text in wrong:
        with pytest.raises(RuntimeError, match=rf"fastres\.conv: {text}.*, got "):
            call(*args)


@pytest.mark.none
def test_refusals_say_why():
    x = torch.empty(2, 3, 32, 32, dtype=torch.float16).contiguous(memory_format=CL)
    stem = (64, 3, 7, 7)

    def reason(x=x, weight=stem, stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=1, dtype=None):
        return _conv_rows.why_not_arguments(x, dtype or x.dtype, weight, stride, padding, dilation, groups)

    assert reason() is None and reason(x.float(), dtype=torch.float16) is None
    assert "on cpu" in _conv_rows.why_not(x, stem, (2, 2), (3, 3), (1, 1), 1)
    assert "on cpu" in _conv_cuda.why_not(x, torch.empty(stem), (2, 2), (3, 3), (1, 1), 1)
    assert "a multiple of 8" in reason(torch.empty(2, 16, 9, 9))
    assert "float32" in reason(x.float())
    assert "groups=3" in reason(groups=3) and "dilation=(2, 2)" in reason(dilation=(2, 2))
    assert "(1, 1) over 3 channels" in reason(weight=(64, 3, 1, 1)) and "(8, 7)" in reason(weight=(64, 3, 8, 7))
    assert "stride=(9, 1)" in reason(stride=(9, 1)) and "padding=(128, 3)" in reason(padding=(128, 3))
    assert "got 60" in reason(weight=(60, 3, 7, 7)) and "(0, 3, 32, 32)" in reason(x[:0])
    assert "channels_last" in reason(x.contiguous()) and "channels_last" in reason(x[:, :, :, 1:])


@pytest.mark.none
@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "got 7.5"), ((8, 0), None), ((9, 0), None), ((12, 0), None)])
def test_they_ask_for_ampere(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = _conv_rows.why_not_device.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else reason in found


@pytest.mark.none
def test_training_asks_where_a_gpu_has_validated_or_where_forced(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda name: None)
    monkeypatch.setattr(_conv_rows, "why_not_device", lambda device: None)
    validated = []
    monkeypatch.setattr(
        tune, "why_not_validated", lambda op, backend, device: None if (op, backend) in validated else "not validated"
    )

    def reason(weight=(64, 3, 7, 7), dtype=torch.float32, channels=3):
        x = torch.empty(2, channels, 32, 32, dtype=dtype).contiguous(memory_format=CL)
        return _conv_rows.why_not_fast(x, weight, (2, 2), (3, 3), (1, 1), 1)

    assert "few input channels" in reason(channels=64)
    assert "float32" in reason()
    assert reason(dtype=torch.bfloat16) == "not validated"
    with fastres.use(conv="cuda"):
        assert reason(dtype=torch.bfloat16) is None and "float32" in reason()
    validated.append(("conv", "cuda"))
    assert reason(dtype=torch.bfloat16) is None and "float32" in reason()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: {"cuda": torch.float16}[kind])
    assert reason() is None and "float64" in reason(dtype=torch.float64)
