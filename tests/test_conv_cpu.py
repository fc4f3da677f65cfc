"""The native CPU convolution, direct and by Winograd: any geometry, values that are not finite, threads, error texts."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth

import fastres
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_cpu

pytestmark = pytest.mark.cpu
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def library():
    native.load()


def draw(seed):
    """A convolution of random geometry with its operands; every second one suits Winograd's algorithm."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=g)]

    winograd = seed % 2 == 1
    kernel = (3, 3) if winograd else (pick(1, 2, 3, 5), pick(1, 3, 4))
    stride = (1, 1) if winograd else (pick(1, 2, 3), pick(1, 2))
    dilation = (1, 1) if winograd else (pick(1, 1, 2), pick(1, 1, 2))
    padding = (pick(0, 1, 2), pick(0, 1, 2))
    channels, out = pick(16, 32, 48, 288) if winograd else pick(16, 18, 32, 70, 300), pick(1, 8, 16, 40, 64, 83, 150)
    x = torch.randn(pick(1, 2, 3), channels, pick(9, 11, 14), pick(9, 10, 17), generator=g)
    weight = torch.randn(out, channels, *kernel, generator=g) / (channels * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(out, generator=g)
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    residual = torch.randn(y.shape, generator=g) if pick(True, False) else None
    return x, residual, weight, bias, (stride, padding, dilation), pick("relu", "none"), winograd


def run(x, residual, weight, bias, geometry, act, winograd, groups=1):
    packed = _conv_cpu.Packed(weight, bias, x.dtype, winograd, groups)
    x = x if packed.padded else x.contiguous(memory_format=LAST)
    residual = None if residual is None else residual.contiguous(memory_format=LAST)
    form = groups, packed.channels, packed.padded, winograd, act
    return native.op("cpu_conv_bn_act")(x, residual, packed.weight, packed.bias, weight.shape[2:], *geometry, *form)


def plain(x, residual, weight, bias, geometry, act, groups=1):
    y = F.conv2d(x, weight, bias.to(x.dtype), *geometry, groups)
    y = y if residual is None else y + residual
    return y.relu() if act == "relu" else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 8, 15])
@pytest.mark.parametrize("kernel, padding", [((1, 2), (0, 0)), ((1, 3), (0, 1)), ((1, 7), (0, 0))])
def test_one_row_of_taps_over_few_channels(kernel, padding, channels, dtype):
    """Copied, such a convolution is one tap a pixel, but has fewer pixels than its input."""
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    g = torch.Generator().manual_seed(channels)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((2, channels, 5, 9), (20, channels, *kernel), (20,)))
    x, weight, geometry = x.to(dtype), weight.to(dtype), ((1, 1), padding, (1, 1))
    truth = plain(x.double(), None, weight.double(), bias.double(), geometry, "none")
    own = run(x, None, weight, bias, geometry, "none", False)
    assert_close_to_truth(own, plain(x, None, weight, bias, geometry, "none"), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_any_geometry(seed, dtype):
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    x, residual, weight, bias, *rest, winograd = draw(seed)
    x, weight = x.to(dtype), weight.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    doubles = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    y = run(x, residual, weight.float(), bias, *rest, winograd and dtype == torch.float32)
    assert_close_to_truth(y, plain(x, residual, weight, bias, *rest), plain(*doubles, *rest), dtype, str(seed))


@pytest.mark.parametrize("channels", [1, 3, 5, 15])
def test_few_channels_are_padded_first(channels):
    x, weight, bias = torch.randn(2, channels, 19, 13), torch.randn(20, channels, 7, 5), torch.randn(20)
    rest = ((2, 1), (3, 2), (1, 1)), "relu"
    for given in (x, x.contiguous(memory_format=LAST), x.flip(3)[:, :, :, ::1], x.expand(2, -1, -1, -1)):
        y = run(given, None, weight, bias, *rest, False)
        same = plain(given, None, weight, bias, *rest)
        assert_close_to_truth(y, same, plain(given.double(), None, weight.double(), bias.double(), *rest), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("winograd", [False, True])
def test_what_is_not_finite_stays_where_pytorch_has_it(value, winograd):
    """A transform mixes 4x4 pixels: without its way around, a NaN would reach outputs that do not see it."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 32, 9, 10, generator=g), torch.randn(33, 32, 3, 3, generator=g) / 17
    for place in ((0, 0, 0, 0), (1, 31, 8, 9), (0, 5, 4, 4)):
        x[place] = value
    rest = ((1, 1), (1, 1), (1, 1)), "none"
    y, expected = run(x, None, weight, torch.zeros(33), *rest, winograd), plain(x, None, weight, torch.zeros(33), *rest)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y.sign().nan_to_num(), expected.sign().nan_to_num()) or value == 3e38
    finite = expected.isfinite()
    assert (y[finite] - expected[finite]).abs().max() <= 1e-5 * expected[finite].abs().max()


# Channels, and those of a group.
GROUPS = [(16, 4), (16, 1), (32, 8), (48, 2), (64, 4), (64, 16), (96, 32), (128, 64), (256, 8), (512, 4), (272, 16)]
# Of which no whole number makes whole vectors.
GROUPS += [(17, 1), (270, 2), (24, 8), (312, 8), (33, 3), (36, 12), (48, 24), (120, 40), (112, 56)]


def grouped(channels, own, dtype, seed=0):
    """A convolution in groups with its operands, and what follows them in the op's arguments."""
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    if reason := _conv_cpu.why_not_groups(channels, channels, channels // own, dtype):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(seed)
    geometry = (((1, 1), (1, 1), (1, 1)), ((2, 1), (2, 0), (1, 2)), ((1, 2), (0, 1), (2, 1)))[seed % 3]
    kernel = ((3, 3), (5, 3), (1, 2))[seed // 3 % 3]
    x, weight = torch.randn(3, channels, 9, 11, generator=g), torch.randn(channels, own, *kernel, generator=g)
    bias = torch.randn(channels, generator=g)
    residual = torch.randn(F.conv2d(x, weight, None, *geometry, channels // own).shape, generator=g) if seed % 2 else None
    operands = x.to(dtype), None if residual is None else residual.to(dtype), weight.to(dtype), bias
    return operands, (geometry, "relu" if seed % 2 else "none"), channels // own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels, own", GROUPS)
def test_groups(channels, own, dtype):
    for seed in range(9):
        operands, rest, groups = grouped(channels, own, dtype, seed)
        x, residual, weight, bias = operands
        doubles = [None if t is None else t.double() for t in operands]
        y = run(x, residual, weight.float(), bias, *rest, False, groups)
        truth = plain(*doubles, *rest, groups)
        assert_close_to_truth(y, plain(*operands, *rest, groups), truth, dtype, f"seed {seed}")


@pytest.mark.parametrize("channels, own", GROUPS)
def test_a_group_sees_no_other(channels, own):
    """Not even where a vector holds both: zero times infinity would tell."""
    (x, _, weight, bias), rest, groups = grouped(channels, own, torch.float32)
    x[0, own, 3, 3], x[1, channels - 1, 0, 0] = float("inf"), float("nan")
    y, expected = run(x, None, weight, bias, *rest, False, groups), plain(x, None, weight, bias, *rest, groups)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("channels, own", [(64, 4), (64, 16), (96, 32), (24, 8), (120, 40)])
def test_groups_give_the_same_bits_for_any_number_of_threads_and_any_batch(channels, own):
    (x, _, weight, bias), rest, groups = grouped(channels, own, torch.float32)
    whole = run(x, None, weight, bias, *rest, False, groups)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(x, None, weight, bias, *rest, False, groups), whole)
    finally:
        torch.set_num_threads(before)
    for index in range(3):
        assert torch.equal(run(x[index : index + 1], None, weight, bias, *rest, False, groups), whole[index : index + 1])


@pytest.mark.parametrize("channels, out, groups", [(32, 64, 4), (8, 8, 2)])
def test_groups_of_other_or_few_channels_run_elsewhere(channels, out, groups):
    x, weight = torch.randn(1, channels, 5, 5), torch.randn(out, channels // groups, 3, 3)
    geometry, norm = ((1, 1), (1, 1), (1, 1), groups), (None, None, None, torch.zeros(out), torch.ones(out), 1e-5)
    choice = REGISTRY["conv_bn_act"].explain(x, weight, *norm, *geometry, "none")
    assert choice.backend.name != "cpu" and "groups must have" in choice.refusals["cpu"]
    with pytest.raises(RuntimeError, match="groups"):
        form = [3, 3], *geometry[:3], groups + 5, channels, False, False, "none"
        native.op("cpu_conv_bn_act")(x.contiguous(memory_format=LAST), None, weight, torch.zeros(out), *form)


def test_relu_passes_nan_and_keeps_the_sign_of_zero():
    x, weight = torch.full((1, 16, 1, 2), float("nan")), torch.zeros(16, 16, 1, 1)
    x[..., 1] = 0.0
    residual = torch.full((1, 16, 1, 2), -0.0)
    y = run(x, residual, weight, torch.full((16,), -0.0), ((1, 1), (0, 0), (1, 1)), "relu", False)
    assert y[..., 0].isnan().all() and (y[..., 1] == 0).all()


@pytest.mark.parametrize("winograd", [False, True])
def test_integers_are_exact(winograd):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (2, 64, 12, 9), generator=g).float()
    weight = 4.0 * torch.randint(-2, 3, (70, 64, 3, 3), generator=g)  # the transform divides by four
    bias = torch.randint(-9, 9, (70,), generator=g).float()
    rest = ((1, 1), (1, 1), (1, 1)), "relu"
    assert torch.equal(run(x, None, weight, bias, *rest, winograd), plain(x, None, weight, bias, *rest))


@pytest.mark.parametrize("winograd", [False, True])
def test_the_same_bits_for_any_number_of_threads_and_any_batch(winograd):
    x, weight, bias = torch.randn(5, 64, 13, 11), torch.randn(96, 64, 3, 3), torch.randn(96)
    rest = ((1, 1), (1, 1), (1, 1)), "none", winograd
    whole = run(x, None, weight, bias, *rest)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(x, None, weight, bias, *rest), whole)
    finally:
        torch.set_num_threads(before)
    for index in range(5):
        assert torch.equal(run(x[index : index + 1], None, weight, bias, *rest), whole[index : index + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel, out", [(1, 300), (3, 300), (3, 64)])
def test_the_same_bits_however_pixels_and_channels_are_shared_out(kernel, out, dtype):
    """Few pixels and many channels: threads take blocks of channels, parts of one, or, from one image to many, pixels."""
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    g = torch.Generator().manual_seed(kernel)
    x, weight = (torch.randn(shape, generator=g) for shape in ((9, 256, 7, 9), (out, 256, kernel, kernel)))
    x, bias, rest = x.to(dtype), torch.randn(out, generator=g), (((1, 1), (kernel // 2,) * 2, (1, 1)), "relu", False)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            found.append(run(x, None, weight, bias, *rest))
            assert torch.equal(found[-1], found[0])
            assert torch.equal(run(x[4:5], None, weight, bias, *rest), found[0][4:5])
    finally:
        torch.set_num_threads(before)
    doubles, same = (x.double(), None, weight.to(dtype).double(), bias.double()), (x, None, weight.to(dtype), bias)
    assert_close_to_truth(found[0], plain(*same, *rest[:2]), plain(*doubles, *rest[:2]), dtype)


def test_the_op_refuses_what_would_leave_its_memory():
    x, bias = torch.randn(1, 16, 8, 8).contiguous(memory_format=LAST), torch.zeros(16)
    packed = _conv_cpu.Packed(torch.randn(16, 16, 3, 3), bias, torch.float32)
    conv = native.op("cpu_conv_bn_act")
    good = [x, None, packed.weight, bias, [3, 3], [1, 1], [1, 1], [1, 1], 1, 16, False, False, "relu"]
    conv(*good)
    wrong = {
        0: (x.contiguous(), "channels_last"), 1: (torch.randn(1, 16, 7, 8), "residual"), 2: (packed.weight[:-1], "packed"),
        3: (bias.double(), "bias"), 4: ([5, 3], "packed"), 5: ([0, 1], "stride"), 6: ([-1, 0], "padding"),
        7: ([1, 0], "dilation"), 8: (3, "groups"), 9: (15, "channels"), 11: (True, "packed"), 12: ("gelu", "act"),
    }  # fmt: skip
    for place, (value, word) in wrong.items():
        with pytest.raises(RuntimeError, match=word):
            conv(*good[:place], value, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="no larger than the padded input"):
        conv(*good[:4], [11, 3], *good[5:])


def test_packing_reads_any_strides():
    weight = torch.randn(40, 64, 6, 3)[:, ::2, ::2]
    for winograd in (False, True):
        for other in (weight, weight.contiguous(memory_format=LAST), weight.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(_conv_cpu.pack(other, 1, winograd), _conv_cpu.pack(weight.contiguous(), 1, winograd))


def test_packing_refuses_what_would_leave_its_memory():
    weight, pack = torch.randn(16, 16, 3, 3), native.op("cpu_conv_pack")
    good = [weight, torch.empty(16 * 9 * 16), 16, 1, False]
    pack(*good)
    wrong = {
        0: (weight.double(), "float32, bfloat16 or int8"), 1: (torch.empty(16 * 9 * 16 - 1), "words"), 2: (8, "channels"),
        3: (3, "channels"), 4: (True, "words"),
    }  # fmt: skip
    further = [torch.randn(17, 16, 3, 3), weight[0], weight[:0], weight.to("meta"), weight.bfloat16(), weight[..., :1]]
    for place, value, word in [(k, *v) for k, v in wrong.items()] + [(0, w, "weight|packed|cpu") for w in further]:
        with pytest.raises((RuntimeError, NotImplementedError), match=word):
            pack(*good[:place], value, *good[place + 1 :])


def test_weights_that_are_not_finite_give_what_pytorch_gives():
    x, statistics = torch.randn(1, 32, 8, 8), (torch.zeros(32), torch.ones(32))
    weight = torch.randn(32, 32, 3, 3)
    weight[3, 4, 0, 0], weight[5, 0, 1, 1] = float("inf"), float("nan")
    with fastres.use(conv_bn_act="cpu"):
        y = fastres.functional.conv_bn_act(x, weight, None, *statistics, padding=1)
    with fastres.use(conv_bn_act="torch"):
        expected = fastres.functional.conv_bn_act(x, weight, None, *statistics, padding=1)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_that_meet_no_pixel_give_the_bias(dtype):
    """oneDNN with packed weights ended the process here, where taps stand at -3, -1 and 1, 3 about the one pixel of a row."""
    x, bias = torch.randn(2, 16, 4, 1).to(dtype), torch.arange(8.0)
    arguments = (x, torch.randn(8, 16, 2, 2), bias, None, None, torch.zeros(8), torch.ones(8), 1e-12)
    arguments += ((1, 2), (1, 3), (1, 2), 1, "none")
    for backend in REGISTRY["conv_bn_act"].backends:
        if backend.why_not(*arguments) is None:
            y = backend.load()(*arguments)
            assert y.shape == (2, 8, 5, 3) and torch.equal(y, bias.to(dtype).view(1, 8, 1, 1).expand_as(y)), backend.name


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "side", "backend"),
    [(64, 1, 1, 14, "onednn"), (64, 1, 1, 7, "cpu"), (64, 3, 1, 14, "cpu"), (64, 3, 64, 14, "onednn"), (64, 3, 32, 14, "cpu"),
     (64, 3, 4, 14, "onednn"), (3, 1, 1, 14, "cpu")],
)  # fmt: skip
def test_contiguous_images_are_moved_where_that_pays(channels, kernel, groups, side, backend):
    x, weight = torch.randn(2, channels, side, side), torch.randn(64, channels // groups, kernel, kernel)
    norm = torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64), 1e-5
    args = weight, None, *norm, (1, 1), (kernel // 2, kernel // 2), (1, 1), groups, "relu"
    op = REGISTRY["conv_bn_act"]
    assert op.explain(x, *args).backend.name == backend
    assert op.explain(x.contiguous(memory_format=LAST), *args).backend.name == "cpu"
    y, plain = op(x, *args), op.reference(x, *args)
    exact = op.reference(x.double(), *[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    assert y.is_contiguous()
    assert_close_to_truth(y, plain, exact, torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "onednn", "torch"])
@pytest.mark.parametrize("side", [7, 14])
def test_autocast_around_an_op_does_not_cast_what_it_is_given(backend, side):
    """The op's result has x's dtype, whatever runs it: fused steps cast before they call it."""
    x, weight = torch.randn(2, 64, side, side), torch.randn(64, 64, 3, 3)
    norm = torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64), 1e-5
    args = x, weight, None, *norm, (1, 1), (1, 1), (1, 1), 1, "relu"
    with torch.no_grad(), fastres.use(conv_bn_act=backend):
        expected = torch.ops.fastres.conv_bn_act(*args)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.ops.fastres.conv_bn_act(*args), expected)
