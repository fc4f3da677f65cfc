"""The native CUDA ops against float64.

On a GPU as built; without one, the same kernels and bindings executed on the CPU (see _cuda_on_cpu.py).
"""

import itertools

import _cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from _cuda_calls import (
    DTYPES,
    OPS,
    REDUCTIONS,
    SHAPES,
    STEM,
    TWO_PARTS,
    WINDOWS,
    arguments,
    draw,
    gpu_relu,
    in_double,
    laid_out,
    mapped,
    reference,
    run,
)  # fmt: skip
from tolerances import assert_close_to_truth

from fastres.budget import spreads
from fastres.kernels import native
from fastres.kernels.layout import memory_format
from fastres.ops import REGISTRY, _mask


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.cuda),
        pytest.param("emulated", marks=pytest.mark.compile),
    ]
)
def device(request):
    if request.param == "emulated":
        _cuda_on_cpu.load()
        return torch.device("cpu")
    if reason := native.why_not_cuda():
        pytest.skip(reason)
    return torch.device("cuda")


def assert_parity(name, args, dtype, label, call=run):
    found, same, truth = call(name, *args), reference(name, args), reference(name, in_double(args))
    assert len(found) == len(truth)
    outputs = zip(found, same, truth, spreads(name, args, truth), strict=True)
    for index, (actual, torch_same, exact, spread) in enumerate(outputs):
        if actual.dtype == torch.uint8:  # bits: of its own y, which rounds as it may
            assert torch.equal(actual, _mask.pack(found[0], args[-1])), f"{name} {label} mask"
            continue
        assert_close_to_truth(actual, torch_same, exact, dtype, f"{name} {label} output {index}", spread)
        assert actual.dtype == torch_same.dtype, f"{name} {label} output {index}"
        if actual.dim() == 4 and not name.startswith("add_act"):
            x = args[1 if name == "bn_act_maxpool_backward" else 0]
            assert actual.is_contiguous(memory_format=memory_format(x))


EPS = 1e-30  # positive, as torch wants it, and nothing beside a variance of 1


def everywhere(function):
    for mark in (("name", OPS), ("dtype", DTYPES), ("layout", ("contiguous_format", "channels_last"))):
        function = pytest.mark.parametrize(*mark)(function)
    return function


@everywhere
def test_samples(device, name, dtype, layout):
    for sample in REGISTRY[name].samples(device, dtype):
        assert_parity(name, laid_out(sample.args, layout), dtype, sample.label)


@everywhere
def test_partitions(device, name, dtype, layout):
    for seed, (shape, act) in enumerate(itertools.product(SHAPES, ("relu", "none"))):
        x = draw(shape, dtype, device, layout, seed)
        generator, window = torch.Generator().manual_seed(seed), WINDOWS[seed % len(WINDOWS)]
        args = arguments(name, x, generator, act, training=seed % 3 > 0, window=window, two_parts=seed % 4 > 1)
        assert_parity(name, laid_out(args, layout), dtype, f"{shape} {act}")


@pytest.mark.parametrize("name", REDUCTIONS)
def test_more_splits_than_one_round_of_the_merge(device, name):
    x = draw((4, 256, 56, 56), torch.float32, device)  # so many values that one would lie on ReLU's edge
    args = arguments(name, x, torch.Generator().manual_seed(0), act="none")
    assert_parity(name, laid_out(args, "channels_last"), torch.float32, "many splits")


@everywhere
def test_misaligned_in_poison(device, name, dtype, layout):
    """At any offset in memory full of NaN the results are those of aligned memory: nothing else is read."""

    def shifted(offset):
        def change(t):
            memory = torch.full((t.numel() + 64,), torch.nan, dtype=t.dtype, device=t.device)
            return torch.as_strided(memory, t.shape, t.stride(), 32 + offset).copy_(t)

        return change

    for two_parts in (False, True) if name in TWO_PARTS else (False,):
        args = laid_out(arguments(name, draw((3, 24, 5, 8), dtype, device), two_parts=two_parts), layout)
        expected = run(name, *args)
        for offset in range(9):
            found = run(name, *mapped(args, shifted(offset)))
            for a, b in zip(found, expected, strict=True):
                if name in REDUCTIONS:
                    torch.testing.assert_close(a, b)  # sums in another order
                else:
                    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_act_of_any_size(device, dtype):
    for numel, act in itertools.product([*range(1, 36), 8191, 8192, 8200], ("relu", "none")):
        x, r = (row.clone() for row in draw((2, numel), dtype, device))  # aligned, both: vectors, and a tail behind them
        torch.full_like(x, torch.nan)  # where the output will be: what is not written does not pass for an old result
        assert torch.equal(run("add_act", x, r, act)[0], reference("add_act", (x, r, act))[0])
        grad = run("add_act_backward", r, x, act)[0]
        assert torch.equal(grad, reference("add_act_backward", (r, x, act))[0])
    x = draw((4, 6, 5, 3), dtype, device).permute(2, 0, 3, 1)
    y = run("add_act", x, x, "relu")[0]
    assert y.stride() == x.stride() and torch.equal(y, (x + x).relu())


def special(dtype, device):
    info = torch.finfo(dtype)
    values = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny]
    values += [info.smallest_normal * info.eps, -info.smallest_normal * info.eps]
    grid = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(device, dtype)
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


def same_bits(a, b):
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device, dtype):
    a, b = special(dtype, device)
    assert same_bits(run("add_act", a, b, "relu")[0], gpu_relu(a + b))
    assert same_bits(run("add_act", a, b, "none")[0], a + b)
    masked = torch.ops.aten.threshold_backward(a, b, 0)
    assert same_bits(run("add_act_backward", a, b, "relu")[0], masked)
    image = a.reshape(1, 1, 13, 13)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    y = run("bn_act", image, None, None, zero, one, EPS, "relu")[0]
    assert same_bits(y.flatten(), gpu_relu(a + torch.zeros_like(a)))
    y, _, _ = run("bn_act_train", image, None, None, 1e-5, "relu")
    assert y.isnan().all()


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_finds_the_positions_that_torch_finds(device, dtype, layout):
    """Ties, NaN and infinities everywhere: the first maximum, the last NaN, nothing where the ReLU stops it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0, 1.0, 2.0, -1.0, -2.0, -3.0])
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    for window, act, choices in itertools.product(WINDOWS, ("relu", "none"), (values, values[3:], values[2:3])):
        x = choices[torch.randint(len(choices), (3, 8, 9, 7), generator=generator)].to(device, dtype)
        x = x.contiguous(memory_format=getattr(torch, layout))
        z = x + torch.zeros_like(x)
        y = run("bn_act_maxpool", x, None, None, zero, one, EPS, act, *window)[0]
        assert same_bits(y, F.max_pool2d(z.relu() if act == "relu" else z, *window))
        grad_y = torch.randint(1, 9, y.shape, generator=generator).to(x).contiguous(memory_format=memory_format(x))
        args = (grad_y, x, None, None, zero, one, EPS, act, False, *window)
        found = [t.cpu() for t in run("bn_act_maxpool_backward", *args)]
        # As torch does on the CPU: on a GPU it loses gradients of channels_last windows that hold nothing but -inf.
        expected = reference("bn_act_maxpool_backward", [a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
        assert same_bits(found[0] + 0.0, expected[0] + 0.0)  # torch multiplies a gradient that was stopped: -0.0
        assert torch.equal(found[2], expected[2])


def test_pooling_in_strips_of_several_rows(device):
    """So many channels and columns that a thread has nine rows of one; ties and what ReLU stops are at their edges too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 2048, 33, 132), generator=generator).to(device, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(2048, device=device), torch.ones(2048, device=device)
    y = run("bn_act_maxpool", x, None, None, zero, one, EPS, "relu", *STEM)[0]
    assert torch.equal(y, F.max_pool2d(x.relu(), *STEM))
    grad_y = torch.randint(1, 9, y.shape, generator=generator).to(x).contiguous(memory_format=torch.channels_last)
    args = (grad_y, x, None, None, zero, one, EPS, "relu", False, *STEM)
    for found, expected in zip(run("bn_act_maxpool_backward", *args), reference("bn_act_maxpool_backward", args), strict=True):
        assert torch.equal(found, expected)  # small integers: exact in any order


@pytest.mark.parametrize("name", [name for name in OPS if "maxpool" in name])
def test_windows_that_do_not_fit_raise(device, name):
    args = arguments(name, draw((2, 8, 20, 20), torch.float32, device))[: -len(STEM)]
    for window, text in (
        (((3, 3), (2, 2), (2, 1)), "padding must be at most half"),
        (((25, 3), (2, 2), (1, 1)), "kernel_size must be at most x's padded size"),
        (((17, 15), (1, 1), (0, 0)), "kernel_size must be of at most 254 positions"),
        (((3, 3), (0, 2), (1, 1)), "stride must be two integers of at least 1"),
        (((3,), (2, 2), (1, 1)), "kernel_size must be two integers"),
    ):
        with pytest.raises(RuntimeError, match=rf"fastres\.{name}: {text}.*, got "):
            run(name, *args, *window)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_the_statistics_of_training_batch_norm_makes_the_same_bits(device, dtype, layout):
    for sample in REGISTRY["bn_act_train"].samples(device, dtype):
        x, weight, bias, eps, act = laid_out(sample.args, layout)
        y, mean, var = run("bn_act_train", x, weight, bias, eps, act)
        assert torch.equal(run("bn_act", x, weight, bias, mean, var, eps, act)[0], y), sample.label


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_takes_the_mask_of_forward(device, dtype, layout):
    """Also where the output rounds to zero: the gradient passes exactly where the stored y is positive."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    steps = torch.arange(-256, 256, dtype=torch.float64).reshape(1, 8, 8, 8) * tiny
    x = steps.to(device, dtype).contiguous(memory_format=getattr(torch, layout))
    weight = torch.tensor([1.0, 0.5, 0.25, 0.3, -0.5, 0.0, 1e-3, 0.51], device=device)
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = run("bn_act", x, weight, zero, zero, one, EPS, "relu")[0]
    grad_bias = run("bn_act_backward", torch.ones_like(x), x, weight, zero, zero, one, EPS, "relu", False)[2]
    assert torch.equal(grad_bias, (y > 0).sum((0, 2, 3)).float())
    x = draw((4, 8, 9, 9), dtype, device, layout)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(2)).to(device)
    y, mean, var = run("bn_act_train", x, weight, bias, 1e-5, "relu")
    grad_bias = run("bn_act_backward", torch.ones_like(x), x, weight, bias, mean, var, 1e-5, "relu", True)[2]
    assert torch.equal(grad_bias, (y > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_statistics_are_accurate(device, layout):
    x = draw((8, 16, 24, 24), torch.float32, device, layout) + 1e4
    _, mean, var = run("bn_act_train", x, None, None, 1e-5, "none")
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)
    for value in (100.0, 1 / 3, -7e20):
        x = torch.full((5, 12, 31, 16), value, device=device).contiguous(memory_format=getattr(torch, layout))
        _, mean, var = run("bn_act_train", x, None, None, 1e-12, "none")
        assert torch.equal(mean, x[0, :, 0, 0]) and not var.any()


def is_vector(a):
    return isinstance(a, torch.Tensor) and a.dim() == 1 and a.is_floating_point()


@pytest.mark.parametrize("name", [name for name in OPS if "bn" in name])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(device, name, parameters):
    x = draw((3, 24, 5, 8), torch.bfloat16, device)
    args = arguments(name, x, dtype=parameters)
    strided = [a.repeat_interleave(2)[::2] if is_vector(a) else a for a in args]
    assert_parity(name, strided, torch.bfloat16, f"{parameters} parameters")
    absent = [None if isinstance(a, torch.Tensor) and a.dim() == 1 and a.dtype == parameters else a for a in args]
    assert_parity(name, absent, torch.bfloat16, "no parameters")


def test_large_half_gradients_are_summed_in_float(device):
    x = draw((8, 8, 16, 16), torch.float16, device, "channels_last")
    grad_y = torch.full_like(x, 6e4)
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    _, mean, var = run("bn_act_train", x, weight, bias, 1e-5, "none")
    grads = run("bn_act_backward", grad_y, x, weight, bias, mean, var, 1e-5, "none", True)
    assert torch.equal(grads[2], torch.full_like(bias, 6e4 * 2048)) and grads[1].isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_the_same_bits_every_time(device, name):
    x = draw((16, 40, 14, 14), torch.bfloat16, device)
    args = laid_out(arguments(name, x, two_parts=True), "channels_last")
    expected = run(name, *args)
    for _ in range(50 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(run(name, *args), expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_what_is_unsafe_raises(device, name):
    """Memory safety is checked in C++, with the parameter, what it must be and what it is."""
    args = arguments(name, draw((2, 8, 4, 4), torch.float32, device), two_parts=True)
    schema = getattr(torch.ops.fastres_C, f"cuda_{name}").default._schema
    act = [argument.name for argument in schema.arguments].index("act")
    vector = next((i for i, a in enumerate(args) if is_vector(a)), None)
    bad = [
        (mapped(args, lambda t: t.double()), "float32, float16 or bfloat16"),
        (mapped(args, lambda t: t[:0]), "not empty"),
        (mapped(args, lambda t: t[..., ::2]), "dense"),
        ([*args[:act], "gelu", *args[act + 1 :]], "'relu' or 'none'"),
    ]
    if isinstance(args[1], torch.Tensor) and args[1].dim() == 4:
        bad += [
            ([args[0][:1], *args[1:]], "sizes"),
            ([args[0].half(), *args[1:]], "dtype"),
            ([args[0].contiguous(memory_format=torch.channels_last), *args[1:]], "dense|strides"),
        ]
    if vector is not None:
        bad.append(([*args[:vector], args[vector][:-1], *args[vector + 1 :]], "channels"))
    if name in TWO_PARTS:
        assert args[2].dtype == torch.uint8
        bad += [([*args[:2], mask, *args[3:]], "uint8|bit an element") for mask in (args[2][1:], args[2].float())]
        bad += [([args[0], second, *args[2:]], "sizes|dtype") for second in (args[1][:1], args[1].half())]
    for arguments_, text in bad:
        with pytest.raises(RuntimeError, match=rf"fastres\.{name}: \w+ must be .*({text}).*, got "):
            run(name, *arguments_)
