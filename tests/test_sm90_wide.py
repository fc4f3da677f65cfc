"""The convolution by Hopper's widest products, executed on the CPU: lines of places, rings, clusters, transposed stores."""

from typing import NamedTuple

import _cuda_on_cpu
import _hopper
import pytest
import torch
from _hopper import CL, DTYPES, integers

from fastres.ops import _conv_wide


class Case(NamedTuple):
    """Images, channels, height, width, channels out; kernel, stride, dilation; padding, the window's half if None; residual."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | None = None
    residual: bool = True

    @property
    def geometry(self):
        half = tuple((k - 1) * d // 2 for k, d in zip(self.kernel, self.dilation, strict=True))
        return (self.stride, self.stride), self.padding or half, self.dilation


ONE = (1, 1)
CASES = {  # of these, where nothing else stands, x is read whole
    "part of a tile": Case(1, 64, 8, 16, 64),
    "several tiles of each block, several slices, two blocks share x": Case(9, 136, 17, 19, 128, residual=False),
    "tails of channels, images that end inside a chunk": Case(5, 40, 7, 7, 72),
    "one row, one column": Case(70, 8, 1, 1, 8),
    "few channels": Case(3, 8, 29, 23, 8),
    "5x5": Case(4, 16, 11, 13, 64, (5, 5), residual=False),
    "7x1": Case(4, 16, 20, 20, 64, (7, 1)),
    "3x3, four blocks share x": Case(3, 72, 9, 8, 256),
    "dilated": Case(3, 24, 19, 13, 64, dilation=(2, 3)),
    "the widest": Case(1, 64, 12, 62, 64),
    "wider, by tap": Case(1, 64, 9, 90, 64),
    "1x1, by tap": Case(3, 200, 17, 19, 64, ONE),
    "1x1 of one step, many tiles, two blocks share x": Case(12, 64, 17, 19, 128, ONE, residual=False),
    "1x1, four blocks share x": Case(4, 136, 17, 19, 256, ONE),
    "1x1 stride 2, by tap": Case(2, 64, 9, 9, 128, ONE, 2, residual=False),
    "3x3 stride 2, by tap, partial depth": Case(3, 40, 15, 9, 72, stride=2),
    "3x3 without padding, by tap": Case(2, 16, 12, 13, 64, padding=(0, 0)),
    "7x7 stride 2, by tap": Case(1, 8, 15, 13, 64, (7, 7), 2, residual=False),
}


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


def run(x, weight, bias, residual, case, act):
    packed = weight.permute(0, 2, 3, 1).contiguous()
    return torch.ops.fastres_C.sm90_conv_wide(x, packed, bias, residual, *case.geometry, act)


def call_of(case):
    return lambda *args: run(*args[:4], case, args[4])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_is_exact(device, dtype, name):
    case = CASES[name]
    _hopper.assert_exact(call_of(case), *integers(case, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device, dtype):
    """NaN and infinities of x and of the residual come out as in PyTorch; a row's end does not reach the next row."""
    case = CASES["tails of channels, images that end inside a chunk"]
    (x, weight, bias, residual), _ = integers(case, dtype, device)
    x[0, 3, 2, 6], x[1, 2, 6, 0], residual[1, 5, 4, 3], residual[2, 7, 1, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    _hopper.assert_special_values_pass(call_of(case), case, (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype):
    case = CASES["tails of channels, images that end inside a chunk"]
    _hopper.assert_memory_around_is_not_touched(call_of(case), *integers(case, dtype, device))


@pytest.mark.parametrize("name", ["conv_bn_act", "conv_bn_add_act"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_keeps_the_budget(device, dtype, name):
    _hopper.assert_backend_keeps_the_budget(_conv_wide, name, dtype, device)


@pytest.mark.compile
def test_what_is_unsafe_raises():
    _cuda_on_cpu.load()
    case = CASES["tails of channels, images that end inside a chunk"]
    (x, weight, bias, residual), _ = integers(case, torch.float16, torch.device("cpu"))
    wrong = [
        ((x.float(), weight, bias, residual, case, "relu"), "x must be float16 or bfloat16"),
        ((x.contiguous(), weight, bias, residual, case, "relu"), "x must be of 4 dimensions .* channels_last"),
        ((x[:, 1:], weight, bias, residual, case, "relu"), "x must be of 4 dimensions .* channels_last"),
        ((x, weight[:, :8], bias, residual, case, "relu"), "weight must be contiguous"),
        ((x, weight.float(), bias, residual, case, "relu"), "weight must be of x's dtype"),
        ((x, weight[:12], bias[:12], None, case, "relu"), "weight must be of multiples of 8 channels"),
        ((x, weight, bias[:-1], residual, case, "relu"), r"bias must be of size \(72,\)"),
        ((x, weight, bias, residual[1:], case, "relu"), "residual must be of the sizes of x"),
        ((x, weight, bias, residual.contiguous(), case, "relu"), "residual must be dense and channels_last"),
        ((x, weight, bias, residual, case._replace(stride=9), "relu"), "stride must be two integers from 1 to 8"),
        ((x, weight, bias, residual, case._replace(padding=(1, 128)), "relu"), "padding must be two integers from 0"),
        ((x, weight, bias, residual, case._replace(dilation=(1, 80)), "relu"), "weight must be of at most 128 pixels"),
        ((x, weight, bias, residual, case._replace(dilation=(9, 9), padding=ONE), "relu"), "weight must be no larger"),
        ((x, weight, bias, residual, case, "gelu"), "act must be 'relu' or 'none'"),
    ]
    assert run(x, weight, bias, residual, case, "relu").shape == residual.shape
    for args, text in wrong:
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_bn_act: .*{text}.*, got "):
            run(*args)


@pytest.mark.none
def test_refusals_say_why():
    x, weight = torch.empty(2, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=CL), torch.empty(64, 64, 3, 3)
    one = (1, 1)
    assert _conv_wide.why_not_arguments(x, weight, one, one, one, 1) is None
    assert "on cpu" in _conv_wide.why_not(x, weight, one, one, one, 1)
    assert "groups=2" in _conv_wide.why_not_arguments(x, weight, one, one, one, 2)
    many = torch.empty(1, 8, 1, 1, dtype=torch.float16).expand(2**28, 8, 1, 1)
    assert "less than 2^30" in _conv_wide.why_not_arguments(many, torch.empty(8, 8, 3, 3), one, one, one, 1)
