"""The convolution for sm_90a, executed on the CPU: its tiles, rings, barriers and swizzles, and the backend around it.

Copies and products happen as early or as late as they may, see cuda_on_cpu/instead; what the instructions do on a GPU is
taken from their documentation.
"""

import functools
import itertools
import sys
from typing import NamedTuple

import _cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth

from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cuda

CL = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16)
SHORTCUT_STRIDE = 2


class Case(NamedTuple):
    """Images, channels, height, width, channels out; kernel, stride, padding, dilation; residual."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    residual: bool = True


CASES = {
    "one tile": Case(1, 64, 8, 16, 128),
    "several tiles of each block, a ring that goes round": Case(3, 136, 17, 19, 384),
    "more stages than the ring": Case(2, 520, 9, 9, 64, residual=False),
    "tails everywhere": Case(3, 72, 17, 11, 200),
    "few channels": Case(5, 8, 16, 16, 8),
    "1x1 stride 2": Case(2, 64, 9, 9, 128, stride=2, residual=False),
    "3x3": Case(2, 64, 13, 11, 128, (3, 3), padding=1),
    "3x3 stride 2, partial depth": Case(3, 40, 15, 9, 72, (3, 3), 2, 1),
    "3x3 dilated": Case(1, 24, 19, 13, 64, (3, 3), 1, 2, 2),
    "7x7 stride 2": Case(1, 8, 15, 13, 64, (7, 7), 2, 3, residual=False),
    "3x1": Case(2, 16, 9, 8, 64, (3, 1), 2, 1),
    "3x3, tiles of both warpgroups": Case(3, 72, 17, 19, 128, (3, 3), padding=1, residual=False),
    "3x3, three blocks share a tile": Case(1, 264, 8, 9, 72, (3, 3), padding=1),
    "1x1, tiles of both warpgroups, tails": Case(5, 1000, 15, 13, 72),
}


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("emulated", marks=pytest.mark.compile)]
)
def device(request):
    if request.param == "emulated":
        _cuda_on_cpu.load()
        return torch.device("cpu")
    if reason := _conv_cuda.why_not_device(torch.device("cuda")):
        pytest.skip(reason)
    return torch.device("cuda")


def integers(case, dtype, device):
    """x, weight, bias and residual of small integers: every order of additions gives the same, exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(most, *size):
        return torch.randint(-most, most + 1, size, generator=generator).double()

    x, weight, bias = draw(3, case.n, case.c, case.h, case.w), draw(2, case.k, case.c, *case.kernel), draw(4, case.k)
    y = F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation)
    residual = draw(9, *y.shape) if case.residual else None
    exact = y if residual is None else y + residual
    x, weight, residual, exact = (None if t is None else t.to(device, dtype) for t in (x, weight, residual, exact))
    residual = None if residual is None else residual.contiguous(memory_format=CL)
    return (x.contiguous(memory_format=CL), weight, bias.float().to(device), residual), exact


def run(x, weight, bias, residual, case, act, shortcut=None):
    pairs = ([v, v] for v in (case.stride, case.padding, case.dilation))
    packed = weight.permute(0, 2, 3, 1).contiguous()
    own = (None, None, None) if shortcut is None else shortcut
    own_stride = [1, 1] if shortcut is None else [SHORTCUT_STRIDE] * 2
    return torch.ops.fastres_C.sm90_conv_act(x, packed, bias, residual, *own, *pairs, own_stride, act)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_small_integers(device, dtype, name):
    case = CASES[name]
    args, exact = integers(case, dtype, device)
    for act in ("relu", "none"):
        y = run(*args, case, act)
        assert torch.equal(y, exact.relu() if act == "relu" else exact)
        assert y.is_contiguous(memory_format=CL)


@pytest.mark.parametrize("stride", [1, SHORTCUT_STRIDE])
@pytest.mark.parametrize(
    "name",
    [
        "tails everywhere",
        "3x3 stride 2, partial depth",
        "3x3, tiles of both warpgroups",
        "3x3, three blocks share a tile",
    ],
)
def test_a_projected_shortcut_is_added(device, monkeypatch, name, stride):
    monkeypatch.setattr(sys.modules[__name__], "SHORTCUT_STRIDE", stride)
    case, generator = CASES[name], torch.Generator().manual_seed(1)
    args, exact = integers(case, torch.float16, device)
    n, k, height, width = exact.shape
    draw = lambda most, *size: torch.randint(-most, most + 1, size, generator=generator).double()  # noqa: E731
    shortcut, weight, bias = draw(2, n, 72, height * stride, width * stride), draw(1, k, 72, 1, 1), draw(3, k)
    exact = exact.double() + F.conv2d(shortcut, weight, bias, stride).to(device)
    given = shortcut.to(device, torch.float16).contiguous(memory_format=CL), weight.to(device, torch.float16)
    packed = given[1].permute(0, 2, 3, 1).contiguous()
    y = run(*args, case, "relu", (given[0], packed, bias.float().to(device)))
    assert torch.equal(y, exact.relu().to(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device, dtype):
    """NaN and infinities of x and of the residual come out as in PyTorch; what lies beyond an edge is zero."""
    case = CASES["tails everywhere"]
    (x, weight, bias, residual), _ = integers(case, dtype, device)
    x[0, 3, 2, 1], residual[1, 5, 4, 3], residual[2, 7, 1, 1] = torch.nan, torch.inf, -torch.inf
    z = F.conv2d(x.float(), weight.float(), bias) + residual.float()
    for act in ("relu", "none"):
        y, expected = run(x, weight, bias, residual, case, act), (z.relu() if act == "relu" else z).to(dtype)
        nan = expected.isnan()
        assert nan.any() and torch.equal(y.isnan(), nan) and torch.equal(y[~nan], expected[~nan])
    zero = torch.zeros_like
    y = run(zero(x), zero(weight), zero(bias), torch.full_like(residual, -0.0), case, "relu")
    assert torch.equal(y, zero(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype):
    """Neither read, being full of NaN, nor written."""
    case = CASES["tails everywhere"]
    (x, weight, bias, residual), exact = integers(case, dtype, device)

    def inside(t):
        memory = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device)
        return torch.as_strided(memory, t.shape, t.stride(), 2048).copy_(t), memory

    (x, x_memory), (residual, residual_memory) = inside(x), inside(residual)
    assert torch.equal(run(x, weight, bias, residual, case, "none"), exact)
    for memory in (x_memory, residual_memory):
        assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("name", ["conv_bn_act", "conv_bn_add_act"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_keeps_the_budget(device, dtype, name):
    """Fold, packing, alignment: every sample that it takes."""
    op, taken = REGISTRY[name], []
    for sample, shifted in itertools.product(op.samples(device, dtype), (False, True)):
        args = [
            a.contiguous(memory_format=CL) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args
        ]
        parts = (args[0], args[1], args[2]) if name == "conv_bn_add_act" else (args[0], None, args[1])
        stride, padding, dilation, groups = args[-5:-1]
        if _conv_cuda.why_not_arguments(parts[0], parts[2], stride, padding, dilation, groups):
            continue
        x = parts[0]
        if shifted:  # by one element: not aligned
            memory = torch.empty(x.numel() + 8, dtype=dtype, device=device)
            x = torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)
        y = _conv_cuda.run(x, *parts[1:], *args[-11:])
        exact = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_close_to_truth(y, op.reference(*args), exact, dtype, sample.label)
        taken.append(sample.label)
    assert {"1x1", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 dilated"} <= set(taken)


@pytest.mark.compile
def test_what_is_unsafe_raises():
    device = torch.device("cpu")
    _cuda_on_cpu.load()
    case = CASES["3x3"]
    (x, weight, bias, residual), _ = integers(case, torch.float16, device)
    call = functools.partial(run, x, weight, bias, residual, case, "relu")
    assert call().shape == residual.shape
    wrong = [
        ((x.float(), weight, bias, residual, case, "relu"), "x must be float16 or bfloat16"),
        ((x.contiguous(), weight, bias, residual, case, "relu"), "x must be dense and channels_last"),
        ((x, weight[:, :8], bias, residual, case, "relu"), "weight must be contiguous"),
        ((x, weight[:12], bias[:12], None, case, "relu"), "weight must be of a multiple of 8 channels"),
        ((x, weight, bias[:-1], residual, case, "relu"), r"bias must be of size \(128,\)"),
        ((x, weight, bias, residual[1:], case, "relu"), "residual must be of the sizes of x"),
        ((x, weight, bias, residual, case._replace(stride=9), "relu"), "stride must be two integers from 1 to 8"),
        ((x, weight, bias, residual, case._replace(dilation=80), "relu"), "weight must be of at most 128 pixels"),
        (
            (x[:, :, :2, :2].contiguous(memory_format=CL), weight, bias, None, case._replace(padding=0), "relu"),
            "no larger",
        ),
        ((x, weight, bias, residual, case, "gelu"), "act must be 'relu' or 'none'"),
    ]
    for args, text in wrong:
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_bn_act: .*{text}.*, got "):
            run(*args)


@pytest.mark.none
def test_refusals_say_why():
    x = torch.empty(2, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=CL)
    weight = torch.empty(64, 64, 3, 3)
    one, zero = (1, 1), (0, 0)
    refuse = _conv_cuda.why_not_arguments
    assert refuse(x, weight, one, zero, one, 1) is None
    assert "on cpu" in _conv_cuda.why_not(x, weight, one, zero, one, 1)
    assert "float32" in refuse(x.float(), weight, one, zero, one, 1)
    assert "groups=2" in refuse(x, weight, one, zero, one, 2)
    assert "channels_last" in refuse(x.contiguous(), weight, one, zero, one, 1)
    assert "multiples of 8" in refuse(x, weight[:60], one, zero, one, 1)
    assert "windows are smaller" in refuse(x, weight, one, zero, (70, 70), 1)
    assert "got (0, 64" in refuse(x[:0], weight, one, zero, one, 1)


@pytest.mark.none
@pytest.mark.parametrize(
    ("capability", "built", "archs", "reason"),
    [
        ((8, 0), True, ["90a"], "got 8.0"),
        ((9, 0), False, [], "not built"),
        ((9, 0), True, ["80"], "without 90a"),
        ((9, 0), True, ["90a"], None),
    ],
)
def test_it_asks_for_hopper_and_a_build_for_it(monkeypatch, capability, built, archs, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "why_not", lambda name: None if built else "not built")
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": archs})
    found = _conv_cuda.why_not_device.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else reason in found
