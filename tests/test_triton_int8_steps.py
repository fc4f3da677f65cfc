"""What stands around the convolutions of 8-bit integers, by Triton in the interpreter: images quantised, windows pooled, to the
bit."""

import itertools

import pytest
import torch

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from fastres import tuner  # noqa: E402
from fastres.kernels.layout import memory_format  # noqa: E402
from fastres.kernels.triton import pool_int8 as pools  # noqa: E402
from fastres.kernels.triton import quantize_int8 as images  # noqa: E402
from fastres.ops.pool_int8 import POOL_INT8  # noqa: E402
from fastres.ops.quantize_int8 import QUANTIZE_INT8  # noqa: E402

CL, CPU, NONE = torch.channels_last, torch.device("cpu"), (0, 0)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": CL}
# One program and several, a tail, a single pixel, one column.
SIZES = [(2, 3, 32, 32), (3, 3, 41, 50), (2, 1, 7, 9), (1, 2, 33, 31), (2, 4, 5, 3), (2, 3, 1, 1), (2, 3, 6, 1)]
ALL = ((0, 0), (1, 1), (0, 0), False)
STEM = ((3, 3), (2, 2), (1, 1), False)
WINDOWS = {
    "stem": ((2, 64, 13, 12), STEM),
    "several programs": ((2, 64, 40, 22), STEM),
    "stem, few channels": ((1, 4, 9, 7), STEM),
    "words of a tail": ((1, 20, 8, 11), STEM),
    "several tiles of channels": ((1, 132, 5, 4), STEM),
    "counted upwards": ((2, 12, 8, 9), ((2, 3), (3, 2), (1, 1), True)),
    "counted upwards, no last window in the padding": ((1, 8, 5, 5), ((2, 2), (2, 2), (1, 1), True)),
    "overlapping by stride 1": ((1, 8, 4, 5), ((3, 3), (1, 1), (1, 1), False)),
    "4x5": ((1, 8, 9, 12), ((4, 5), (2, 3), (2, 1), False)),
    "all pixels": ((3, 72, 7, 7), ALL),
    "all of one row": ((2, 8, 1, 6), ALL),
    "one pixel": ((5, 16, 1, 1), ALL),
    "one pixel, windows of four": ((2, 8, 1, 1), ((2, 2), (1, 1), (1, 1), False)),
}


def quantised(x, *rest):
    """The kernel's outputs, laid out as the definition's."""
    found, expected = images.quantize_int8(x, *rest), QUANTIZE_INT8.reference(x, *rest)
    assert found[0].stride() == expected[0].stride() and found[1].dtype == torch.float32
    return found, expected


def same(found, expected):
    return torch.equal(found[0], expected[0]) and torch.equal(found[1].isnan(), expected[1].isnan())


def drawn(shape, seed=0):
    x = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return x.contiguous(memory_format=CL)


def even(doubled):
    """Halves of whole numbers to the even neighbour, in integers."""
    return torch.where(doubled % 2 == 0, doubled // 2, (doubled + 1) // 4 * 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_any_images(shape, layout):
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAYOUTS[layout])
    grids = (57.3, 118), (1 / 3, 0), (2000.0, 255)
    for (scale, zero), padding in itertools.product(grids, (NONE, (3, 3), (0, 1), (4, 2))):
        found, expected = quantised(x, scale, zero, 4, padding)
        assert same(found, expected) and not found[1].signbit().any()
        assert (found[0][:, shape[1] :] == -128).all()
        assert (found[0][:, : shape[1], : padding[0]] == zero - 128).all()
    assert {-128, 127} <= set(found[0][:, : shape[1]].flatten().tolist())  # both ends


def test_images_round_ties_to_the_even_byte():
    x = torch.arange(-40, 600).float().view(1, 1, 20, 32)
    for zero in (0, 7):
        expected = even(x.long() + 2 * zero).clamp(0, 255) - 128
        assert torch.equal(images.quantize_int8(x, 0.5, zero, 4, NONE)[0][:, :1].long(), expected)
        assert torch.equal(QUANTIZE_INT8.reference(x, 0.5, zero, 4, NONE)[0][:, :1].long(), expected)


def test_images_are_scaled_with_one_rounding():
    """Next to half way, where a product that is rounded before the addition falls to the other side."""
    scale, zero = 0.3, 100
    held = torch.tensor(scale)
    x = ((torch.arange(-100, 155) + 0.5).double() / held.double()).float()
    x = torch.stack([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))]).view(1, 3, 1, -1)
    found = quantised(x, scale, zero, 4, NONE)
    assert same(*found)
    twice = ((x * held) + zero).round().clamp(0, 255) - 128
    assert (twice.long() != found[0][0][:, :3].long()).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # by NumPy, of infinities
def test_values_that_are_not_finite():
    x = torch.randn(6, 3, 40, 30)
    x[1, 2, 39, 29], x[2, 0, 0, 0], x[4, 1, 7, 7], x[5, 0, 3, 3] = torch.nan, torch.inf, -torch.inf, -0.0
    for layout in LAYOUTS.values():
        found, expected = quantised(x.contiguous(memory_format=layout), 50.0, 120, 4, NONE)
        assert same(found, expected)
        assert found[1].isnan().tolist() == [False, True, True, False, True, False] and (found[1][[0, 3, 5]] == 0).all()
        assert [found[0][1, 2, 39, 29].item(), found[0][2, 0, 0, 0].item(), found[0][4, 1, 7, 7].item()] == [-128, 127, -128]
        assert found[0][5, 0, 3, 3] == 120 - 128


@pytest.mark.parametrize("mean", [False, True], ids=["largest", "mean"])
@pytest.mark.parametrize("name", WINDOWS)
def test_any_window(name, mean):
    shape, window = WINDOWS[name]
    for seed, (scale, bias) in enumerate(((1.37, -20.5), (3.0, -250.0)) if mean else ((None, None),)):
        args = (drawn(shape, seed), *window, scale, bias)
        found, expected = pools.pool_int8(*args), POOL_INT8.reference(*args)
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=memory_format(args[0]))
    assert found.unique().numel() > 1


def test_windows_of_the_smallest_bytes_and_of_the_largest():
    """What stands beyond the image is never the largest, and adds nothing to a mean."""
    for value in (-128, -127, 127):
        x = torch.full((1, 8, 5, 4), value, dtype=torch.int8).contiguous(memory_format=CL)
        assert (pools.pool_int8(x, *STEM, None, None) == value).all()
        assert (pools.pool_int8(x, *STEM, 1.0, 0.0) == value).all()


def test_each_byte_of_a_word_is_pooled_by_itself():
    x = torch.full((1, 8, 3, 3), -128, dtype=torch.int8).contiguous(memory_format=CL)
    for channel in range(8):
        x[0, channel, channel % 3, channel // 3] = 16 * channel - 100
    assert pools.pool_int8(x, *ALL, None, None).flatten().tolist() == [16 * channel - 100 for channel in range(8)]
    means = pools.pool_int8(x, *ALL, 9.0, 0.0).flatten().tolist()
    assert means == [16 * channel - 100 for channel in range(8)]


def test_means_round_ties_to_the_even_byte():
    x = torch.zeros(1, 4, 2, 512, dtype=torch.int8).contiguous(memory_format=CL)
    x[:, :, 0, ::2] = (torch.arange(256) - 128).to(torch.int8)
    x[:, :, 1] = -128
    x[:, :, 0, 1::2] = -127
    args = (x, (2, 2), (2, 2), (0, 0), False, 2.0, 0.0)  # (byte + 1) / 4 * 2
    expected = even(torch.arange(1, 257)) - 128
    for run in (pools.pool_int8, POOL_INT8.reference):
        assert torch.equal(run(*args)[0, 2, 0].long(), expected)


def test_means_are_divided_and_scaled_with_one_rounding_each():
    """Not multiplied by a rounded inverse; nor rounded between multiplication and addition. All of it next to half way."""
    scale, apart, wanted = torch.tensor(60.3), {"by the inverse": 0, "rounded twice": 0}, 6
    for total in range(60, 250):
        x = torch.full((49,), -128, dtype=torch.int8)
        x[0] += total
        x = x.view(1, 1, 7, 7).expand(1, 4, 7, 7).contiguous(memory_format=CL)
        mean, inverse = torch.tensor(float(total)) / 49, torch.tensor(float(total)) * (torch.tensor(1.0) / 49)
        bias = (20.5 - mean.double() * scale.double()).float()
        args = (x, *ALL, scale.item(), bias.item())
        expected = POOL_INT8.reference(*args)
        other = (inverse.double() * scale.double() + bias.double()).float(), mean * scale + bias
        wrong = [name for name, value in zip(apart, other, strict=True) if value.round() - 128 != expected[0, 0, 0, 0]]
        if any(apart[name] < wanted for name in wrong):
            assert torch.equal(pools.pool_int8(*args), expected)
            apart.update({name: apart[name] + 1 for name in wrong})
    assert min(apart.values()) >= wanted, apart


@pytest.mark.parametrize("shift", [16, 17])
def test_memory_around_is_neither_read_nor_written(monkeypatch, shift):
    """At an address that vectors can be read from, and at one that they cannot."""
    made, real = [], torch.empty

    def empty(shape, dtype, device):
        memory = torch.full((torch.Size(shape).numel() + 4096,), 99, dtype=dtype)
        made.append((memory, torch.Size(shape).numel()))
        return memory[2048 : 2048 + made[-1][1]].view(shape)

    def moved(t):
        memory = torch.full((t.numel() + 4096,), 99, dtype=t.dtype)
        return torch.as_strided(memory, t.shape, t.stride(), 2048 + shift).copy_(t)

    x, words = torch.randn(2, 3, 41, 30), drawn((2, 20, 7, 9))
    expected = [*images.quantize_int8(x, 50.0, 120, 4, NONE), pools.pool_int8(words, *STEM, None, None)]
    monkeypatch.setattr(torch, "empty", empty)
    found = [*images.quantize_int8(moved(x), 50.0, 120, 4, NONE), pools.pool_int8(moved(words), *STEM, None, None)]
    monkeypatch.setattr(torch, "empty", real)
    assert all(map(torch.equal, found, expected)) and len(made) == 3
    for memory, size in made:
        assert (memory[:2048] == 99).all() and (memory[2048 + size :] == 99).all()


def test_offsets_of_64_bits(monkeypatch):
    """The kernel for tensors beyond 2^31 elements, at a size that fits the test."""
    x = drawn((2, 20, 7, 9))
    expected = pools.pool_int8(x, *STEM, 1.1, 3.0)
    monkeypatch.setattr(pools, "index_type", lambda numel: pools.tl.int64)
    assert torch.equal(pools.pool_int8(x, *STEM, 1.1, 3.0), expected)


def test_views_that_negate_are_read_as_their_values():
    x, words = torch.randn(1, 3, 5, 5), drawn((1, 8, 5, 5)).clamp_(min=-127)
    assert same(images.quantize_int8(torch._neg_view(-x), 50.0, 120, 4, NONE), images.quantize_int8(x, 50.0, 120, 4, NONE))
    args = (*STEM, None, None)
    assert torch.equal(pools.pool_int8(torch._neg_view(-words), *args), pools.pool_int8(words, *args))


def test_the_tuner_lets_both_pass_and_nothing_that_is_off_by_one():
    session = tuner.Session(CPU)
    for op in (QUANTIZE_INT8, POOL_INT8):
        assert session.on_samples(op, op.backends[0], (torch.float32,)) is None

        def off(*args, op=op):
            found = op.reference(*args)
            (found[0] if isinstance(found, tuple) else found)[0, 0, 0, 0] ^= 1
            return found

        assert tuner.judge(op, off, op.samples(CPU, torch.float32)[0].args) == "output 0 has other integers"


def test_refused():
    (images_by_triton, _), (pools_by_triton, _) = QUANTIZE_INT8.backends, POOL_INT8.backends
    x, words = torch.randn(2, 3, 8, 8), drawn((1, 8, 6, 6))
    assert images_by_triton.why_not(x, 50.0, 120, 4, NONE) is None and pools_by_triton.why_not(words, *STEM, None, None) is None
    assert "float32" in images_by_triton.why_not(x.double(), 50.0, 120, 4, NONE)
    assert "4 channels, got 3" in images_by_triton.why_not(x, 50.0, 120, 3, NONE)
    assert "dense" in images_by_triton.why_not(x[:, :, 1:], 50.0, 120, 4, NONE)
    assert "empty" in images_by_triton.why_not(x[:0], 50.0, 120, 4, NONE)
    assert "pixels" in images_by_triton.why_not(torch.empty(1, 1, 2**15, 2**14, device="meta"), 50.0, 120, 4, NONE)
    assert "got 7" in pools_by_triton.why_not(words[:, :7], *STEM, None, None)
    assert "channels_last" in pools_by_triton.why_not(words.contiguous(), *STEM, None, None)
    assert "empty" in pools_by_triton.why_not(words[:0], *STEM, None, None)
