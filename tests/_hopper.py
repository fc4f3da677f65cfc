"""What the tests of the convolutions for sm_90a share: their device, their arguments, what must hold of any of them.

A case has the sizes n, c, h, w, k, the kernel's, ``geometry`` (stride, padding, dilation) and whether there is a residual; a
call is ``call(x, weight, bias, residual, act)``.
"""

import itertools

import _cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth

from fastres.ops import REGISTRY, _conv_cuda

CL = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16)
DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("emulated", marks=pytest.mark.compile)]


def device(name: str) -> torch.device:
    """The GPU, or the CPU once the kernels run on it; skips where neither can be."""
    if name == "emulated":
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
    y = F.conv2d(x, weight, bias, *case.geometry)
    residual = draw(9, *y.shape) if case.residual else None
    exact = y if residual is None else y + residual
    x, weight, residual, exact = (None if t is None else t.to(device, dtype) for t in (x, weight, residual, exact))
    residual = None if residual is None else residual.contiguous(memory_format=CL)
    return (x.contiguous(memory_format=CL), weight, bias.float().to(device), residual), exact


def assert_exact(call, args, exact):
    for act in ("relu", "none"):
        y = call(*args, act)
        assert torch.equal(y, exact.relu() if act == "relu" else exact)
        assert y.is_contiguous(memory_format=CL)


def assert_special_values_pass(call, case, args):
    """NaN and infinities, which args hold, come out as in PyTorch; zeros of either sign give zeros behind the ReLU."""
    x, weight, bias, residual = args
    # In float64: cuDNN's algorithms for float32 may be Winograd's, which spread what is not finite over a tile.
    z = F.conv2d(x.double(), weight.double(), bias.double(), *case.geometry) + residual.double()
    for act in ("relu", "none"):
        y, expected = call(*args, act), (z.relu() if act == "relu" else z).to(x.dtype)
        nan = expected.isnan()
        assert nan.any() and not nan.all() and torch.equal(y.isnan(), nan) and torch.equal(y[~nan], expected[~nan])
    zero = torch.zeros_like
    y = call(zero(x), zero(weight), zero(bias), torch.full_like(residual, -0.0), "relu")
    assert torch.equal(y, zero(y)) and not y.signbit().any()


def assert_memory_around_is_not_touched(call, args, exact):
    """Neither read, being full of NaN, nor written."""
    x, weight, bias, residual = args

    def inside(t):
        memory = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device)
        return torch.as_strided(memory, t.shape, t.stride(), 2048).copy_(t), memory

    (x, x_memory), (residual, residual_memory) = inside(x), inside(residual)
    assert torch.equal(call(x, weight, bias, residual, "none"), exact)
    for memory in (x_memory, residual_memory):
        assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


def assert_backend_keeps_the_budget(backend, name, dtype, device):
    """Fold, packing, alignment: every sample of the op that the backend, a module, takes."""
    op, taken = REGISTRY[name], []
    for sample, shifted in itertools.product(op.samples(device, dtype), (False, True)):
        args = [
            a.contiguous(memory_format=CL) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args
        ]
        parts = (args[0], args[1], args[2]) if name == "conv_bn_add_act" else (args[0], None, args[1])
        if backend.why_not_arguments(parts[0], parts[2], *args[-5:-1]):
            continue
        x = parts[0]
        if shifted:  # by one element: not aligned
            memory = torch.empty(x.numel() + 8, dtype=dtype, device=device)
            x = torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x)
        y = backend.run(x, *parts[1:], *args[-11:])
        exact = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_close_to_truth(y, op.reference(*args), exact, dtype, sample.label)
        taken.append(sample.label)
    assert {"1x1", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 dilated"} <= set(taken)
