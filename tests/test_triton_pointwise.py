"""The persistent 1x1 convolution of the Triton room, in the interpreter: tiles, overhanging ends, programs of many tiles."""

import pytest
import torch
import torch.nn.functional as F

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from test_triton_interpreter import DTYPES, draw, judge  # noqa: E402

from fastres.kernels.triton import configs, conv_bn_act, pointwise  # noqa: E402

CL = torch.channels_last
GEOMETRY = (1, 1), (0, 0), (1, 1)
# One band, several bands of rows, one row of tiles.
TILES = (
    configs.ConvConfig(32, 16, 16, 1, 1, persistent=True),
    configs.ConvConfig(16, 16, 32, 1, 2, group_m=2, persistent=True),
    configs.ConvConfig(128, 32, 16, 1, 3, group_m=1, persistent=True),
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(x, weight, bias, residual, act="relu", config=None):
    packed = conv_bn_act.pack(weight, False)
    return conv_bn_act.conv_act(x, packed, bias, residual, (1, 1), *GEOMETRY, act, False, config)


@pytest.mark.parametrize("channels", [(24, 40), (8, 8), (64, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size(dtype, channels):
    """Pixels and channels that fill no tile, by a few programs."""
    x, weight = draw((2, channels[0], 9, 7), dtype, CL), draw((channels[1], channels[0], 1, 1), dtype) / channels[0] ** 0.5
    for bias, residual in ((torch.randn(channels[1]), draw((2, channels[1], 9, 7), dtype, CL)), (None, None)):

        def reference(x, weight, bias, residual):
            z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype))
            return {"y": F.relu(z if residual is None else z + residual)}

        for config in TILES:
            y = run(x, weight, bias, residual, config=config)
            assert y.is_contiguous(memory_format=CL)
            judge({"y": y}, reference, (x, weight, bias, residual), dtype)


def test_every_configuration_is_exact_on_small_integers():
    x, residual = torch.randint(-3, 4, (3, 72, 11, 10)).half(), torch.randint(-9, 10, (3, 136, 11, 10)).half()
    x, residual = (t.contiguous(memory_format=CL) for t in (x, residual))
    weight = torch.randint(-3, 4, (136, 72, 1, 1)).half()
    expected = (F.conv2d(x.float(), weight.float()) + residual.float()).relu()
    for config in (*configs.CONV_PERSISTENT, *configs.CONV_PERSISTENT_TF32):
        assert torch.equal(run(x, weight, None, residual, config=config).float(), expected)


def test_special_values():
    """NaN and infinities where PyTorch has them, out of x and of the residual; the ReLU leaves no negative zero."""
    x, residual = (draw((2, channels, 5, 6), torch.float32, CL) for channels in (8, 16))
    weight = draw((16, 8, 1, 1), torch.float32)
    x[0, 3, 2, 1], x[1, 1, 4, 4], residual[1, 5, 4, 3], residual[0, 7, 1, 1] = torch.nan, torch.inf, torch.nan, -torch.inf
    for act in ("relu", "none"):
        z = F.conv2d(x, weight) + residual
        y, expected = run(x, weight, None, residual, act, TILES[0]), z.relu() if act == "relu" else z
        nan = expected.isnan()
        assert nan.any() and torch.equal(y.isnan(), nan)
        torch.testing.assert_close(y[~nan], expected[~nan])
    zero = torch.full_like(residual, -0.0)
    y = run(torch.zeros_like(x), torch.zeros_like(weight), torch.full((16,), -0.0), zero, "relu", TILES[0])
    assert not y.signbit().any()


def test_memory_around_is_neither_read_nor_written():
    x, residual = (draw((1, channels, 5, 7), torch.float16, CL) for channels in (24, 40))
    weight = draw((40, 24, 1, 1), torch.float16)
    expected = run(x, weight, None, residual, config=TILES[0])
    for shift in (64, 65):  # aligned, and not: a copy
        moved = []
        for t in (x, residual):
            memory = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype)
            moved.append(torch.as_strided(memory, t.shape, t.stride(), 2048 + shift).copy_(t))
        assert torch.equal(run(moved[0], weight, None, moved[1], config=TILES[0]), expected)


def test_it_is_chosen_where_descriptors_can_describe_the_call(monkeypatch):
    hopper, ampere = configs.Limits(90, 227 << 10), configs.Limits(80, 163 << 10)
    x, small = (torch.empty(32, 64, 56, 56, dtype=dtype, device="meta") for dtype in (torch.float16, torch.float32))
    weight, one, zero = torch.empty(128, 64, 1, 1), (1, 1), (0, 0)

    def chosen(x, weight, stride=one, padding=zero, groups=1, tf32=False):
        offered = conv_bn_act.candidates(x, weight, stride, padding, groups, tf32)
        size = x.numel() // x.shape[1], x.shape[1], weight.shape[0], x.element_size()
        config = conv_bn_act.heuristic(x.device, *size, list(weight.shape[2:]), stride, padding, groups, tf32)
        assert config in offered and config.persistent == any(c.persistent for c in offered)
        return config.persistent

    for limits, newer in ((hopper, True), (ampere, False)):
        monkeypatch.setattr(conv_bn_act, "limits", lambda device, limits=limits: limits)
        assert chosen(x, weight) == chosen(small, weight, tf32=True) == newer
        assert not chosen(small, weight)  # fp32 products in registers
        assert not chosen(x, weight, stride=(2, 2)) and not chosen(x, weight, padding=one)
        assert not chosen(x, torch.empty(128, 64, 3, 3)) and not chosen(x, torch.empty(128, 32, 1, 1), groups=2)
        assert not chosen(x, weight[:100]) and not chosen(x[:, :60], weight[:, :60])  # pixels of no multiple of 16 bytes
    assert not pointwise.suits(2**30 + 1, 64, 64, 2, (1, 1), one, zero, 1)


def test_programs_are_no_more_than_multiprocessors(monkeypatch):
    grids, real = [], pointwise.launch

    def launch(kernel, grid, *args, **options):
        grids.append(grid)
        real(kernel, grid, *args, **options)

    monkeypatch.setattr(pointwise, "launch", launch)
    weight = draw((16, 8, 1, 1), torch.float32)
    for size, programs in ((4, 1), (40, 3)):
        x = draw((1, 8, size, size), torch.float32, CL)
        run(x, weight, None, None, config=TILES[0])
        assert grids.pop() == (programs,) and not grids
