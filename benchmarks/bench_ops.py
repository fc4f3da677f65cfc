"""Every public op against the PyTorch a user would write, eager and compiled, forward and forward + backward."""

import itertools

import pytest
import torch

from benchmarks import harness
from benchmarks.cases import CASES
from fastres.experiments.rivals import FASTRES
from fastres.ops import REGISTRY

CPU_SHAPES = [(8, 64, 56, 56), (8, 256, 14, 14)]
GPU_SHAPES = [(256, 64, 56, 56), (256, 256, 56, 56), (256, 1024, 14, 14)]
CASE_IDS = {f"{case.id}{f'-{case.convolution}x{case.convolution}' if case.convolution else ''}": case for case in CASES}


def test_every_op_has_a_case(benchmark):
    covered = {name for case in CASES for name in case.covers}
    assert benchmark.pedantic(lambda: covered, rounds=1) == set(REGISTRY)


@pytest.mark.parametrize("shape", CPU_SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", CASE_IDS)
def test_op(benchmark, record, case, shape):
    run(benchmark, record, CASE_IDS[case], shape, torch.float32, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("case", CASE_IDS)
def test_op_cuda(benchmark, record, case, shape):
    run(benchmark, record, CASE_IDS[case], shape, torch.bfloat16, torch.device("cuda"))


def run(benchmark, record, case, shape, dtype, device):
    tensors = case.tensors(shape, dtype, device)
    check_parity(case, tensors)
    functions = {FASTRES: case.fused, "eager": case.eager}
    compiled, row = harness.compiled(case.eager, *wanting(case, tensors))
    extra = {"torch.compile": row}
    if compiled is not None:
        functions["torch.compile"] = compiled
    calls = {name: rotated(function, case, tensors, device) for name, function in functions.items()}
    moved, flops = case.cost(tensors)
    common = {
        "name": case.op, "pass": "forward+backward" if case.backward else "forward", "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."), "layout": "channels_last", "bytes": moved, "flops": flops,
    }  # fmt: skip
    if case.convolution:
        common["name"] = f"{case.op} {case.convolution}x{case.convolution}"
    with torch.set_grad_enabled(case.backward):
        record(harness.rows_of(common, calls, extra, device))
        benchmark.pedantic(calls[FASTRES], rounds=5, warmup_rounds=1)


def wanting(case, tensors):
    """Fresh copies; where the case goes backward, all but the statistics require grad."""
    copies = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    if case.backward:
        statistics = range(len(copies) - 4, len(copies) - 2) if case.op != "add_act" else ()
        for index, tensor in enumerate(copies):
            tensor.requires_grad_(index not in statistics)
    return copies


def call(function, case, tensors):
    """One pass; returns the output and, of a case that goes backward, the gradients."""
    y = function(*tensors)
    if not case.backward:
        return (y,)
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))


def rotated(function, case, tensors, device):
    """The call on one set of inputs; on a GPU, on several in turn, more than its cache holds."""
    copies = [wanting(case, tensors)]
    seeds = torch.ones_like(function(*copies[0])).detach()
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in tensors)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies += [wanting(case, tensors) for _ in range(min(3 * cache // size, harness.MOST_COPIES - 1))]
    turn = itertools.cycle([(c, [t for t in c if t.requires_grad]) for c in copies])

    def forward():
        return function(*next(turn)[0])

    def both():
        inputs, wanted = next(turn)
        return torch.autograd.grad(function(*inputs), wanted, seeds)

    return both if case.backward else forward


def check_parity(case, tensors):
    """Refuse to time what misses the budget."""
    fused, same = (call(function, case, wanting(case, tensors)) for function in (case.fused, case.eager))
    if not same[0].is_floating_point():  # integers must be equal
        if not torch.equal(fused[0], same[0]):
            raise harness.ParityError(f"{case.id}: other integers")
        return
    truth = call(case.eager, case, wanting(case, [t.double() for t in tensors]))
    harness.check_parity(case.id, fused, same, truth, tensors[0].dtype)
