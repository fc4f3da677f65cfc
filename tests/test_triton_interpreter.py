"""Triton kernels called directly, in the interpreter: partitions, tiles, layouts and corners no registry sample has."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from _cuda_calls import gpu_relu
from tolerances import assert_close_to_truth

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from fastres.kernels.triton import (  # noqa: E402
    add_act,
    batch_norm,
    bn_act,
    bn_act_maxpool,
    bn_add_act,
    bn_add_bn_act,
    configs,
    conv_bn_act,
    device,
    relu_mask,
    why_not,
)  # fmt: skip
from fastres.ops import REGISTRY, _mask  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
EPS = 1e-5
# One program; many programs of one tile; programs of several tiles with an overhanging end; channels cut into tiles.
TILES = (None, configs.TileConfig(8, 1, 1), configs.TileConfig(4, 4, 1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def few_programs(monkeypatch):
    """Partitions in which a program walks several tiles, as large tensors have."""
    monkeypatch.setattr(configs, "PROGRAMS", 4)
    configs.partition.cache_clear()
    yield
    configs.partition.cache_clear()


def draw(shape, dtype, layout=torch.contiguous_format, mean=0.0):
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout)


def in_double(args):
    return (a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def judge(actual, reference, args, dtype):
    """Each output against float64 truth, with torch's error at dtype as the yardstick; strides as torch gives them."""
    theirs, truth = reference(*args), reference(*in_double(args))
    for name, value in actual.items():
        assert_close_to_truth(value, theirs[name], truth[name], dtype, name)


def batch_norm_reference(x, residual, weight, bias, mean, var, grad_y, grad_y2, y, training):
    """All outputs in plain torch; the ReLU mask is that of y, so that rounding cannot flip it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias))
    statistics = (None, None) if training else (mean.to(wide), var.to(wide))
    z = F.batch_norm(x, *statistics, weight, bias, training, 0.0, EPS)
    dz = torch.where(y <= 0, 0, grad_y if grad_y2 is None else grad_y + grad_y2)
    names = [name for name, t in (("grad_x", x), ("grad_weight", weight), ("grad_bias", bias)) if t is not None]
    inputs = [t for t in (x, weight, bias) if t is not None]
    found = dict(zip(names, torch.autograd.grad(z, inputs, dz), strict=True))
    found["y"] = F.relu(z.detach() if residual is None else z.detach() + residual)
    found["grad_residual"] = dz
    found["mean"], found["var"] = x.detach().to(wide).mean((0, 2, 3)), x.detach().to(wide).var((0, 2, 3), correction=0)
    return found


def run_batch_norm(x, residual, weight, bias, mean, var, grad_y, grad_y2, training, config):
    """All outputs of the Triton kernels, and y for the reference's mask."""
    if training:
        mean, var = bn_act.statistics(x, config)
    mask = None if residual is None else relu_mask.empty(x, "relu")
    y = bn_act.apply(x, residual, weight, bias, mean, var, EPS, "relu", config, mask)
    grad_x, dz, grad_weight, grad_bias = bn_act.backward(
        grad_y, grad_y2, mask, x, weight, bias, mean, var, EPS, "relu", training, config
    )
    found = {"y": y, "grad_x": grad_x}
    found |= {} if residual is None else {"grad_residual": dz}
    found |= {} if weight is None else {"grad_weight": grad_weight}
    found |= {} if bias is None else {"grad_bias": grad_bias}
    return found | ({"mean": mean, "var": var} if training else {})


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("with_residual", (False, True), ids=("bn_act", "bn_add_act"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm(dtype, layout, with_residual, training, few_programs):
    x = draw((2, 5, 7, 3), dtype, layout, mean=1.0)
    residual = draw(x.shape, dtype, layout) if with_residual else None
    weight, bias = torch.tensor([1.5, 0.0, -0.7, 1.0, 0.3]), torch.randn(5)
    mean, var, grad_y = torch.randn(5), torch.rand(5) + 0.5, draw(x.shape, dtype, layout)
    for config in TILES:
        both = with_residual and config is TILES[-1]
        for second in (None, draw(x.shape, dtype, layout)) if both else (None,):
            args = (x, residual, weight, bias, mean, var, grad_y, second)
            found = run_batch_norm(*args, training, config)
            assert found["y"].stride() == found["grad_x"].stride() == x.stride()
            judge(found, batch_norm_reference, (*args, found["y"], training), dtype)


@pytest.mark.parametrize("parameters", ("none", "weight", "bias"))
def test_batch_norm_without_parameters(parameters):
    x, grad_y = draw((2, 3, 4, 4), torch.float32), draw((2, 3, 4, 4), torch.float32)
    args = (x, None, *(torch.randn(3) if parameters == p else None for p in ("weight", "bias")), None, None, grad_y, None)
    found = run_batch_norm(*args, True, None)
    judge(found, batch_norm_reference, (*args, found["y"], True), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
def test_statistics_far_from_zero(layout, few_programs):
    x = draw((4, 3, 9, 5), torch.float32, layout, mean=1e4)
    for config in TILES:
        mean, var = bn_act.statistics(x, config)
        truth = x.double()
        assert (mean - truth.mean((0, 2, 3))).abs().max() <= 1e4 * 2**-24 * 2
        assert (var / truth.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("value", (0.1, 100.0, -1e4))
def test_constant_channel_has_no_variance(value, few_programs):
    x = torch.full((3, 2, 5, 5), value)
    for layout in LAYOUTS:
        for config in TILES:
            mean, var = bn_act.statistics(x.contiguous(memory_format=layout), config)
            assert torch.equal(mean, torch.full((2,), value))
            assert torch.equal(var, torch.zeros(2))


def test_statistics_do_not_depend_on_the_run():
    x = draw((2, 3, 8, 8), torch.float32)
    first, second = bn_act.statistics(x, TILES[1]), bn_act.statistics(x, TILES[1])
    assert all(map(torch.equal, first, second))


def test_gradients_take_the_parameters_dtypes():
    x, grad_y, statistics = draw((2, 3, 4, 4), torch.bfloat16), draw((2, 3, 4, 4), torch.bfloat16), torch.ones(3)
    weight, bias = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)
    args = (statistics, statistics, EPS, "relu", True)
    _, grad_weight, grad_bias = bn_act.bn_act_backward(grad_y, x, weight, bias, *args)
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.bfloat16, torch.float16)
    _, grad_weight, grad_bias = bn_act.bn_act_backward(grad_y, x, None, None, *args)
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.float32, torch.float32)
    mask = relu_mask.empty(x, "relu").zero_()
    _, _, grad_weight, grad_bias = bn_add_act.bn_add_act_backward(grad_y, None, mask, x, weight, *args[:-1])
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.bfloat16, torch.bfloat16)


def test_parameters_may_be_strided_and_narrow():
    x = draw((2, 3, 4, 4), torch.bfloat16)
    wide = torch.rand(3, 4) + 0.5
    columns = [wide[:, i].bfloat16() for i in range(4)]
    strided = [wide.bfloat16()[:, i] for i in range(4)]
    expected = bn_act.bn_act(x, *columns, EPS, "relu")
    assert torch.equal(bn_act.bn_act(x, *strided, EPS, "relu"), expected)


def same_bits(actual, expected):
    """Whether NaN stands in the same places, and everything else is the same, down to the sign of zero."""
    numbers = ~expected.isnan()
    return torch.equal(actual.isnan(), ~numbers) and torch.equal(
        actual[numbers].view(torch.int32), expected[numbers].view(torch.int32)
    )


# Kernel, stride, padding: the stem's; strides beyond the window; overlap in one direction, padding that no window needs.
WINDOWS = (((3, 3), (2, 2), (1, 1)), ((2, 3), (3, 1), (1, 1)), ((4, 3), (2, 3), (2, 1)))


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(("dtype", "window"), list(zip(DTYPES, WINDOWS, strict=True)), ids=str)
def test_pooling(dtype, window, layout, training, few_programs):
    x, weight, bias = draw((2, 3, 7, 6), dtype, layout, mean=1.0), torch.tensor([1.5, 0.0, -0.7]), torch.randn(3)
    forward, backward = REGISTRY["bn_act_maxpool"].reference, REGISTRY["bn_act_maxpool_backward"].reference
    for config in (None, configs.TileConfig(8, 2, 1)):
        mean, var = bn_act.statistics(x) if training else (torch.randn(3), torch.rand(3) + 0.5)
        args = (x, weight, bias, mean, var, EPS, "relu", *window)
        y = bn_act_maxpool.bn_act_maxpool(*args, config=config)
        judge({"y": y}, lambda *args: {"y": forward(*args)}, args, dtype)
        assert y.is_contiguous(memory_format=layout)
        grad_y = draw(y.shape, dtype, layout)
        args = (grad_y, *args[:7], training, *window)
        found = bn_act_maxpool.bn_act_maxpool_backward(*args, config=config)
        judge(dict(enumerate(found)), lambda *args: dict(enumerate(backward(*args))), args, dtype)
        assert found[0].stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", ((2, 3, 7, 3), (3, 24, 4, 6)))
def test_the_mask_is_that_of_the_output(shape, layout, few_programs):
    """Of both forms of training, in tiles of whole bytes and others; NaN and zeros among the values."""
    x, residual = torch.zeros(shape).contiguous(memory_format=layout), draw(shape, torch.float32, layout)
    residual[0, :, :2, :2], residual[-1, :, 0] = torch.nan, 0.0
    zero, one = torch.zeros(shape[1]), torch.ones(shape[1])
    for config in (None, configs.TileConfig(8, 2, 1), configs.TileConfig(16, 8, 1), configs.TileConfig(4, 16, 1)):
        masks = [relu_mask.empty(x, "relu").fill_(85) for _ in range(2)]
        y = bn_act.apply(x, residual, None, None, zero, one, EPS, "relu", config, masks[0])
        assert torch.equal(masks[0], _mask.pack(y, "relu"))
        norm = None, None, zero, one, EPS
        y = bn_add_bn_act.bn_add_bn_act(x, residual, *norm, *norm, "relu", config, masks[1])
        assert torch.equal(masks[1], _mask.pack(y, "relu"))
        assert torch.equal(masks[1], masks[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_batch_norms(dtype, layout, few_programs):
    x, residual = draw((2, 3, 7, 3), dtype, layout, mean=1.0), draw((2, 3, 7, 3), dtype, layout)
    weight, bias, eps = torch.tensor([1.5, 0.0, -0.7]), torch.randn(3), (EPS, 1e-3)
    forward, backward = REGISTRY["bn_add_bn_act"].reference, REGISTRY["bn_add_bn_act_backward"].reference
    for config in (None, configs.TileConfig(8, 2, 1)):
        stats = [bn_act.statistics(t, config) for t in (x, residual)]
        own, other = ((weight, bias, *stats[0], eps[0]), (bias, weight, *stats[1], eps[1]))
        y = bn_add_bn_act.bn_add_bn_act(x, residual, *own, *other, "relu", config)
        judge({"y": y}, lambda *args: {"y": forward(*args)}, (x, residual, *own, *other, "relu"), dtype)
        norms = (weight, *stats[0], eps[0], bias, *stats[1], eps[1])
        for second in (None, draw(x.shape, dtype, layout)):
            args = (draw(x.shape, dtype, layout), second, _mask.pack(y, "relu"), x, residual, *norms, "relu")
            found = bn_add_bn_act.bn_add_bn_act_backward(*args, config=config)
            judge(dict(enumerate(found)), lambda *args: dict(enumerate(backward(*args))), args, dtype)
            assert y.stride() == found[0].stride() == found[1].stride() == x.stride()


@pytest.mark.parametrize("act", ("relu", "none"))
def test_pooling_finds_the_positions_that_torch_finds(act):
    """Ties, NaN and infinities everywhere: the first maximum, the last NaN, nothing where the ReLU stops it."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0, 1.0, 2.0, -1.0, -2.0, -3.0])
    for window, choices in itertools.product(WINDOWS, (values, values[3:], values[2:3])):
        x = choices[torch.randint(len(choices), (1, 4, 9, 7))].contiguous(memory_format=torch.channels_last)
        neutral = (None, None, torch.zeros(4), torch.ones(4), 1e-30, act)
        y = bn_act_maxpool.bn_act_maxpool(x, *neutral, *window)
        assert same_bits(y + 0.0, F.max_pool2d(x.relu() if act == "relu" else x, *window) + 0.0)
        grad_y = torch.randint(1, 9, y.shape).to(y).contiguous(memory_format=torch.channels_last)
        args = (grad_y, x, *neutral, False, *window)
        found, expected = bn_act_maxpool.bn_act_maxpool_backward(*args), REGISTRY["bn_act_maxpool_backward"].reference(*args)
        assert same_bits(found[0] + 0.0, expected[0] + 0.0)
        assert torch.equal(found[2], expected[2])


SPECIAL = (float("nan"), -0.0, 0.0, float("inf"), float("-inf"), 1e-40, -1e-40)


def test_special_values_add_act():
    x = torch.tensor(SPECIAL).repeat(3)
    zero = torch.full_like(x, -0.0)
    y = add_act.add_act(x, zero, "relu")
    assert same_bits(y, gpu_relu(x + zero))
    grad_y = torch.ones_like(x)
    assert torch.equal(add_act.add_act_backward(grad_y, y, "relu"), torch.where(y <= 0, 0.0, grad_y))


def test_special_values_bn_act():
    x = torch.tensor(SPECIAL).reshape(1, 1, 1, 7)
    neutral = (None, None, torch.zeros(1), torch.ones(1), 1e-12, "relu")
    y = bn_act.bn_act(x, *neutral)
    assert same_bits(y + 0.0, torch.relu(x) + 0.0)  # the affine map makes +0 of -0
    grad_x = bn_act.bn_act_backward(torch.ones_like(x), x, *neutral, False)[0]
    assert torch.equal(grad_x, torch.where(y <= 0, 0.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ("relu", "none"))
def test_add_act(dtype, act):
    shape = (3, 7, 5, 3)
    for x in (draw(shape, dtype), draw(shape, dtype).permute(3, 0, 2, 1), draw((316,), dtype)[1:].view(shape)):
        residual, grad_y = (torch.randn_like(x, dtype=torch.float32).to(dtype) for _ in range(2))
        residual, grad_y = (t if t.stride() == x.stride() else t.clone() for t in (residual, grad_y))
        y = add_act.add_act(x, residual, act, configs.FlatConfig(128, 1))

        def reference(x, residual, y, grad_y):
            z = x + residual
            relu = act == "relu"
            return {"y": F.relu(z) if relu else z, "grad": torch.where(y <= 0, 0, grad_y) if relu else grad_y}

        grad = add_act.add_act_backward(grad_y, y, act, configs.FlatConfig(128, 1))
        assert y.stride() == x.stride() == grad.stride()
        judge({"y": y, "grad": grad}, reference, (x, residual, y, grad_y), dtype)


def test_negative_views():
    x = torch.complex(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)).conj().imag
    assert x.is_neg()
    x, residual = torch._neg_view(torch.randn(2, 3, 4, 4)), torch.randn(2, 3, 4, 4)
    assert torch.equal(add_act.add_act(x, residual, "relu"), torch.relu(x + residual))
    assert torch.equal(bn_act.statistics(x)[0], bn_act.statistics(x.clone())[0])


# kernel, stride, padding, dilation, channels in, channels out, groups
CONVOLUTIONS = (
    (1, 1, 0, 1, 24, 17, 1),
    (1, 2, 0, 1, 16, 16, 1),
    (1, 1, 1, 1, 8, 8, 1),
    (3, 1, 1, 1, 5, 7, 1),
    (3, 2, 1, 1, 36, 20, 1),
    (3, 1, 2, 2, 33, 32, 1),
    (7, 2, 3, 1, 3, 16, 1),
    (3, 2, 1, 1, 12, 18, 3),
    (3, 1, 1, 1, 9, 9, 9),
    (3, 2, 1, 1, 66, 10, 2),
    (1, 1, 0, 1, 24, 16, 4),
)


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_act(dtype, convolution):
    k, stride, padding, dilation, channels_in, channels_out, groups = convolution
    geometry = ((stride, stride), (padding, padding), (dilation, dilation))
    x = draw((2, channels_in, 7, 6), dtype, torch.channels_last)
    weight = draw((channels_out, channels_in // groups, k, k), dtype) / (channels_in // groups * k * k) ** 0.5
    bias = torch.randn(channels_out)
    like = F.conv2d(x.float(), weight.float(), None, *geometry, groups)
    for residual in (None, draw(like.shape, dtype, torch.channels_last)):

        def reference(x, weight, bias, residual):
            z = F.conv2d(x, weight, bias.to(x.dtype), *geometry, groups)
            return {"y": F.relu(z if residual is None else z + residual)}

        for config in (None, configs.ConvConfig(32, 32, 16, 1, 1, group_m=2)):
            packed = conv_bn_act.pack(weight, False)
            options = {"config": config, "groups": groups}
            y = conv_bn_act.conv_act(x, packed, bias, residual, (k, k), *geometry, "relu", False, **options)
            assert y.is_contiguous(memory_format=torch.channels_last)
            judge({"y": y}, reference, (x, weight, bias, residual), dtype)


def test_conv_act_is_exact_on_small_integers():
    x = torch.randint(-3, 4, (2, 12, 6, 5)).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-3, 4, (9, 12, 3, 3)).half()
    y = conv_bn_act.conv_act(x, conv_bn_act.pack(weight, False), None, None, (3, 3), (1, 1), (1, 1), (1, 1), "none", False)
    assert torch.equal(y.float(), F.conv2d(x.float(), weight.float(), padding=1))


@pytest.mark.parametrize("groups", (1, 3))
def test_a_convolution_keeps_nan_where_it_belongs(groups):
    """In its own window and group: neither lost in the ReLU nor spread by what lies beyond an edge."""
    x, weight = draw((1, 6, 6, 5), torch.float32, torch.channels_last), draw((9, 6 // groups, 3, 3), torch.float32)
    x[0, 1, 0, 0], x[0, 4, 3, 3] = torch.nan, torch.inf
    geometry = (1, 1), (1, 1), (1, 1)
    y = conv_bn_act.conv_act(x, conv_bn_act.pack(weight, False), None, None, (3, 3), *geometry, "relu", False, groups=groups)
    expected = F.conv2d(x, weight, None, *geometry, groups).relu()
    nan = expected.isnan()
    assert nan.any() and not nan.all() and torch.equal(y.isnan(), nan)
    torch.testing.assert_close(y[~nan], expected[~nan])


def test_offsets_of_64_bits(monkeypatch):
    """The kernels for tensors beyond 2^31 elements, at a size that fits the test."""
    x, residual = draw((2, 5, 7, 3), torch.float32, torch.channels_last), torch.zeros(2, 5, 7, 3)
    residual = residual.contiguous(memory_format=torch.channels_last)
    weight = conv_bn_act.pack(torch.randn(4, 5, 3, 3), False)

    def run():
        y = conv_bn_act.conv_act(x, weight, None, None, (3, 3), (1, 1), (1, 1), (1, 1), "relu", False)
        return y, *bn_add_act.bn_add_act_train(x, residual, None, None, EPS, "relu")

    narrow = run()
    for module in (bn_act, conv_bn_act):
        monkeypatch.setattr(module, "index_type", lambda numel: batch_norm.tl.int64)
    assert all(map(torch.equal, run(), narrow))
    assert device.index_type(2**31) == batch_norm.tl.int64


def test_refusals():
    x = torch.randn(2, 4, 5, 5)
    assert why_not(x) is None
    assert "float64" in why_not(x.double())
    assert "one dtype" in why_not(x, x.half())
    assert "dense" in why_not(x[:, :, 1:])
    assert "empty" in why_not(x[:0])
    image, weight = x.contiguous(memory_format=torch.channels_last), torch.randn(4, 4, 3, 3)
    rest = (None, None, None, x, x, EPS, (1, 1), (1, 1), (1, 1))
    assert conv_bn_act.why_not(image, weight, *rest, 1, "relu") is None
    assert "channels_last" in conv_bn_act.why_not(x, weight, *rest, 1, "relu")


def test_heuristics_choose_legal_configurations():
    limits = configs.Limits(90, 227 << 10)
    for pixels, channels_out, depth in ((1, 1, 1), (49, 2048, 512), (802816, 64, 576), (12544, 512, 4608)):
        for (itemsize, tf32), few in itertools.product(((2, False), (4, True), (4, False)), (False, True)):
            legal = configs.conv_candidates(itemsize, tf32, limits, few)
            assert configs.conv_heuristic(pixels, channels_out, depth, itemsize, tf32, limits, few) in legal
    assert configs.conv_candidates(2, False, configs.Limits(89, 99 << 10))
