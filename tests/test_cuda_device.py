"""What only a GPU shows of its kernels: streams, graphs, devices, memory, determinism, tensors beyond 32 bits."""

import contextlib
import fcntl
import itertools
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from _cuda_calls import OPS, arguments, draw, is_activation, laid_out, mapped
from _cuda_calls import run as run_native

from fastres.dispatch import GPU_KERNELS
from fastres.kernels import native
from fastres.ops import REGISTRY

pytestmark = pytest.mark.cuda
CALLS = [(name, b.name) for name, op in REGISTRY.items() for b in op.backends if b.name in GPU_KERNELS]
WINDOWS = {"cuda_wide": 3}  # pixels: x is read whole
every_kernel = pytest.mark.parametrize(("name", "backend"), CALLS)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda")


def run(name, backend, *args):
    """One op on one backend, as a tuple; skips where that cannot run."""
    chosen = next(b for b in REGISTRY[name].backends if b.name == backend)
    if reason := chosen.why_not(*args):
        pytest.skip(reason)
    result = chosen.load()(*args)
    return result if isinstance(result, tuple) else (result,)


def on_gpu(name, gpu, backend="cuda", shape=(16, 64, 28, 28)):
    x = draw(shape, torch.bfloat16, gpu)
    return laid_out(arguments(name, x, kernel=WINDOWS.get(backend, 1)), "channels_last")


@every_kernel
def test_no_synchronisation(gpu, name, backend):
    args = on_gpu(name, gpu, backend)
    run(name, backend, *args)  # compiles, folds, loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, backend, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kernel
def test_runs_on_the_current_stream(gpu, name, backend):
    """The inputs are ready only at the end of a long kernel on a side stream."""
    args = on_gpu(name, gpu, backend)
    expected = run(name, backend, *args)
    late = mapped(args, torch.zeros_like)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for a, b in zip(late, args, strict=True):
            if a is not b and isinstance(a, torch.Tensor):
                a.copy_(b)
        found = run(name, backend, *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_kernel
def test_graph_replays(gpu, name, backend):
    """A captured call gives the bits of an eager one for every new input."""
    args = on_gpu(name, gpu, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(name, backend, *args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, backend, *args)
    activations = [a for a in args if is_activation(a)]
    for replay in range(100):
        for a in activations:
            a.normal_(mean=0.1 * replay) if a.is_floating_point() else a.random_(-128, 128)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(name, backend, *args), strict=True))


@every_kernel
def test_no_memory_is_kept(gpu, name, backend):
    args = on_gpu(name, gpu, backend)
    run(name, backend, *args)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        run(name, backend, *args)
    assert torch.cuda.memory_allocated() == before


@every_kernel
def test_the_same_bits_every_time(gpu, name, backend):
    args = on_gpu(name, gpu, backend)
    expected = run(name, backend, *args)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(name, backend, *args), expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_another_device_raise(gpu, name):
    if reason := native.why_not_cuda():
        pytest.skip(reason)
    args = on_gpu(name, gpu)
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            mixed = [*args[:index], value.cpu(), *args[index + 1 :]]
            with pytest.raises(RuntimeError, match="must be on"):
                run_native(name, *mixed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_kernel
def test_runs_on_the_device_of_its_tensors(gpu, name, backend):
    args = on_gpu(name, torch.device("cuda:1"), backend)
    with torch.cuda.device(0):
        found = run(name, backend, *args)
    with torch.cuda.device(1):
        expected = run(name, backend, *args)
    assert all(a.device.index == 1 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


IMAGES = 2**15 + 1
NEEDED = 2 * 7 * IMAGES * 2**16  # bytes: of seven tensors of 16 bits


@pytest.fixture
def room(gpu):
    """The memory for such tensors; of processes that run tests side by side no more have it at a time than it holds."""
    places = torch.cuda.get_device_properties(gpu).total_memory * 4 // 5 // NEEDED
    if places == 0:
        pytest.skip(f"needs a GPU with {NEEDED * 5 // 4 >> 30} GiB")
    with contextlib.ExitStack() as stack:  # whose end is that of the lock
        paths = [Path(tempfile.gettempdir(), f"fastres-tests-{os.getuid()}-{place}") for place in range(places)]
        for file in itertools.cycle([stack.enter_context(path.open("w")) for path in paths]):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        yield
        torch.cuda.empty_cache()


def many_times(args, images, memory):
    """The arguments of one image as those of many that are the same; a ReLU's mask, of bytes, lies as they do."""
    args = mapped(args, lambda t: t.expand(images, -1, -1, -1).contiguous(**memory))
    return [a.repeat(images) if isinstance(a, torch.Tensor) and a.dtype == torch.uint8 else a for a in args]


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@every_kernel
def test_more_than_2_31_elements(gpu, room, name, backend, layout):
    """The last image of a batch, beyond what 32 bits can address, is treated as the first, which it copies."""
    image, memory = draw((1, 64, 32, 32), torch.float16, gpu), {"memory_format": getattr(torch, layout)}
    for found in run(name, backend, *many_times(arguments(name, image, kernel=WINDOWS.get(backend, 1)), IMAGES, memory)):
        if found.dim() == 4:
            assert torch.equal(found[0], found[-1]) and found[0].any()
