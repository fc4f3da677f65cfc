"""The convolution for sm_90a, executed on the CPU: its tiles, rings, barriers and swizzles, and the backend around it.

Copies and products happen as early or as late as they may, see cuda_on_cpu/instead; what the instructions do on a GPU is
taken from their documentation.
"""

import functools
import sys
from typing import NamedTuple

import _cuda_on_cpu
import _hopper
import pytest
import torch
import torch.nn.functional as F
from _hopper import CL, DTYPES, integers

from fastres.kernels import native
from fastres.ops import _conv_cuda

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

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation


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


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


def run(x, weight, bias, residual, case, act, shortcut=None):
    pairs = ([v, v] for v in (case.stride, case.padding, case.dilation))
    packed = weight.permute(0, 2, 3, 1).contiguous()
    own = (None, None, None) if shortcut is None else shortcut
    own_stride = [1, 1] if shortcut is None else [SHORTCUT_STRIDE] * 2
    return torch.ops.fastres_C.sm90_conv_act(x, packed, bias, residual, *own, *pairs, own_stride, act)


def call_of(case):
    return lambda *args: run(*args[:4], case, args[4])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_small_integers(device, dtype, name):
    case = CASES[name]
    _hopper.assert_exact(call_of(case), *integers(case, dtype, device))


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
    _hopper.assert_special_values_pass(call_of(case), case, (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype):
    case = CASES["tails everywhere"]
    _hopper.assert_memory_around_is_not_touched(call_of(case), *integers(case, dtype, device))


@pytest.mark.parametrize("name", ["conv_bn_act", "conv_bn_add_act"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_keeps_the_budget(device, dtype, name):
    _hopper.assert_backend_keeps_the_budget(_conv_cuda, name, dtype, device)


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
