"""Batch norms in training that keep x in the shared memory of a cluster: on a GPU as built, else executed on the CPU (see
_cuda_on_cpu.py)."""

import itertools

import _hopper
import pytest
import torch
from _cuda_calls import DTYPES, arguments, draw, laid_out, mapped
from _cuda_calls import run as run_native
from _hopper import CL
from test_cuda import assert_parity
from tolerances import assert_close_to_truth

from fastres import budget
from fastres.ops import REGISTRY, _bn, _bn_cluster, bn_act

OPS = ("bn_act_train", "bn_add_act_train")
BACKWARD = ("bn_act_backward", "bn_add_act_backward")
# By what bn_cluster_plan makes of them: vectors of a slice, blocks of a cluster.
SHAPES = {
    "slices of 16 channels, half of the last one": (3, 24, 5, 7),
    "slices of 64 channels, few of the last one, fewer rows than make a pivot": (2, 8200, 1, 2),
    "two blocks, an eighth of a slice": (1, 8, 10, 13),
    "four blocks": (2, 128, 13, 15),
    "eight blocks": (5, 64, 10, 11),
    "eight blocks of slices of 32 channels, fewer rows in the last one": (9, 64, 10, 13),
    "more vectors than are on their way": (5, 8, 50, 100),
}
MOST = {2: 51200, 4: 25600, 8: 12288}  # rows that a cluster holds of a slice, by the bytes that it holds of an element


@pytest.fixture(params=_hopper.DEVICES)
def device(request):
    if request.param == "emulated":
        return _hopper.device("emulated")
    if reason := _bn_cluster.why_not_device(torch.device("cuda")):
        pytest.skip(reason)
    return torch.device("cuda")


def run(name, *args):
    return getattr(torch.ops.fastres_C, f"cluster_{name}")(*args)


def given(name, args, mean, var):
    """What the kernels of two passes make of the same statistics: the outputs of activations' size, and the mask."""
    if name == "bn_act_train":
        x, weight, bias, eps, act = args
        return (run_native("bn_act", x, weight, bias, mean, var, eps, act)[0],)
    x, residual, weight, bias, eps, act = args
    return torch.ops.fastres_C.bn_add_act_given(x, residual, weight, bias, mean, var, eps, act)


def same_bits(a, b):
    nan = a.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


def assert_bits_of_two_passes(name, args):
    """y and mask are, to the bit, those of the kernels that are given the statistics found here."""
    y, mean, var, *mask = run(name, *args)
    assert all(map(same_bits, (y, *mask), given(name, args, mean, var)))
    return mean, var


def input_of(shape, dtype, device, seed=0):
    return draw(shape, dtype, device, "channels_last", seed).contiguous(memory_format=CL)


def calls_of(name, shape, dtype, device):
    """Arguments of both activations, of parameters of two dtypes, of a gradient in one part and in two."""
    for seed, (act, parameters) in enumerate((("relu", torch.float32), ("none", dtype), ("relu", torch.float32))):
        if seed == 2 and name != "bn_add_act_backward":
            return
        x, generator = input_of(shape, dtype, device, seed), torch.Generator().manual_seed(seed)
        yield laid_out(arguments(name, x, generator, act, dtype=parameters, two_parts=seed > 0), "channels_last")


@pytest.mark.parametrize("name", (*OPS, *BACKWARD))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_budget_is_kept(device, name, shape, dtype):
    """Against float64; twice, to the same bits."""
    if _bn_cluster.why_not_arguments(name, input_of(SHAPES[shape], dtype, device)):
        pytest.skip("shared memory does not hold it")
    for args in calls_of(name, SHAPES[shape], dtype, device):
        assert_parity(name, args, dtype, shape, run)
        assert all(map(torch.equal, run(name, *args), run(name, *args)))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_has_the_bits_of_two_passes(device, name, dtype):
    for args in itertools.chain.from_iterable(calls_of(name, shape, dtype, device) for shape in SHAPES.values()):
        assert_bits_of_two_passes(name, args)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_parts", (False, True))
def test_backward_is_exact_on_small_integers(device, name, dtype, two_parts):
    """Of any order of additions: the bits of two passes; a NaN stays in its channel."""
    if two_parts and name == "bn_act_backward":
        pytest.skip("its gradient comes in one part")
    generator = torch.Generator().manual_seed(0)

    def draw_integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype).contiguous(memory_format=CL)

    args = arguments(name, draw_integers(2, 72, 16, 32), generator, two_parts=two_parts)
    named = dict(zip(REGISTRY[name].parameters, mapped(args, lambda t: draw_integers(*t.shape)), strict=True))
    one = torch.ones(72, device=device)
    named |= {"weight": 2 * one, "mean": one, "var": one - 2.0**-10, "eps": 2.0**-10}
    named |= {"bias": one} if "bias" in named else {}
    args = list(named.values())
    for nan in (False, True):
        if nan:
            args[0][1, 70] = torch.nan
            args[0][0, 3] = torch.inf
        found, expected = run(name, *args), run_native(name, *args)
        assert all(map(same_bits, found, expected))
        assert found[0][:, 70].isnan().any() == nan and found[0][:, :3].isfinite().all()


@pytest.mark.parametrize("name", (*OPS, *BACKWARD))
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_that_the_backend_takes(device, name, dtype):
    taken = []
    for sample, shifted in itertools.product(REGISTRY[name].samples(device, dtype), (False, True)):
        args = laid_out(sample.args, "channels_last")
        if _bn_cluster.why_not_arguments(name, *args) or args[-1] is False:  # or in evaluation
            continue
        if shifted:  # by one element: not aligned
            args = mapped(args, lambda t: torch.as_strided(torch.empty(t.numel() + 8).to(t), t.shape, t.stride(), 1).copy_(t))
        assert_parity(name, args, dtype, sample.label, lambda name, *args: _bn_cluster.runner(name)(*args))
        taken.append(sample.label.removesuffix(", training"))
    labels = {"stage 1", "stage 4", "no parameters", "weight only", "no activation", "tiny eps", "mean far from zero"}
    assert labels <= set(taken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_accurate_in_clusters(device, dtype):
    """Means far from 0, channels of one value, numbers whose sum float cannot hold."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 16, 13, 17, generator=generator, dtype=torch.float64)
    values[:, 0] += 1000
    values[:, 1] = values[:, 1] * 0.01 - 40
    values[:, 2] = 3.140625
    values[:, 3] *= 1e-4
    values[:, 4] = values[:, 4].sign() * 2.0**15
    values[:, 5] = 0.0
    values[:, 6] += 1e5 if dtype == torch.float32 else 0
    x = values.to(device, dtype).contiguous(memory_format=CL)
    args = x, None, None, 1e-5, "none"
    _, *found = run("bn_act_train", *args)
    _, *same = _bn.normalize_train(x, None, None, 1e-5)
    exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    spreads = budget.spreads("bn_act_train", args, (x, *exact))[1:]
    for actual, torch_same, truth, spread in zip(found, same, exact, spreads, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_truth(actual, torch_same, truth, torch.float32, "statistics", spread)
        for channel in range(16):  # each by itself: the largest does not hide the others
            one = slice(channel, channel + 1)
            spread = exact[1][channel].sqrt().item()
            assert_close_to_truth(actual[one], torch_same[one], truth[one], torch.float32, f"channel {channel}", spread)
    assert found[0][2] == 3.140625 and found[1][2] == 0 and found[0][5] == 0 and found[1][5] == 0
    assert (found[1] >= 0).all()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_in_clusters(device, name, dtype):
    """NaN and infinities stay in their channel; what is one value gives the bias, a zero of either sign as it is."""
    x = input_of((9, 64, 10, 13), dtype, device)
    x[2, 3, 8, 12], x[8, 5, 9, 1], x[0, 7], x[1, 9, 0, 0] = torch.nan, torch.inf, torch.nan, -torch.inf
    x[:, 11:14], x[:, 14] = 2.0, -0.0
    args = arguments(name, x, torch.Generator().manual_seed(0))
    if name == "bn_add_act_train":
        args[1] = args[1].contiguous(memory_format=CL)
        args[1][0, 20, 0, 0], args[1][1, 21, 3, 3], args[1][:, 11:15] = torch.nan, -torch.inf, -0.0
    args[-4][11:15], args[-3][11:15] = -1.0, -0.0
    for act in ("relu", "none"):
        mean, var = assert_bits_of_two_passes(name, [*args[:-1], act])
        # As on the CPU: on a GPU PyTorch's mean of infinity is NaN or not, as its threads meet it.
        for actual, expected in zip((mean, var), _bn.normalize_train(x.cpu(), None, None, 1e-5)[1:], strict=True):
            assert budget.same_classes(actual.cpu(), expected)
        y = run(name, *args[:-1], act)[0]
        assert y[:, (3, 5, 7, 9)].isnan().all() and not y[:, 11:15].any()
        assert y[:, 11:15].signbit().any() == (act == "none")
    assert var[7].isnan() and mean[5] == torch.inf and mean[9] == -torch.inf


@pytest.mark.parametrize("name", (*OPS, *BACKWARD))
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_clusters_is_not_touched(device, name, dtype):
    args = next(iter(calls_of(name, (3, 24, 5, 7), dtype, device)))
    memories = []

    def inside(t):
        memories.append(torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device))
        return torch.as_strided(memories[-1], t.shape, t.stride(), 2048).copy_(t)

    assert all(map(torch.equal, run(name, *mapped(args, inside)), run(name, *args)))
    for memory in memories:
        assert memory[:2048].isnan().all() and memory[-2048:].isnan().all()


@pytest.mark.parametrize("name", ("bn_act_train", "bn_act_backward"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_most_rows_that_a_cluster_holds(device, name, dtype):
    rows = MOST[dtype.itemsize * (2 if name in BACKWARD else 1)]
    assert rows == _bn_cluster.most_pixels(name, dtype)
    fits, beyond = (
        laid_out(arguments(name, input_of((1, 8, count, 1), dtype, device)), "channels_last") for count in (rows, rows + 1)
    )
    assert _bn_cluster.why_not_arguments(name, *fits) is None
    assert_parity(name, fits, dtype, "the most rows", run)
    assert f"at most {rows} pixels" in _bn_cluster.why_not_arguments(name, *beyond)
    with pytest.raises(RuntimeError, match="x must be of so few pixels"):
        run(name, *beyond)


@pytest.mark.compile
def test_what_is_unsafe_for_clusters_raises():
    device = _hopper.device("emulated")
    x, rest = input_of((2, 16, 3, 5), torch.float16, device), (None, None, 1e-5, "relu")
    for name, args, text in (
        ("bn_act_train", (x.contiguous(),), "x must be channels_last, of a multiple of 8 channels"),
        ("bn_act_train", (input_of((2, 12, 3, 5), torch.float16, device),), "x must be channels_last, of a multiple of 8"),
        ("bn_act_train", (torch.as_strided(x.new_empty(999), x.shape, x.stride(), 1),), "x must be aligned to 16 bytes"),
        ("bn_act_train", (x.double(),), "x must be float32, float16 or bfloat16"),
        ("bn_add_act_train", (x, x.float()), "residual must be of the dtype of x"),
        ("bn_add_act_train", (x, x.contiguous()), "residual must be dense and channels_last"),
    ):
        with pytest.raises(RuntimeError, match=rf"fastres\.{name}: {text}.*, got "):
            run(name, *args, *rest)
    evaluation = arguments("bn_act_backward", x, training=False)
    with pytest.raises(RuntimeError, match=r"fastres\.bn_act_backward: training must be True, got False"):
        run("bn_act_backward", *laid_out(evaluation, "channels_last"))
    grad_y, grad_y2, mask, *others = laid_out(arguments("bn_add_act_backward", x), "channels_last")
    with pytest.raises(RuntimeError, match=r"fastres\.bn_add_act_backward: mask must be contiguous and of size"):
        run("bn_add_act_backward", grad_y, grad_y2, mask[1:], *others)


def test_why_it_cannot_is_said():
    x, rest = torch.empty(2, 16, 3, 5, dtype=torch.float16).contiguous(memory_format=CL), (None, None, 1e-5, "relu")
    assert _bn_cluster.why_not_arguments("bn_act_train", x, *rest) is None
    for other, text in (
        (x.double(), "float64"),
        (x.contiguous(), "channels_last"),
        (x[:, :12].contiguous(memory_format=CL), "multiple of 8"),
    ):
        assert text in _bn_cluster.why_not_arguments("bn_act_train", other, *rest)
    for name in (*OPS, *BACKWARD):
        *_, backend, _ = REGISTRY[name].backends
        assert backend.name == "cuda_cluster" and backend.only_tuned and "on cpu" in backend.why_not(*arguments(name, x))
    evaluation = laid_out(arguments("bn_act_backward", x, training=False), "channels_last")
    assert "evaluation" in bn_act.why_not_in_training(*evaluation)
