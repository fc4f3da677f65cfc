"""Convolutions of few input channels on CUDA: the kernels, on a GPU as built, else executed on the CPU (see _cuda_on_cpu.py), and
the backends around them.
"""

from typing import NamedTuple

import _cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F

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
    "even windows, no padding": Case(1, 3, 16, 16, 96, (4, 4), (4, 4), (0, 0)),
}


@pytest.fixture(
    params=[pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("emulated", marks=pytest.mark.compile)]
)
def device(request):
    if request.param == "emulated":
        _cuda_on_cpu.load()
        return torch.device("cpu")
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
