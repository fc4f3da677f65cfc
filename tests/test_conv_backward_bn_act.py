"""The gradient of a convolution's input that goes on through the batch norm before it, and the blocks whose backwards use it:
the kernels on a GPU as built, else executed on the CPU (see _cuda_on_cpu.py)."""

import copy
import itertools

import _hopper
import pytest
import torch
from _cuda_calls import laid_out, run
from _hopper import CL, DTYPES
from test_given_statistics import ALL, BLOCKS, assert_followed, half_block, step
from test_given_statistics import OP as STATISTICS
from test_sm90_wide import CASES, ONE, Case
from tolerances import assert_close_to_truth

import fastres
from fastres import budget
from fastres.dispatch import Backend
from fastres.nn import _fused, _stage
from fastres.ops import REGISTRY, _bn, _conv_wide

OP, EPS = REGISTRY["conv_backward_bn_act"], 1e-5
FEW = (
    "tails of channels, images that end inside a chunk", "one row, one column", "few channels", "dilated",
    "1x1 of one step, many tiles, two blocks share x", "3x3 without padding, by tap",
)  # fmt: skip
MORE = {
    "64 channels, 3x3": Case(2, 64, 9, 11, 64),
    "64 channels of 256, 1x1": Case(3, 64, 9, 11, 256, ONE),
    "four blocks share the gradient": Case(2, 256, 7, 7, 64, ONE),
}


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    return _hopper.device(request.param)


def case_of(name):
    return {**CASES, **MORE}[name]


def drawn(case, dtype, device, times=1):
    """grad_y, weight, x and a batch norm, all but its variance of small integers or halves: in every order sums give the same.
    Its outputs are at 0 exactly, and above it by less than its type can tell, too."""
    generator = torch.Generator().manual_seed(0)

    def draw(most, *size):
        return torch.randint(-most, most + 1, size, generator=generator).double()

    x, weight = draw(3, case.n, case.c, case.h, case.w), draw(2, case.k, case.c, *case.kernel) * times
    grad_y = draw(2, *torch.nn.functional.conv2d(x, weight, None, *case.geometry).shape)
    x[0, 0, 0, 0] = -0.0
    bn_weight, mean, bias = draw(2, case.c) / 2, draw(1, case.c), draw(1, case.c)
    bias[::3], bias[1::3] = 0, 1e-12
    var = torch.rand(case.c, generator=generator) + 0.5
    images = [t.to(device, dtype).contiguous(memory_format=CL) for t in (grad_y, weight, x)]
    return *images, *(t.float().to(device) for t in (bn_weight, bias, mean, var))


def exact_gradient(case, args):
    """Of the convolution's input."""
    tensors = (t.double().cpu() for t in (args[0], args[2], args[1]))
    geometry = *case.geometry, False, [0, 0], 1
    return torch.ops.aten.convolution_backward(*tensors, [case.k], *geometry, [True, False, False])[0]


def apart(case, args, act):
    """The two backwards: the first in float64, rounded once; the second by its kernel, to the bit what it is here."""
    _, _, x, *norm = args
    grad_z = exact_gradient(case, args).to(x).contiguous(memory_format=CL)
    return run("bn_act_backward", grad_z, x, *norm, EPS, act, True)


def joined(case, args, act):
    return _conv_wide.run_gradient(*args, EPS, act, *case.geometry, 1)


def same(found, expected):
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
               for a, b in zip(found, expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", (*FEW, *MORE))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_two_ops(device, dtype, name):
    """To the bit, and twice: of sums that float holds; with a ReLU, whose gradient is 0 at exactly 0, and without."""
    case = case_of(name)
    args = drawn(case, dtype, device)
    for act in ("relu", "none"):
        found = joined(case, args, act)
        assert found[0].is_contiguous(memory_format=CL)
        assert same(found, apart(case, args, act)) and all(map(torch.equal, found, joined(case, args, act)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_of_what_is_stored(device, dtype):
    """Gradients that their type has to round: what is summed is what the second pass reads."""
    case = case_of("few channels")
    args = drawn(case, dtype, device, times=37)
    exact = exact_gradient(case, args)
    assert not torch.equal(exact.to(dtype).double(), exact)
    assert same(joined(case, args, "relu"), apart(case, args, "relu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stands_where_it_stands_in_the_two_ops(device, dtype):
    """NaN and infinities of either input; a NaN passes the ReLU; a row's end does not reach the next row."""
    case = case_of("tails of channels, images that end inside a chunk")
    grad_y, weight, x, *norm = drawn(case, dtype, device)
    x[0, 3, 2, 6], x[1, 2, 6, 0], x[2, 5, 0, 0] = torch.nan, torch.inf, -torch.inf
    found = joined(case, (grad_y, weight, x, *norm), "relu")
    assert found[1].isnan().any() and not found[1].isnan().all()
    assert same(found, apart(case, (grad_y, weight, x, *norm), "relu"))
    grad_y[4, 7, 3, 6], grad_y[0, 1, 6, 0] = torch.nan, torch.inf
    args = grad_y, weight, x, *norm
    assert same(joined(case, args, "none"), apart(case, args, "none"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_is_not_touched(device, dtype):
    """Of the gradient and of x: neither read, being full of NaN, nor written."""
    case = case_of("tails of channels, images that end inside a chunk")
    grad_y, weight, x, *norm = drawn(case, dtype, device)
    expected, memories = joined(case, (grad_y, weight, x, *norm), "relu"), []
    for t in (grad_y, x):
        memory = torch.full((t.numel() + 4096,), torch.nan, dtype=dtype, device=device)
        memories.append((memory, torch.as_strided(memory, t.shape, t.stride(), 2048).copy_(t)))
    (_, grad_y), (_, x) = memories
    assert all(map(torch.equal, joined(case, (grad_y, weight, x, *norm), "relu"), expected))
    for memory, _ in memories:
        assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_keeps_the_budget(device, dtype):
    """Packing, alignment, absent parameters: every sample that the backend takes."""
    taken = []
    for sample, shifted in itertools.product(OP.samples(device, dtype), (False, True)):
        args = grad_y, weight, x, *rest = laid_out(sample.args, "channels_last")
        if _conv_wide.why_not_gradient_arguments(grad_y, weight, x, *rest[-4:]):
            continue
        if shifted:  # by one element: not aligned; and weights that are not channels_last
            memory = torch.empty(x.numel() + 8, dtype=dtype, device=device)
            args = grad_y, weight.contiguous(), torch.as_strided(memory, x.shape, x.stride(), 1).copy_(x), *rest
        exact = OP.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        torch_same, spreads = OP.reference(*args), budget.spreads(OP.name, args, exact)
        for found in zip(_conv_wide.run_gradient(*args), torch_same, exact, spreads, strict=True):
            assert_close_to_truth(*found[:3], dtype, sample.label, found[3])
        taken.append(sample.label)
    assert {"1x1", "3x3", "3x3 dilated"} == set(taken)


@pytest.mark.compile
def test_what_is_unsafe_raises():
    device = _hopper.device("emulated")
    case = case_of("tails of channels, images that end inside a chunk")
    grad_y, weight, x, *norm = drawn(case, torch.float16, device)
    packed = weight.permute(1, 2, 3, 0).contiguous()

    def call(grad_y=grad_y, packed=packed, x=x, mean=norm[2], act="relu", padding=ONE, dilation=ONE):
        bn_weight, bias, _, var = norm
        return torch.ops.fastres_C.sm90_conv_wide_gradient(
            grad_y, packed, x, bn_weight, bias, mean, var, 1e-5, act, padding, dilation
        )

    assert same(call(), joined(case, (grad_y, weight, x, *norm), "relu"))
    for wrong, text in (
        ({"grad_y": grad_y.float()}, "x must be float16 or bfloat16"),
        ({"packed": packed.bfloat16()}, "weight must be of x's dtype"),
        ({"packed": packed[:, :, :, :64]}, "weight must be contiguous"),
        ({"x": x.contiguous()}, "x must be channels_last, of sizes"),
        ({"x": x[:4]}, "x must be channels_last, of sizes"),
        ({"x": x.float()}, "x must be of x's dtype"),
        ({"mean": norm[2][1:]}, r"mean must be of size \(40,\)"),
        ({"act": "gelu"}, "act must be 'relu' or 'none'"),
        ({"padding": (0, 128)}, "padding must be two integers from 0"),
    ):
        with pytest.raises(RuntimeError, match=rf"fastres\.conv_backward_bn_act: .*{text}.*, got "):
            call(**wrong)


@pytest.mark.none
def test_refusals_say_why():
    x = torch.empty(2, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=CL)
    weight, two = torch.empty(64, 64, 3, 3, dtype=torch.float16), (2, 2)
    refuse = _conv_wide.why_not_gradient_arguments
    assert refuse(x, weight, x, ONE, ONE, ONE, 1) is None
    assert "on cpu" in _conv_wide.why_not_gradient(x, weight, x, ONE, ONE, ONE, 1)
    for call, text in (
        ((x, weight, x, two, ONE, ONE, 1), "stride is 1"),
        ((x, weight, x, ONE, ONE, ONE, 2), "groups=2"),
        ((x, weight, x, ONE, (3, 3), ONE, 1), "padding must be less"),
        ((x, weight, x.float(), ONE, ONE, ONE, 1), "one dtype"),
        ((x, weight, x.contiguous(), ONE, ONE, ONE, 1), "one memory format"),
        ((x, weight[:, :60], x, ONE, ONE, ONE, 1), "multiples of 8"),
    ):
        assert text in refuse(*call)


# ---- the blocks whose backwards use it ---------------------------------------------------------------------------------

# Of batch norms and convolutions of stride 1 behind them.
PAIRS = {"basic": 1, "bottlenecks": 3}


@pytest.fixture
def ran(monkeypatch, device):
    """The device, and the calls of the kernel: it and the others as backends, where they are forced, emulated too."""
    calls = []

    def run_gradient(*args):
        calls.append(args)
        return _conv_wide.run_gradient(*args)

    def why_not(grad_y, weight, x, *rest):
        return _conv_wide.why_not_gradient_arguments(grad_y, weight, x, *rest[-4:])

    for name in ALL:
        run_native = getattr(torch.ops.fastres_C, f"cuda_{name}").default
        kernel = Backend("cuda", _bn.why_not, lambda run_native=run_native: run_native)
        others = tuple(b for b in REGISTRY[name].backends if b.name != "cuda")
        monkeypatch.setattr(REGISTRY[name], "backends", (kernel, *others))
    statistics = Backend("cuda_wide", _conv_wide.why_not_arguments, lambda: _conv_wide.run_statistics)
    monkeypatch.setattr(STATISTICS, "backends", (statistics, STATISTICS.backends[-1]))
    monkeypatch.setattr(OP, "backends", (Backend("cuda_wide", why_not, lambda: run_gradient), OP.backends[-1]))
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(_fused, "WHOLE", {"cuda", "cpu"})
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # some gradients are compared to the bit
    return device, calls


def kernels(backend="cuda_wide", statistics="torch"):
    return fastres.use(conv_backward_bn_act=backend, conv_statistics=statistics, **dict.fromkeys(ALL, "cuda"))


@pytest.mark.parametrize("name", PAIRS)
def test_a_training_step_keeps_the_budget(ran, name):
    """Values, gradients and running statistics, with autocast's weights; and beside the kernel that finds statistics, whose
    values are given to the batch norms as ever."""
    device, calls = ran
    torch.manual_seed(0)
    model = BLOCKS[name]().to(device, memory_format=CL)
    for module in model.modules():  # no value so near to 0 that rounding decides what a ReLU does
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 6.0)
            module.bias.data[::3] = -6.0
    x = torch.randn(3, 16, 11, 13, device=device).bfloat16().contiguous(memory_format=CL)
    with fastres.use("torch"):
        seed = torch.randn(model(x.float()).shape, device=device)
        torch_same, exact = step(model, x, seed), step(copy.deepcopy(model).double(), x.double(), seed)
    for backend, statistics in (("torch", "torch"), ("cuda_wide", "torch"), ("cuda_wide", "cuda_wide")):
        calls.clear()
        with kernels(backend, statistics):
            found = step(model, x, seed)
        assert len(calls) == (PAIRS[name] if backend == "cuda_wide" else 0)
        for index, triple in enumerate(zip(found, torch_same, exact, strict=True)):
            assert_close_to_truth(*triple, torch.bfloat16, f"{name} {backend} {statistics} {index}")


def test_what_follows_the_call_is_not_passed_by(ran):
    """A checkpointed block gives the same; one with a hook, or that makes values again in backward, runs without."""
    device, calls = ran
    with kernels():
        assert_followed(*half_block(device), calls, (2, 2))


def test_gradients_are_differentiated_again(ran):
    """Op by op."""
    device, calls = ran
    block, x, seed = half_block(device)

    def twice(wish, dtype):
        with wish:
            leaf = x.to(dtype, copy=True).requires_grad_()
            (grad,) = torch.autograd.grad(copy.deepcopy(block).to(dtype)(leaf), leaf, seed.to(dtype), create_graph=True)
            assert not calls
            return grad, *torch.autograd.grad(grad.square().sum(), leaf)

    torch_same, exact = (twice(fastres.use("torch"), dtype) for dtype in (torch.bfloat16, torch.float64))
    for triple in zip(twice(kernels(), torch.bfloat16), torch_same, exact, strict=True):
        assert_close_to_truth(*triple, torch.bfloat16, "twice")
    assert not calls


def test_gradients_that_nobody_asks_for_are_left_out(ran):
    """Of frozen weights and of frozen batch norms; what is asked for has the same bits, at a second backward too."""
    device, calls = ran
    block, x, seed = half_block(device)

    def grads(*frozen):
        model = copy.deepcopy(block)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with kernels():
            y = model(leaf)
            first = torch.autograd.grad(y, leaf, seed.bfloat16(), retain_graph=True)
            y.backward(seed.bfloat16())
        assert torch.equal(first[0], leaf.grad)
        return {"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}

    everything = grads()
    for frozen in (("conv2",), ("bn1",), ("conv2", "bn1")):
        calls.clear()
        found = grads(*frozen)
        assert len(calls) == 2
        for name, grad in found.items():
            assert grad is None if name.split(".")[0] in frozen else torch.equal(grad, everything[name]), name
    calls.clear()
    block.requires_grad_(False)
    grads()
    assert len(calls) == 2


@pytest.mark.none
def test_a_stand_in_of_the_kernel_is_called_where_a_norm_stands_before(monkeypatch):
    """With strides, biases and groups in the convolutions, without parameters in a norm; gradients are those of the two ops."""
    calls = []

    def run_reference(*args):
        calls.append(args)
        return OP.reference(*args)

    monkeypatch.setattr(OP, "backends", (Backend("cuda_wide", lambda *args: None, lambda: run_reference), OP.backends[-1]))
    torch.manual_seed(0)
    block = fastres.nn.Bottleneck(16, 4, groups=2, base_width=64)
    block.conv3 = torch.nn.Conv2d(block.conv3.in_channels, 16, 1, bias=True)
    block.bn2 = torch.nn.BatchNorm2d(block.conv2.out_channels, affine=False)
    x, seed = torch.randn(2, 16, 5, 6), torch.randn(2, 16, 5, 6)
    same, exact = step(block, x, seed), step(copy.deepcopy(block).double(), x.double(), seed)
    assert not calls
    with fastres.use(conv_backward_bn_act="cuda_wide"):
        found = step(block, x, seed)
        assert len(calls) == 2
        for triple in zip(found, same, exact, strict=True):
            assert_close_to_truth(*triple, torch.bfloat16, "stand-in")  # of autocast
        block.conv2.stride = 2, 2
        block.downsample = fastres.nn.shortcut("B", 16, 16, 2)
        step(block, x, torch.ones(2, 16, 3, 3))
        assert [args[1].shape[2] for args in calls[2:]] == [1]  # conv3's


def test_wishes_that_no_kernel_can_meet_raise(ran):
    """As those of any op do; convolutions with a stride are no question of this one."""
    device, _ = ran
    x = torch.randn(2, 16, 8, 8, device=device).contiguous(memory_format=CL)
    with kernels(), pytest.raises(fastres.UnsupportedError, match="float16 and bfloat16"):
        fastres.nn.BasicBlock(16, 16).to(device, memory_format=CL)(x).sum().backward()
