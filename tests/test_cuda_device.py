"""What only a GPU shows of the native CUDA ops: streams, graphs, devices, memory, tensors beyond 32 bits."""

import pytest
import torch
from _cuda_calls import OPS, arguments, draw, laid_out, mapped, run

from fastres.kernels import native

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu():
    if reason := native.why_not_cuda():
        pytest.skip(reason)
    return torch.device("cuda")


def on_gpu(name, gpu, shape=(16, 64, 28, 28)):
    return laid_out(arguments(name, draw(shape, torch.bfloat16, gpu)), "channels_last")


@pytest.mark.parametrize("name", OPS)
def test_no_synchronisation(gpu, name):
    args = on_gpu(name, gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("name", OPS)
def test_no_memory_is_kept(gpu, name):
    args = on_gpu(name, gpu)
    run(name, *args)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        run(name, *args)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_another_device_raise(gpu, name):
    args = on_gpu(name, gpu)
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            mixed = [*args[:index], value.cpu(), *args[index + 1 :]]
            with pytest.raises(RuntimeError, match="must be on"):
                run(name, *mixed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_device_of_its_tensors(gpu, name):
    args = on_gpu(name, torch.device("cuda:1"))
    with torch.cuda.device(0):
        found = run(name, *args)
    with torch.cuda.device(1):
        expected = run(name, *args)
    assert all(a.device.index == 1 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
