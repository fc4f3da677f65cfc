"""The stem of a network with its pool in one CUDA kernel: on a GPU as built, else executed on the CPU (see _cuda_on_cpu.py)."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_conv_few import CASES as CONVOLUTIONS
from test_conv_few import Case, device, integers, off, same  # noqa: F401  device: a fixture
from tolerances import assert_close_to_truth
from torch import nn

import fastres
from fastres import functional, tuner
from fastres.kernels import native
from fastres.ops import REGISTRY, _conv_rows, conv_bn_act_maxpool

CL = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16)
OP = REGISTRY["conv_bn_act_maxpool"]
# The emulated device has few multiprocessors: here few images are cut into strips of several rows.
CASES = {
    "one unit, one row": Case(1, 3, 1, 1, 8),
    "strips of eight rows": Case(1, 3, 90, 60, 64),
    "odd sizes, channels to spare": Case(2, 3, 21, 35, 72),
    "a share within a unit": Case(2, 3, 67, 10, 8),
    "strips of several rows, one unit": Case(3, 3, 73, 19, 8),
    "columns in parts": Case(2, 3, 21, 530, 8),
    **{name: CONVOLUTIONS[name] for name in (
        "stem, rows that are not aligned", "few images, one row", "more than one block of channels", "for small images, odd",
        "wide windows, odd offsets", "one channel", "four channels", "even windows, no padding",
    )},
}  # fmt: skip


def run(x, weight, bias, case):
    packed = torch.ops.fastres_C.conv_rows_pack(weight.permute(0, 2, 3, 1).contiguous(), case.padding[1])
    return torch.ops.fastres_C.conv_rows_maxpool(x, packed, bias, len(weight), *map(list, case[5:]))


def pooled(z):
    return F.max_pool2d(z.relu(), 3, 2, 1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_is_exact_on_small_integers(device, dtype, name):  # noqa: F811
    case = CASES[name]
    x, weight, bias, _, exact = integers(case, dtype, device)
    y = run(x, weight, bias, case)
    assert torch.equal(y, pooled(exact).to(y)) and y.is_contiguous(memory_format=CL)
    assert torch.equal(run(x, weight, None, case), pooled(exact - bias.double().cpu().view(-1, 1, 1)).to(y))


@pytest.mark.parametrize("name", ["stem, rows that are not aligned", "a share within a unit", "for small images, odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_keeps_what_is_not_finite(device, dtype, name):  # noqa: F811
    """NaN wins, in the first and the last window of a unit too; -0.0 and what the ReLU stops come out as 0.0."""
    case = CASES[name]
    x, weight, bias, _, _ = integers(case, dtype, device)
    x[0, 0, 2, 1], x[-1, 2, -1, -1], x[0, 1, case.h // 2, case.w // 2] = torch.nan, torch.inf, -torch.inf
    z = F.conv2d(x.double(), weight.double(), bias.double(), case.stride, case.padding)
    assert same(run(x, weight, bias, case), pooled(z).to(dtype))
    for value in (-0.0, -1.0):
        y = run(torch.zeros_like(x), weight, torch.full_like(bias, value), case)
        assert not y.any() and not y.signbit().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_memory_around_is_not_touched(device, dtype):  # noqa: F811
    """Neither read, being full of NaN, nor written."""
    case = CASES["odd sizes, channels to spare"]
    x, weight, bias, _, exact = integers(case, dtype, device)
    memory = torch.full((x.numel() + 4096,), torch.nan, dtype=dtype, device=device)
    inner = torch.as_strided(memory, x.shape, x.stride(), 2048).copy_(x)
    assert torch.equal(run(inner, weight, bias, case), pooled(exact).to(x))
    assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pooled_backend_keeps_the_budget(device, dtype):  # noqa: F811
    """Packing, fold, alignment: every sample that it takes."""
    taken = []
    for sample, shifted in itertools.product(OP.samples(device, dtype), (False, True)):
        args = [a.contiguous(memory_format=CL) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args]
        x, weight, *rest = args
        if conv_bn_act_maxpool.why_not_arguments(x, dtype, weight, *rest[6:]):
            continue
        y, expected = conv_bn_act_maxpool.run_cuda(off(x) if shifted else x, *args[1:]), OP.reference(*args)
        exact = OP.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_close_to_truth(y, expected, exact, dtype, sample.label)
        assert y.stride() == expected.stride() and y.dtype == dtype
        taken.append(sample.label)
    assert len(taken) == 8 and taken.count("7x7 stem") == 2


@pytest.mark.compile
def test_what_is_unsafe_to_pool_raises(device):  # noqa: F811
    case = CASES["odd sizes, channels to spare"]
    x, weight, bias, _, _ = integers(case, torch.float16, device)
    packed = torch.ops.fastres_C.conv_rows_pack(weight.permute(0, 2, 3, 1).contiguous(), 3)
    seven, two, three = [7, 7], [2, 2], [3, 3]
    wrong = [
        ((x.float(), packed, bias, 72, seven, two, three), "x must be float16 or bfloat16"),
        ((x[0], packed, bias, 72, seven, two, three), "x must be of 4 dimensions"),
        ((x.contiguous(), packed, bias, 72, seven, two, three), "x must be dense and channels_last"),
        ((off(x), packed, bias, 72, seven, two, three), "x must be aligned to 16 bytes"),
        ((x.repeat(1, 9, 1, 1), packed, bias, 72, seven, two, three), "x must be of at most 24 channels"),
        ((x, packed[:-1], bias, 72, seven, two, three), "packed must be packed weights"),
        ((x, packed.bfloat16(), bias, 72, seven, two, three), "packed must be packed weights"),
        ((x, packed, bias[1:], 72, seven, two, three), r"bias must be of size \(72,\)"),
        ((x, packed, bias, 60, seven, two, three), "weight must be of a multiple of 8 output channels"),
        ((x, packed, bias, 72, [8, 7], two, three), "kernel must be two integers from 1 to 7"),
        ((x, packed, bias, 72, [7, 2], two, three), "a row of the window must be of 9 to 24 values"),
        ((x, packed, bias, 72, seven, [0, 2], three), "stride must be two integers from 1 to 8"),
        ((x, packed, bias, 72, seven, two, [3, -1]), "padding must be two integers from 0 to 127"),
        ((x[:, :, :3].contiguous(memory_format=CL), packed, bias, 72, seven, two, [0, 0]), "kernel must be no larger"),
    ]
    for args, text in wrong:
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_bn_act_maxpool: {text}.*, got "):
            torch.ops.fastres_C.conv_rows_maxpool(*args)


@pytest.mark.none
def test_refusals_of_the_pooled_kernel_say_why():
    sample = OP.samples(torch.device("cpu"), torch.float16)[0]
    x, weight, *rest = sample.args
    x, flags = x.contiguous(memory_format=CL), rest[6:]

    def reason(dtype=torch.float16, **change):
        names = ("stride", "padding", "dilation", "groups", "act", "kernel_size", "pool_stride", "pool_padding")
        given = dict(zip(names, flags, strict=True)) | change
        return conv_bn_act_maxpool.why_not_arguments(x, dtype, weight, *given.values())

    assert reason() is None and "on cpu" in conv_bn_act_maxpool.why_not_cuda(*sample.args)
    assert "act='none'" in reason(act="none") and "float32" in reason(torch.float32)
    assert "kernel_size=(2, 2)" in reason(kernel_size=(2, 2)) and "padding=(0, 0)" in reason(pool_padding=(0, 0))
    assert "dilation=(2, 2)" in reason(dilation=(2, 2))


def stem():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()


@pytest.mark.none
def test_a_function_under_autograd_and_compiled():
    """Two ops where no kernel is chosen, with gradients of all that PyTorch gives them."""
    model, x = stem().double(), torch.randn(2, 3, 21, 18, dtype=torch.float64, requires_grad=True)
    conv, norm, _, _ = model
    parameters = conv.weight, norm.weight, norm.bias

    def own(x):
        statistics = norm.running_mean, norm.running_var
        return functional.conv_bn_act_maxpool(x, conv.weight, None, *statistics, *parameters[1:], stride=2, padding=3)

    found, expected = own(x), model(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), (x, *parameters)) for y in (found, expected)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        calls_ = tuner.recorded(lambda: own(x))
        assert {op.name for op, _ in calls_.values()} == {"conv_bn_act"}


@pytest.mark.none
def test_a_recorded_call_becomes_a_convolution_and_a_pool():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, *_ = stem()

        def forward(self, x):
            statistics = self.bn.running_mean, self.bn.running_var
            return functional.conv_bn_act_maxpool(x, self.conv.weight, None, *statistics, stride=2, padding=3)

    model, x = Stem().eval(), torch.randn(2, 3, 20, 20)
    with fastres.use(conv_bn_act_maxpool="torch"):
        frozen = fastres.freeze(model, x)
    assert [layer.kind for layer in frozen.network.layers] == ["conv", "max_pool"]
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_stem_is_one_step_where_forced(dtype):
    if reason := native.why_not(_conv_rows.OPS[2]) or _conv_rows.why_not_device(torch.device("cuda")):
        pytest.skip(reason)
    model = stem().cuda()
    x = torch.randn(4, 3, 65, 64, device="cuda").contiguous(memory_format=CL)
    with fastres.use(conv_bn_act_maxpool="cuda"):
        frozen = fastres.freeze(model, x, dtype)
    (step,) = frozen.plan(tuple(x.shape)).steps
    assert step.choice.kernel == "cuda" and step.call.op is OP
    assert [layer.kind for layer in step.call.layers] == ["conv", "max_pool"]
    low = stem().cuda().to(dtype)
    with torch.no_grad():
        same_dtype, truth = low(x.to(dtype)), stem().cuda().double()(x.to(dtype).double())
    assert_close_to_truth(frozen(x), same_dtype, truth, dtype)

