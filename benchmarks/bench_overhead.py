"""What a call costs before any work: add_act on a tiny tensor, compared with eager ``relu(x + r)``; a block's training step
on a tiny image, compared with that of PyTorch's modules; an evaluation after a change of weights; a test of the clock itself.
"""

import copy
import functools
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import fastres
from benchmarks import harness
from fastres import functional, timing
from fastres.experiments.rivals import FASTRES
from fastres.experiments.twin import torch_twin
from fastres.models import resnet18
from fastres.nn import Bottleneck

LIMIT = {False: 5e-6, True: 10e-6}  # seconds over eager, by whether gradients are wanted
BLOCK_LIMIT = 1.6  # times the time of PyTorch's modules
CHANGED_LIMIT = 8
BATCHES = 2001
CALLS = 20  # few, so that a batch ends before the scheduler takes the core away
SLEEP = 0.05
COMMON = {"name": "add_act", "shape": [1, 8, 2, 2], "dtype": "float32", "layout": "contiguous"}


def measure(calls, batches=BATCHES):
    """The calls in turns: seconds per call of every batch."""
    found = {name: [] for name in calls}
    for turn in range(batches):
        for name in (*calls,) if turn % 2 else (*calls,)[::-1]:
            call, start = calls[name], time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter() - start) / CALLS)
    return found


def measure_on_one_thread(calls, batches):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(calls, batches)
    finally:
        torch.set_num_threads(threads)


def rows_of(found, **common):
    """A row for each rival."""
    rows = []
    for name, values in found.items():
        median = statistics.median(values)
        spread = timing.percentile(values, 0.2), timing.percentile(values, 0.8)
        measured = timing.Timing(median, *spread, len(values), CALLS, "wall").to_dict()
        rows.append({**common, "rival": name, "ratio": median / statistics.median(found[FASTRES]), **measured})
    return rows


def add_act_over_eager(grad, batches=BATCHES):
    """The seconds of every batch by rival, and the median of what a call of add_act takes longer than eager's."""
    x, residual = (torch.randn(1, 8, 2, 2, requires_grad=grad) for _ in range(2))
    calls = {FASTRES: lambda: functional.add_act(x, residual), "eager": lambda: F.relu(x + residual)}
    found = measure(calls, batches)
    return found, statistics.median(a - b for a, b in zip(found[FASTRES], found["eager"], strict=True))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_add_act_overhead(benchmark, record, grad):
    found, excess = add_act_over_eager(grad)
    about = {"pass": "with grad" if grad else "without grad", "over_eager_s": excess, "limit_s": LIMIT[grad]}
    rows = rows_of(found, **COMMON, **about)
    record(rows)
    benchmark.extra_info["over_eager_us"] = round(excess * 1e6, 2)
    x, residual = (torch.randn(1, 8, 2, 2, requires_grad=grad) for _ in range(2))
    benchmark.pedantic(functional.add_act, args=(x, residual), rounds=50, iterations=CALLS, warmup_rounds=1)
    assert excess <= LIMIT[grad], f"{excess * 1e6:.1f} µs over eager, allowed {LIMIT[grad] * 1e6:.0f}"


def test_a_training_block_overhead(benchmark, record):
    """Forward, backward and running statistics of a bottleneck of the deep stages, one thread."""
    block = Bottleneck(32, 8).to(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.ones_like(x)

    def step(module):
        torch.autograd.grad(module(x), [x, *module.parameters()], seed)

    calls = {FASTRES: functools.partial(step, block), "eager": functools.partial(step, torch_twin(block))}
    found = measure_on_one_thread(calls, BATCHES // 10)
    about = {"name": "Bottleneck", "shape": [1, 32, 4, 4], "dtype": "float32", "layout": "channels_last", "pass": "training"}
    rows = rows_of(found, **about)
    record(rows)
    benchmark.pedantic(step, args=(block,), rounds=50, iterations=CALLS, warmup_rounds=1)
    assert 1 / rows[1]["ratio"] <= BLOCK_LIMIT, f"{1 / rows[1]['ratio']:.2f} times PyTorch's time, allowed {BLOCK_LIMIT}"


def test_evaluation_after_a_change_of_weights_overhead(benchmark, record):
    """An optimised ResNet-18 takes over all its weights for one small image; PyTorch's has nothing to take over. One thread."""
    model, x = resnet18().to(memory_format=torch.channels_last).eval(), torch.randn(1, 3, 64, 64)

    @torch.no_grad()
    def changed(network):
        for parameter in network.parameters():
            parameter.mul_(1.0)
        network(x)

    calls = {FASTRES: functools.partial(changed, fastres.optimize(copy.deepcopy(model)))}
    found = measure_on_one_thread(calls | {"eager": functools.partial(changed, torch_twin(model))}, 10)
    about = {"pass": "evaluation after a change of weights"}
    rows = rows_of(found, name="resnet18", shape=list(x.shape), dtype="float32", layout="channels_last", **about)
    record(rows)
    benchmark.pedantic(*calls.values(), rounds=5)
    assert 1 / rows[1]["ratio"] <= CHANGED_LIMIT, f"{1 / rows[1]['ratio']:.2f} times PyTorch's time, allowed {CHANGED_LIMIT}"


def test_the_clock_measures_a_known_sleep(benchmark):
    measured = timing.interleaved({"sleep": lambda: time.sleep(SLEEP)}, torch.device("cpu"), seconds=0.5)["sleep"]
    benchmark.pedantic(time.sleep, args=(SLEEP,), rounds=3)
    assert measured.median == pytest.approx(SLEEP, rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "events"])
def test_the_clock_measures_a_known_kernel(benchmark, graph):
    """A kernel that spins for a number of GPU cycles, against many of them in a row by the wall clock."""
    cycles, many = 2_000_000, 100

    def spin():
        torch.cuda._sleep(cycles)

    spin()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(many):
        spin()
    torch.cuda.synchronize()
    known = (time.perf_counter() - start) / many
    measured = timing.interleaved({"spin": spin}, harness.device(), seconds=0.5, graph=graph)["spin"]
    benchmark.pedantic(spin, rounds=3)
    assert measured.median == pytest.approx(known, rel=0.05)
