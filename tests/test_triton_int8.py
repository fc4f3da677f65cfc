"""The Triton convolution of 8-bit integers, in the interpreter: every tile, every tail, rounding and both ends, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import fastres  # noqa: E402
from fastres import tuner  # noqa: E402
from fastres.kernels.layout import memory_format  # noqa: E402
from fastres.kernels.triton import configs  # noqa: E402
from fastres.kernels.triton import conv_int8 as kernels  # noqa: E402
from fastres.ops import _conv_cpu, conv_int8  # noqa: E402
from fastres.ops.conv_int8 import CONV_INT8  # noqa: E402

CL, CPU = torch.channels_last, torch.device("cpu")
ONE, NONE = (1, 1), (0, 0)
# Several tiles along both sides, one that overhangs both, a band of one row.
TILES = (
    configs.ConvConfig(32, 16, 32, 1, 1),
    configs.ConvConfig(64, 64, 64, 1, 1),
    configs.ConvConfig(16, 32, 32, 1, 1, group_m=1),
)
SHAPES = {
    "1x1, all tails": ((2, 40, 5, 7), (24, 40, 1, 1), (ONE, NONE, ONE), -128),
    "1x1 stride 2": ((2, 33, 6, 7), (17, 33, 1, 1), ((2, 2), NONE, ONE), -128),
    "1x1 with padding": ((1, 32, 4, 5), (8, 32, 1, 1), (ONE, ONE, ONE), 100),
    "3x3": ((2, 33, 6, 5), (40, 33, 3, 3), (ONE, ONE, ONE), -128),
    "3x3 stride 2, a zero point": ((1, 64, 9, 7), (16, 64, 3, 3), ((2, 2), ONE, ONE), -3),
    "3x3 dilated, all of a window in the padding": ((1, 32, 3, 4), (9, 32, 3, 3), (ONE, (4, 4), (2, 2)), 55),
    "3x1 uneven": ((1, 32, 6, 5), (8, 32, 3, 1), ((2, 1), (1, 0), ONE), 127),
    "7x7 of 3 channels": ((2, 3, 15, 13), (20, 3, 7, 7), ((2, 2), (3, 3), ONE), -7),
    "a linear layer": ((3, 72, 1, 1), (50, 72, 1, 1), (ONE, NONE, ONE), -128),
    "one pixel, many results": ((2, 32, 1, 1), (17, 32, 1, 1), (ONE, (2, 1), ONE), 5),
    "one channel": ((2, 1, 7, 6), (17, 1, 3, 3), (ONE, ONE, ONE), 5),
    "3x3 of 20 channels": ((1, 20, 5, 6), (33, 20, 3, 3), (ONE, ONE, ONE), -128),
}


def called(args, config=None):
    y = kernels.conv_int8(*args) if config is None else kernels.conv_int8(*args, tuple(config))
    assert y.is_contiguous(memory_format=memory_format(args[0]))
    return y


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "real"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", SHAPES)
def test_any_convolution_of_integers(name, with_residual, integers):
    shape, weight, geometry, pad = SHAPES[name]
    args = conv_int8.drawn(shape, weight, geometry, with_residual, integers, CPU, pad)
    expected = CONV_INT8.reference(*args)
    if integers:
        assert {-128, 127} <= set(expected.flatten().tolist()) and expected.unique().numel() > 20  # both ends, and between
    for config in (None, *TILES):
        assert torch.equal(called(args, config), expected)


@pytest.mark.parametrize("few", [False, True], ids=["channels", "few"])
def test_every_configuration(few):
    """On as much as fills none of them."""
    shape = SHAPES["7x7 of 3 channels" if few else "3x3"]
    args = conv_int8.drawn(*shape[:3], True, True, CPU, shape[3])
    offered = kernels.candidates(CPU, args[2])
    assert len(offered) == len(kernels.FEW_CHANNELS if few else kernels.TILES)
    for config in offered:
        assert torch.equal(called(args, config), CONV_INT8.reference(*args))


def ties():
    """Products whose halves go beyond the bytes at both ends, most of them ties, and a residual that makes others."""
    x = torch.arange(-64, 64, dtype=torch.int8).repeat(5)[:600].view(1, 1, 20, 30).repeat(1, 32, 1, 1)
    x[:, 1:] = 0
    weight = torch.zeros(2, 32, 1, 1, dtype=torch.int8)
    weight[:, 0] = torch.tensor([12, 11]).view(2, 1, 1)
    start, residual = torch.tensor([255, 256], dtype=torch.int32), torch.arange(-128, 127, dtype=torch.int8)
    residual = residual.repeat(5)[:1200].view(1, 2, 20, 30)
    half = torch.full((2,), 0.5)
    images = (t.contiguous(memory_format=CL) for t in (x, residual, weight))
    return *images, start, half, torch.tensor([0.0, 1.0]), 0.5, -128, ONE, NONE, ONE, True


def test_ties_go_to_the_even_byte():
    x, residual, weight, start, _, bias, *_ = args = ties()
    doubled = F.conv2d(x.long().double(), weight.double()).long() + start.view(-1, 1, 1) + 2 * bias.long().view(-1, 1, 1)
    for added, twice in ((None, doubled), (residual, doubled + residual.long() + 128)):
        even = torch.where(twice % 2 == 0, twice // 2, (twice + 1) // 4 * 2)  # of a half the even neighbour
        expected = even.clamp(0, 255) - 128
        assert (twice % 2 != 0).double().mean() > 0.3 and {-128, 127} <= set(expected.flatten().tolist())
        given = (x, added, *args[2:])
        assert torch.equal(called(given).long(), expected) and torch.equal(CONV_INT8.reference(*given).long(), expected)


def test_the_largest_sums_are_exact():
    """Of bytes of 255 and weights of 127, which float32 does not hold, nor int16 on the way."""
    x = torch.full((1, 512, 4, 4), 127, dtype=torch.int8).contiguous(memory_format=CL)
    weight = torch.full((32, 512, 3, 3), 127, dtype=torch.int8).contiguous(memory_format=CL)
    weight[0, 0, 0, 0] = 126
    start = 128 * weight.sum((1, 2, 3), dtype=torch.int32)
    args = (x, None, weight, start, torch.full((32,), 2.0**-20), torch.zeros(32), 0.0, -128, ONE, ONE, ONE, False)
    y, inner = called(args), 255 * 127 * 512 * 9
    assert y[0, 1, 1, 1] * 2**20 == torch.tensor(float(inner)) and torch.equal(y, CONV_INT8.reference(*args))
    assert torch.equal(called((*args[:-1], True)), CONV_INT8.reference(*args[:-1], True))


def test_memory_around_is_neither_read_nor_written(monkeypatch):
    args = conv_int8.drawn((1, 33, 5, 7), (24, 33, 3, 3), (ONE, ONE, ONE), True, True, CPU, -9)
    expected, made = called(args), []

    def empty(shape, dtype, device, memory_format):
        memory = torch.full((expected.numel() + 4096,), 99, dtype=dtype)
        made.append(memory)
        return torch.as_strided(memory, shape, expected.stride(), 2048)

    monkeypatch.setattr(kernels.torch, "empty", empty)
    for shift in (64, 65):
        moved = []
        for t in args[:2]:
            memory = torch.full((t.numel() + 4096,), 99, dtype=t.dtype)
            moved.append(torch.as_strided(memory, t.shape, t.stride(), 2048 + shift).copy_(t))
        assert torch.equal(kernels.conv_int8(*moved, *args[2:]), expected)
        memory = made.pop()
        assert (memory[:2048] == 99).all() and (memory[2048 + expected.numel() :] == 99).all()


def test_it_is_judged_by_its_integers():
    """The tuner's judge lets the kernel pass, and not one that is off by one in one place."""
    session = tuner.Session(CPU)
    (backend,) = (b for b in CONV_INT8.backends if b.name == "triton")
    assert session.on_samples(CONV_INT8, backend, (torch.float32,)) is None
    args = conv_int8.drawn((1, 32, 4, 4), (8, 32, 1, 1), (ONE, NONE, ONE), False, True, CPU)

    def off(*args):
        y = CONV_INT8.reference(*args)
        y[0, 3, 2, 1] ^= 1
        return y

    assert tuner.judge(CONV_INT8, off, args) == "output 0 has other integers"


@pytest.mark.skipif(_conv_cpu.lacks(torch.int8) is not None, reason="this processor has no plans of 8-bit integers")
def test_a_network_by_the_kernel_gives_the_bits_of_the_cpus_plan(monkeypatch):
    """A stem of images in words, pools, a residual, a stride, a zero point, real numbers at the end."""
    from _uncaptured import Uncaptured
    from test_int8 import Steps, Sum, conv, quiet

    from fastres.frozen import device, make

    monkeypatch.setattr(device, "Graphs", Uncaptured)
    torch.manual_seed(0)
    body = [conv(3, 32, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1), Sum(conv(32, 32, 3, padding=1))]
    body += [conv(32, 40, 1, stride=2), conv(40, 16, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    model, x = Steps(*body, torch.nn.Linear(16, 5)).eval(), torch.randn(3, 3, 21, 24)
    native = fastres.freeze(model, x, quantize=quiet([x]))
    with fastres.use(conv_int8="triton", pool_int8="triton", quantize_int8="triton"):
        frozen = make.by_ops(model, x, torch.int8, quiet([x]))
        for given in (x, x[:1], 3 * x, x.contiguous(memory_format=CL)):
            assert torch.equal(frozen(given), native(given))
        bad = x.clone()
        bad[1, 2, 20, 23] = torch.nan
        found = frozen(bad)
        assert found[1].isnan().all() and torch.equal(found[[0, 2]], native(x)[[0, 2]])
    kernels = [step.choice.kernel for step in frozen.plan(tuple(x.shape)).steps if step.call.op is not None]
    assert kernels == ["triton"] * 8 and frozen.plan(tuple(x.shape)).x.is_contiguous()


def test_refused():
    (backend,) = (b for b in CONV_INT8.backends if b.name == "triton")
    x, residual, *rest = conv_int8.drawn((1, 32, 4, 4), (8, 32, 1, 1), (ONE, NONE, ONE), True, True, CPU)
    assert "channels_last" in backend.why_not(x.contiguous(), residual, *rest)
    assert "residual must be dense" in backend.why_not(x, residual.contiguous(), *rest)
    assert "empty" in backend.why_not(x[:0], residual[:0], *rest)
    assert backend.why_not(x, residual, *rest) is None


def test_views_that_negate_are_read_as_their_values():
    args = conv_int8.drawn(*SHAPES["3x3"][:3], True, True, CPU)
    negated = [torch._neg_view(-t) if isinstance(t, torch.Tensor) else t for t in args]
    assert negated[0].is_neg() and torch.equal(called(negated), called(args))


def test_a_residuals_scale_is_taken_as_float32_holds_it():
    x, residual, *rest = conv_int8.drawn(*SHAPES["1x1, all tails"][:3], True, False, CPU)
    for scale in (0.7, 1 / 3, 2):
        args = (x, residual, *rest[:4], scale, *rest[5:])
        CONV_INT8.check(*args)
        assert torch.equal(called(args), CONV_INT8.reference(*args))
