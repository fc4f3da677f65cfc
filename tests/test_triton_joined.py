"""Two convolutions as one product, in the interpreter: strides, tiles, tails of either's channels, groups, special values."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from _modules import compare, lively  # noqa: E402
from _torchvision import torchvision  # noqa: E402
from _uncaptured import Uncaptured  # noqa: E402
from test_triton_interpreter import DTYPES, draw, judge  # noqa: E402
from torch import nn  # noqa: E402

import fastres  # noqa: E402
import fastres.nn as fnn  # noqa: E402
from fastres import functional, tune, tuner  # noqa: E402
from fastres.frozen import device, make  # noqa: E402
from fastres.kernels.triton import batch_norm, configs, conv_bn_act, conv_bn_add_conv_bn_act  # noqa: E402
from fastres.ops import REGISTRY  # noqa: E402

CL = torch.channels_last
OP = REGISTRY["conv_bn_add_conv_bn_act"]
# Overhanging ends in every dimension, several bands of rows; one tile.
TILES = (None, configs.ConvConfig(32, 32, 16, 1, 1, group_m=2), configs.ConvConfig(64, 16, 32, 1, 2))
# The main convolution's kernel, stride, channels in and groups; channels out; the shortcut's channels and stride.
ENDS = (
    (1, 1, 24, 1, 17, 40, 1),
    (1, 1, 32, 1, 48, 33, 2),
    (3, 1, 5, 1, 7, 3, 2),
    (3, 2, 36, 1, 20, 12, 1),
    (3, 1, 36, 3, 18, 8, 2),
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def end(k, stride, channels, groups, out, depth, step, dtype=torch.float32):
    """x, its weight, the shortcut and its weight, of an output of 7x6."""
    x = draw((2, channels, 7 * stride, 6 * stride), dtype, CL)
    weight = draw((out, channels // groups, k, k), dtype) / (channels // groups * k * k) ** 0.5
    return x, weight, draw((2, depth, 7 * step, 6 * step), dtype, CL), draw((out, depth, 1, 1), dtype) / depth**0.5


def run(x, weight, bias, shortcut, own, own_bias, stride=1, step=1, groups=1, act="relu", config=None):
    k = weight.shape[2]
    geometry = (k, k), (stride, stride), (k // 2, k // 2), (1, 1), groups
    main, other = (conv_bn_act.pack(weight, False), bias), (conv_bn_act.pack(own, False), own_bias)
    return conv_bn_add_conv_bn_act.conv_add_conv_act(x, *main, *geometry, shortcut, *other, (step, step), act, False, config)


def plainly(x, weight, bias, shortcut, own, own_bias, stride=1, step=1, groups=1, act="relu"):
    bias, own_bias = (None if b is None else b.to(x.dtype) for b in (bias, own_bias))
    z = F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, 1, groups) + F.conv2d(shortcut, own, own_bias, step)
    return z.relu() if act == "relu" else z


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_end_of_a_block(dtype, ends):
    _, stride, _, groups, out, _, step = ends
    x, weight, shortcut, own = end(*ends, dtype=dtype)
    for bias, act, tiles in ((torch.randn(out), "relu", TILES), (None, "none", TILES[1:2])):
        args = x, weight, bias, shortcut, own, torch.randn(out), stride, step, groups, act
        for config in tiles:
            y = run(*args, config=config)
            assert y.is_contiguous(memory_format=CL)
            judge({"y": y}, lambda *args: {"y": plainly(*args)}, args, dtype)


@pytest.mark.parametrize("step", (1, 2))
def test_every_configuration_is_exact_on_small_integers(step):
    x, weight, shortcut, own = (t.mul(64).round().clamp(-3, 3).half() for t in end(3, 1, 40, 1, 24, 72, step))
    expected = plainly(x.float(), weight.float(), None, shortcut.float(), own.float(), None, step=step)
    assert expected.unique().numel() > 50
    for config in (*configs.CONV_TENSOR_CORE, *configs.CONV_TF32, *configs.CONV_IEEE):
        assert torch.equal(run(x, weight, None, shortcut, own, None, step=step, config=config).float(), expected)


def test_special_values():
    """NaN and infinities where PyTorch has them, of x and of the shortcut, and of no pixel that the stride passes by."""
    x, weight, shortcut, own = end(3, 1, 8, 1, 16, 8, 2)
    x[0, 3, 2, 1], x[1, 1, 4, 4], shortcut[1, 5, 12, 8], shortcut[0, 7, 2, 2] = torch.nan, torch.inf, torch.nan, -torch.inf
    shortcut[:, :, 1::2], shortcut[:, :, :, 1::2] = torch.nan, torch.nan
    for act in ("relu", "none"):
        y = run(x, weight, None, shortcut, own, None, step=2, act=act, config=TILES[1])
        expected = plainly(x, weight, None, shortcut, own, None, step=2, act=act)
        nan = expected.isnan()
        assert nan.any() and not nan.all() and torch.equal(y.isnan(), nan)
        torch.testing.assert_close(y[~nan], expected[~nan])


def test_no_channel_beyond_the_shortcuts_is_read():
    """Channels behind the last one are other pixels' values, and those behind the last pixel other memory: NaN here."""
    x, weight, shortcut, own = end(1, 1, 16, 1, 16, 9, 1)
    expected = run(x, weight, None, shortcut, own, None, config=TILES[1])
    memory = torch.full((shortcut.numel() + 64,), torch.nan)
    moved = torch.as_strided(memory, shortcut.shape, shortcut.stride(), 0).copy_(shortcut)
    assert torch.equal(run(x, weight, None, moved, own, None, config=TILES[1]), expected)
    judge({"y": expected}, lambda *args: {"y": plainly(*args)}, (x, weight, None, shortcut, own, None), torch.float32)


def test_offsets_of_64_bits(monkeypatch):
    x, weight, shortcut, own = end(*ENDS[2])
    narrow = run(x, weight, None, shortcut, own, None, step=2)
    monkeypatch.setattr(conv_bn_add_conv_bn_act, "index_type", lambda numel: batch_norm.tl.int64)
    assert torch.equal(run(x, weight, None, shortcut, own, None, step=2), narrow)


def test_refusals():
    x, _, shortcut, _ = end(*ENDS[0])
    why_not = conv_bn_add_conv_bn_act.why_not
    assert why_not(x, shortcut) is None
    assert "x must be channels_last" in why_not(x.contiguous(), shortcut)
    assert "shortcut must be channels_last" in why_not(x, shortcut.contiguous())
    args = list(OP.samples(torch.device("cpu"), torch.float32)[0].args)
    args[:2] = args[0].contiguous(memory_format=CL), args[1].half().contiguous(memory_format=CL)
    assert "x's dtype" in OP.explain(*args).refusals["triton"]


# ---- where it runs --------------------------------------------------------------------------------------------


def block():
    return lively(fnn.BasicBlock(16, 24, 2, fnn.shortcut("B", 16, 24, 2))).eval()


def images(layout=CL):
    return torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)


def ran(module, x):
    """The ops that a model runs without gradients, and why the end of its block is not one product."""
    with torch.no_grad():
        steps = [step for found in fastres.explain(module, x).modules for step in found.steps]
    apart = [step.apart for step in steps if step.apart is not None]
    return sorted(choice.op for step in steps for choice in step.choices), apart


@pytest.mark.parametrize("optimized", (False, True), ids=("fastres.nn", "optimized"))
def test_blocks_run_it_where_it_is_chosen(optimized):
    module = fastres.optimize(torchvision_block(), channels_last=False) if optimized else block()
    assert ran(module, images()) == (["conv_bn_act", OP.name], [])
    two = ["conv_bn_act", "conv_bn_act", "conv_bn_add_act"]
    ops, (reason,) = ran(module, images(torch.contiguous_format))
    assert ops == two and "triton: x must be channels_last" in reason
    with torch.no_grad():
        module.downsample[1].eps = 0.1
        y = module(images())
        with fastres.use(**{OP.name: "torch"}):
            assert ran(module, images()) == (two, ["cuda: another backend is forced; triton: another backend is forced"])
            torch.testing.assert_close(module(images()), y)
    module.downsample[0].register_forward_hook(lambda *_: None)
    assert OP.name not in ran(module, images())[0]


def torchvision_block():
    shortcut = nn.Sequential(nn.Conv2d(16, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    return lively(torchvision.models.resnet.BasicBlock(16, 24, 2, shortcut)).eval()


def test_other_shortcuts_run_by_themselves():
    wide, padded = block(), block()
    wide.downsample[0] = nn.Conv2d(16, 24, 3, 2, 1)
    padded.downsample[0] = nn.Conv2d(16, 24, 1, 2, 1)
    padded.conv1 = nn.Conv2d(16, 24, 3, 2, 2)
    for module in (wide.eval(), padded.eval()):
        assert OP.name not in ran(module, images())[0]
        compare(module, images())


def test_gradients_and_training_go_the_other_ways():
    module, x = block(), images()
    assert {op.name for op, _ in tuner.recorded(lambda: module(x)).values()} == {"bn_act", "bn_add_bn_act"}
    args = OP.samples(torch.device("cpu"), torch.float32)[0].args
    x, shortcut, weight, *_ = (t.contiguous(memory_format=CL) for t in args[:3])
    ones, weights = torch.ones(weight.shape[0]), (weight.requires_grad_(), args[13])
    given = x, shortcut, weights[0], None, ones, ones, weights[1], None, ones, ones
    y = functional.conv_bn_add_conv_bn_act(*given, padding=1, shortcut_stride=2)
    assert y.grad_fn is not None and torch.autograd.grad(y.sum(), weight)[0].abs().sum() > 0


def test_autocast_casts_both():
    module, x = block(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16 and ran(module, x)[0][-1] == OP.name


def test_frozen_networks_hold_both_convolutions():
    module, x = block(), images()
    with torch.no_grad():
        torch.testing.assert_close(fastres.freeze(module, x)(x), module(x))


def test_tuning_holds_it_against_the_two_ops(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuner.Session, "on_samples", lambda *args: None)
    module, x = block(), images()
    try:
        for slower, chosen in (("triton", "torch"), ("torch", "triton")):
            real = tuner.timing.interleaved

            def interleaved(calls, *args, slower=slower, real=real, **options):
                if len(calls) != 2:  # those of the two ops: cpu, onednn, triton, torch
                    return real(calls, *args, **options)
                return dict(zip(calls, (seconds(2.0), seconds(1.0))[:: 1 if slower == "triton" else -1], strict=True))

            monkeypatch.setattr(tuner.timing, "interleaved", interleaved)
            session = tuner.tune_model(module, x, seconds=0.01, configurations=False)
            monkeypatch.setattr(tuner.timing, "interleaved", real)
            (found,) = (result for result in session.results if result.op == OP.name)
            assert [c.backend for c in found.candidates] == ["cuda", "triton", "torch"] and found.chosen.backend == chosen
            assert (OP.name in ran(module, x)[0]) == (chosen == "triton")
    finally:
        monkeypatch.undo()
        tune.forget()
        fastres.dispatch.forget()


def seconds(median):
    return tuner.timing.Timing(median, median, median, 1, 1, "told")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_network(monkeypatch, dtype):
    """Every layer that has a Triton kernel on it, the projection in the block's last convolution."""
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    model = lively(nn.Sequential(stem, torchvision.models.resnet.BasicBlock(16, 32, 2, projection))).eval()
    x = draw((3, 3, 33, 30), torch.float32)
    with fastres.use("triton"):
        frozen = make.by_ops(model, x, dtype)
    steps = frozen.plan((3, 3, 33, 30)).steps
    assert {step.choice.kernel for step in steps} == {"triton"} and len(steps) == 4
    assert len(steps[-1].call.layers) == 2
    x = x.to(dtype)
    judge({"y": frozen(x)}, lambda x: {"y": fastres_free(model, x)}, (x,), dtype)


def fastres_free(model, x):
    """The network in the dtype of its input."""
    with torch.no_grad():
        return copy.deepcopy(model).to(x.dtype)(x)
