"""The native CUDA ops against float64.

On a GPU as built; without one, the same kernels and bindings executed on the CPU (see _cuda_on_cpu.py).
"""

import itertools
import re
from pathlib import Path

import _cuda_on_cpu
import pytest
import torch
from tolerances import assert_close_to_truth

from fastres.kernels import native
from fastres.kernels.layout import memory_format
from fastres.ops import REGISTRY

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cpp"))
OPS = [name for path in SOURCES for name in re.findall(r'm\.def\(\s*"cuda_(\w+)\(', path.read_text())]
REDUCTIONS = [name for name in OPS if name.endswith("_train") or ("bn" in name and name.endswith("_backward"))]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Partial tiles of channels, idle threads, sizes that forbid vectors, planes smaller than a block, several splits.
SHAPES = [
    (3, 520, 5, 7), (2, 300, 4, 4), (1, 7, 3, 5), (5, 16, 40, 40), (6, 3, 7, 7), (300, 2, 2, 4),
    (70, 5, 1, 1), (2, 2100, 1, 2), (2, 1, 64, 64), (40, 2, 32, 32), (1, 1, 1, 5), (9, 24, 16, 16),
]  # fmt: skip


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


def run(name, *args):
    result = getattr(torch.ops.fastres_C, f"cuda_{name}")(*args)
    return result if isinstance(result, tuple) else (result,)


def reference(name, args):
    result = REGISTRY[name].reference(*args)
    return result if isinstance(result, tuple) else (result,)


def mapped(args, change):
    """The arguments with change(tensor) in place of each activation."""
    return [change(a) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]


def in_double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def laid_out(args, layout):
    return mapped(args, lambda t: t.contiguous(memory_format=getattr(torch, layout)))


def assert_parity(name, args, dtype, label):
    found, same, truth = run(name, *args), reference(name, args), reference(name, in_double(args))
    assert len(found) == len(truth)
    for index, (actual, torch_same, exact) in enumerate(zip(found, same, truth, strict=True)):
        # Digits that cancel are lost in any order: a mean near zero is judged by the spread of what it averages, a sum
        # of n terms of size one and any sign by its expected size, n ** 0.5, four times, for the steps on the way.
        spread = truth[2].sqrt() if name.endswith("_train") and index == 1 else 0.0
        if name.endswith("_backward") and actual.dim() == 1:
            spread = 4 * (args[0].numel() / actual.numel()) ** 0.5
        judged = (actual.double() + spread, torch_same.double() + spread, exact + spread)
        assert_close_to_truth(*judged, dtype, f"{name} {label} output {index}")
        assert actual.dtype == torch_same.dtype, f"{name} {label} output {index}"
        if actual.dim() == 4 and not name.startswith("add_act"):
            x = next(a for a in args if isinstance(a, torch.Tensor))
            assert actual.is_contiguous(memory_format=memory_format(x))


def arguments(name, x, generator=None, act="relu", training=True, dtype=torch.float32):
    """Arguments of any op for the input x: the other activations, parameters and statistics are drawn here."""
    draw = lambda: torch.randn(x.shape, generator=generator).to(x)  # noqa: E731
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, generator=generator).to(x.device, dtype) for _ in range(2))
    mean, var = x.double().mean((0, 2, 3)).float(), x.double().var((0, 2, 3), unbiased=False).float()
    base = name.removesuffix("_backward").removesuffix("_train")
    if base == "add_act":
        return [x, draw(), act]
    if name == "bn_act_backward":
        return [draw(), x, weight, bias, mean, var, 1e-5, act, training]
    if name == "bn_add_act_backward":
        return [draw(), draw().relu(), x, weight, mean, var, 1e-5, act, training]
    residual = [draw()] if base == "bn_add_act" else []
    statistics = [] if name.endswith("_train") else [mean, var]
    return [x, *residual, weight, bias, *statistics, 1e-5, act]


def draw(shape, dtype, device, layout="contiguous_format", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3
    return x.to(device, dtype).contiguous(memory_format=getattr(torch, layout))


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
        args = arguments(name, x, torch.Generator().manual_seed(seed), act, training=seed % 3 > 0)
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

    args = laid_out(arguments(name, draw((3, 24, 5, 8), dtype, device)), layout)
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
        x, r = draw((2, numel), dtype, device)
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
    assert same_bits(run("add_act", a, b, "relu")[0], (a + b).relu())
    assert same_bits(run("add_act", a, b, "none")[0], a + b)
    masked = torch.ops.aten.threshold_backward(a, b, 0)
    assert same_bits(run("add_act_backward", a, b, "relu")[0], masked)
    image = a.reshape(1, 1, 13, 13)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    y = run("bn_act", image, None, None, zero, one, 0.0, "relu")[0]
    assert same_bits(y.flatten(), (a + torch.zeros_like(a)).relu())
    y, _, _ = run("bn_act_train", image, None, None, 1e-5, "relu")
    assert y.isnan().all()


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_takes_the_mask_of_forward(device, dtype, layout):
    """Also where the output rounds to zero: the gradient passes exactly where the stored y is positive."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    steps = torch.arange(-256, 256, dtype=torch.float64).reshape(1, 8, 8, 8) * tiny
    x = steps.to(device, dtype).contiguous(memory_format=getattr(torch, layout))
    weight = torch.tensor([1.0, 0.5, 0.25, 0.3, -0.5, 0.0, 1e-3, 0.51], device=device)
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = run("bn_act", x, weight, zero, zero, one, 0.0, "relu")[0]
    grad_bias = run("bn_act_backward", torch.ones_like(x), x, weight, zero, zero, one, 0.0, "relu", False)[2]
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


@pytest.mark.parametrize("name", [name for name in OPS if "bn" in name])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(device, name, parameters):
    x = draw((3, 24, 5, 8), torch.bfloat16, device)
    args = arguments(name, x, dtype=parameters)
    strided = [a.repeat_interleave(2)[::2] if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in args]
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
    args = laid_out(arguments(name, draw((16, 40, 14, 14), torch.bfloat16, device)), "channels_last")
    expected = run(name, *args)
    for _ in range(50 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(run(name, *args), expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_what_is_unsafe_raises(device, name):
    """Memory safety is checked in C++, with the parameter, what it must be and what it is."""
    args = arguments(name, draw((2, 8, 4, 4), torch.float32, device))
    schema = getattr(torch.ops.fastres_C, f"cuda_{name}").default._schema
    act = [argument.name for argument in schema.arguments].index("act")
    vector = next((i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 1), None)
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
    for arguments_, text in bad:
        with pytest.raises(RuntimeError, match=rf"fastres\.{name}: \w+ must be .*({text}).*, got "):
            run(name, *arguments_)


@pytest.fixture
def gpu():
    if reason := native.why_not_cuda():
        pytest.skip(reason)
    return torch.device("cuda")


def on_gpu(name, gpu, shape=(16, 64, 28, 28)):
    return laid_out(arguments(name, draw(shape, torch.bfloat16, gpu)), "channels_last")


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPS)
def test_no_synchronisation(gpu, name):
    args = on_gpu(name, gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(gpu, name):
    """The inputs are ready only at the end of a long kernel on a side stream."""
    args = on_gpu(name, gpu)
    expected = run(name, *args)
    late = mapped(args, torch.zeros_like)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for a, b in zip(late, args, strict=True):
            if a is not b and isinstance(a, torch.Tensor):
                a.copy_(b)
        found = run(name, *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPS)
def test_graph_replays(gpu, name):
    """A captured call gives the bits of an eager one for every new input."""
    args = on_gpu(name, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(name, *args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, *args)
    activations = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
    for replay in range(100):
        for a in activations:
            a.normal_(mean=0.1 * replay)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(name, *args), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPS)
def test_no_memory_is_kept(gpu, name):
    args = on_gpu(name, gpu)
    run(name, *args)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        run(name, *args)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPS)
def test_tensors_of_another_device_raise(gpu, name):
    args = on_gpu(name, gpu)
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            mixed = [*args[:index], value.cpu(), *args[index + 1 :]]
            with pytest.raises(RuntimeError, match="must be on"):
                run(name, *mixed)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_device_of_its_tensors(gpu, name):
    args = on_gpu(name, torch.device("cuda:1"))
    with torch.cuda.device(0):
        found = run(name, *args)
    with torch.cuda.device(1):
        expected = run(name, *args)
    assert all(a.device.index == 1 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", OPS)
def test_more_than_2_31_elements(gpu, name, layout):
    """The last image of a batch, beyond what 32 bits can address, is treated as the first, which it copies."""
    shape = (2**15 + 1, 64, 32, 32)
    needed = 2 * 7 * shape[0] * 2**16
    if torch.cuda.get_device_properties(gpu).total_memory < needed:
        pytest.skip(f"needs a GPU with {needed >> 30} GiB")
    image = draw((1, *shape[1:]), torch.float16, gpu)

    memory = {"memory_format": getattr(torch, layout)}
    args = mapped(arguments(name, image), lambda t: t.expand(shape).contiguous(**memory))
    for found in run(name, *args):
        if found.dim() == 4:
            assert torch.equal(found[0], found[-1]) and found[0].any()
    torch.cuda.empty_cache()
