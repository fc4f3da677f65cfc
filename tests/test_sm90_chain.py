"""A convolution and the 1x1 that follows it in one launch, executed on the CPU; what is between stays in shared memory."""

from typing import NamedTuple

import _cuda_on_cpu
import _hopper
import pytest
import torch
import torch.nn.functional as F
from _hopper import CL, DTYPES
from tolerances import assert_close_to_truth

from fastres.ops import REGISTRY, _conv_cuda
from fastres.ops import conv_bn_act_conv_bn_add_act as chain
from fastres.ops import conv_bn_act_conv_bn_add_act_conv_bn_act as long_chain


class Case(NamedTuple):
    """Images, channels, height, width, channels out; kernel, dilation; the two activations."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    dilation: tuple[int, int] = (1, 1)
    acts: tuple[str, str] = ("relu", "relu")

    @property
    def padding(self):
        return tuple((k - 1) * d // 2 for k, d in zip(self.kernel, self.dilation, strict=True))


CASES = {
    "part of a tile": Case(1, 64, 8, 16, 64),
    "several tiles of each block, images that end inside a part": Case(9, 64, 17, 19, 256),
    "one row, one column": Case(40, 64, 1, 1, 64, acts=("none", "relu")),
    "dilated": Case(3, 64, 19, 13, 128, dilation=(2, 3), acts=("relu", "none")),
    "1x1": Case(3, 64, 5, 6, 64, (1, 1)),
    "7x1": Case(2, 64, 20, 10, 64, (7, 1)),
    "the widest": Case(2, 64, 9, 62, 64),
    "128 channels": Case(1, 128, 8, 16, 128),
    "128 channels, several tiles of each block": Case(4, 128, 14, 15, 256, acts=("none", "relu")),
    "128 channels, the widest": Case(1, 128, 5, 30, 128),
}


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


def integers(case, dtype, device):
    """Arguments of small integers, and the result: every order of additions gives the same, exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(most, *size, of=1.0):
        values = torch.randint(-most, most + 1, size, generator=generator).double()
        return values * (torch.rand(size, generator=generator) < of)

    x, weight, bias = draw(1, case.n, case.c, case.h, case.w), draw(1, case.c, case.c, *case.kernel, of=0.04), draw(4, case.c)
    last, last_bias = draw(1, case.k, case.c, 1, 1, of=0.1), draw(3, case.k)
    residual = draw(9, case.n, case.k, case.h, case.w)
    middle = act(F.conv2d(x, weight, bias, 1, case.padding, case.dilation), case.acts[0])
    exact = act(F.conv2d(middle, last, last_bias) + residual, case.acts[1])
    x, weight, last, residual, exact = (t.to(device, dtype) for t in (x, weight, last, residual, exact))
    biases = [b.float().to(device) for b in (bias, last_bias)]
    return (x.contiguous(memory_format=CL), weight, biases[0], last, biases[1], residual.contiguous(memory_format=CL)), exact


def act(x, name):
    return x.relu() if name == "relu" else x


def run(x, weight, bias, last, last_bias, residual, case, following=()):
    weight, last, *following = (t.permute(0, 2, 3, 1).contiguous() if t.dim() == 4 else t for t in (weight, last, *following))
    op = torch.ops.fastres_C.sm90_conv_act_conv_act_conv_act if following else torch.ops.fastres_C.sm90_conv_act_conv_act
    return op(x, weight, bias, last, last_bias, residual, *following, case.dilation, *case.acts, *["relu"] * bool(following))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain_is_exact(device, dtype, name):
    case = CASES[name]
    args, exact = integers(case, dtype, device)
    y = run(*args, case)
    assert torch.equal(y, exact) and y.is_contiguous(memory_format=CL)


@pytest.mark.parametrize("name", ["one row, one column", "dilated", "7x1", "128 channels, three tiles"])
def test_a_chain_of_three_is_exact(device, name):
    """The first convolution of the next block, from what is held of the end of this one."""
    case = CASES.get(name) or Case(2, 128, 9, 15, 192, acts=("relu", "none"))
    args, y = integers(case, torch.float16, device)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-1, 2, (case.c, case.k, 1, 1), generator=generator).double()
    weight *= torch.rand(weight.shape, generator=generator) < 0.1
    bias = torch.randint(-4, 5, (case.c,), generator=generator).double()
    z = F.conv2d(y.double().cpu(), weight, bias).relu().to(y)
    found = run(*args, case, (weight.to(y), bias.float().to(device)))
    assert torch.equal(found[0], y) and torch.equal(found[1], z)
    assert all(t.is_contiguous(memory_format=CL) for t in found)


def test_special_values_of_a_chain(device):
    """NaN and infinities of x and of the residual come out as in PyTorch; a row's end does not reach the next row."""
    case = CASES["several tiles of each block, images that end inside a part"]
    (x, weight, bias, last, last_bias, residual), _ = integers(case, torch.bfloat16, device)
    x[0, 3, 2, 18], x[1, 2, 6, 0], residual[1, 5, 4, 3], residual[2, 7, 1, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = run(x, weight, bias, last, last_bias, residual, case)
    middle = F.conv2d(x.double(), weight.double(), bias.double(), 1, case.padding).relu()
    expected = (F.conv2d(middle, last.double(), last_bias.double()) + residual.double()).relu().to(y.dtype)
    nan = expected.isnan()
    assert nan.any() and not nan.all() and torch.equal(y.isnan(), nan) and torch.equal(y[~nan], expected[~nan])


def test_memory_around_a_chain_is_not_touched(device):
    case = CASES["dilated"]
    (x, weight, bias, last, last_bias, residual), exact = integers(case, torch.float16, device)
    call = lambda x, weight, bias, residual, _: run(x, weight, bias, last, last_bias, residual, case)  # noqa: E731
    _hopper.assert_memory_around_is_not_touched(call, (x, weight, bias, residual), exact)


@pytest.mark.parametrize(("page", "dtype"), [(chain, torch.float16), (long_chain, torch.bfloat16)])
def test_a_chain_keeps_the_budget(device, page, dtype):
    """Fold, packing, alignment: every sample of the op that the kernel takes."""
    op, cuda, taken = REGISTRY[page.NAME], page.run_cuda, []
    for sample in op.samples(device, dtype):
        args = [a.contiguous(memory_format=CL) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args]
        if _conv_cuda.why_not_chain_arguments(args[0], args[2], *args[9:13], args[14]):
            continue
        found, plain = cuda(*args), op.reference(*args)
        exact = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        for outputs in zip(found, plain, exact, strict=True) if isinstance(found, tuple) else [(found, plain, exact)]:
            assert_close_to_truth(*outputs, dtype, sample.label)
        taken.append(sample.label)
    assert taken == ["3x3 of 64 channels", "3x3 of 128 channels", "3x3 dilated"]


@pytest.mark.compile
def test_what_is_unsafe_in_a_chain_raises():
    _cuda_on_cpu.load()
    case = CASES["part of a tile"]
    given, exact = integers(case, torch.float16, torch.device("cpu"))
    names = ("x", "weight", "bias", "last", "last_bias", "residual", "case")
    right = dict(zip(names, (*given, case), strict=True))
    x, weight, last, residual = (right[name] for name in ("x", "weight", "last", "residual"))
    wide, many = Case(1, 64, 2, 63, 64), torch.zeros(1, 72, 8, 16, dtype=x.dtype).contiguous(memory_format=CL)
    wrong = [
        ({"x": x.float()}, "x must be float16 or bfloat16"),
        ({"x": x.contiguous()}, "x must be of 4 dimensions .* channels_last"),
        ({"x": many}, "x must be of 64 or 128 channels"),
        ({"weight": weight[:, :8]}, "weight must be contiguous"),
        ({"weight": weight.float()}, "weight must be of x's dtype"),
        ({"weight": weight[:, :, :2]}, "weight must be of an odd number of pixels"),
        ({"case": case._replace(dilation=(1, 80))}, "weight must be of an odd number of pixels, of at most 128"),
        ({"case": case._replace(dilation=(0, 1))}, "dilation must be two integers from 1"),
        ({"bias": right["bias"][:-1]}, r"bias must be of size \(64,\)"),
        ({"last": last[:32]}, "last_weight must be of a multiple of 64 channels out"),
        ({"following": (last[:32], right["bias"][:32])}, "next_weight must be of 64 channels out"),
        ({"following": (weight, right["bias"])}, "next_weight must be contiguous"),
        ({"following": (last, right["bias"][:-1])}, r"next_bias must be of size \(64,\)"),
        ({"last": weight}, "last_weight must be contiguous"),
        ({"last_bias": right["last_bias"][:-1]}, r"last_bias must be of size \(64,\)"),
        ({"residual": residual[:, :, 1:]}, "residual must be of the sizes of x"),
        ({"residual": residual.contiguous()}, "residual must be dense and channels_last"),
        ({"case": case._replace(acts=("gelu", "relu"))}, "act must be 'relu' or 'none'"),
    ]
    assert torch.equal(run(**right), exact)
    for change, text in wrong:
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_bn_act_conv_bn_add_act: .*{text}.*, got "):
            run(**right | change)
    args, _ = integers(wide, torch.float16, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"x must be narrow: .*, got 130 pixels"):
        run(*args, wide)


@pytest.mark.none
def test_a_chain_is_refused_with_a_reason():
    x = torch.empty(2, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=CL)
    weight, last, one = torch.empty(64, 64, 3, 3), torch.empty(256, 64, 1, 1), (1, 1)

    def why_not(x=x, weight=weight, stride=one, padding=one, dilation=one, groups=1, last=last):
        return _conv_cuda.why_not_chain_arguments(x, weight, stride, padding, dilation, groups, last)

    assert why_not() is None
    assert "on cpu" in _conv_cuda.why_not_chain(x, weight, one, one, one, 1, last)
    assert "groups=2" in why_not(groups=2)
    assert "64 to 64 to 96" in why_not(last=last[:96])
    assert "64 to 128 to 256" in why_not(weight=torch.empty(128, 64, 3, 3))
    assert "stride (2, 2)" in why_not(stride=(2, 2)) and "padding (0, 0)" in why_not(padding=(0, 0))
    wide = torch.empty(1, 64, 8, 63, dtype=x.dtype).contiguous(memory_format=CL)
    assert "at most 128 pixels of rows, got 130" in why_not(wide)
    many = torch.empty(1, 64, 1, 1, dtype=torch.float16).expand(2**28, 64, 1, 1)
    assert "less than 2^30" in why_not(many)
