"""R18: a million calls of changing shapes without growth, threads at once, forked and spawned processes."""

import copy
import ctypes
import gc
import itertools
import multiprocessing
import random
import threading

import torch
from torch import nn

import fastres
from fastres import functional
from fastres import nn as fnn
from fastres.budget import errors
from fastres.ops import REGISTRY
from reliability import children
from reliability.board import Tally, scored

GROWTH = 1 << 20  # bytes that a process may hold more than after its first calls
THREADS = 8
ROUND = 1000


@scored("R18", "calls of changing shapes without growth of memory, eight threads, fork and spawn", full=1_080_000, short=4_000)
def soak(tally: Tally, count: int) -> None:
    each = min(10_000, count // 20)
    children.apart(tally, "soak.calls_and_threads", count - THREADS * each, each)
    children.apart(tally, "soak.processes", 3 if count > 100_000 else 1)


def calls_and_threads(tally: Tally, count: int, each: int) -> None:
    steady(tally, count)
    at_once(tally, each)


def calls(seed: int) -> list:
    """Functions without arguments: ops, gradients, blocks, frozen networks, as a program mixes them."""
    draw, found = random.Random(seed), []
    samples = [
        (op, sample.args) for op in REGISTRY.values() for dtype in (torch.float32, torch.bfloat16)
        for sample in op.samples(torch.device("cpu"), dtype)
        if sum(a.numel() for a in sample.args if isinstance(a, torch.Tensor)) < 2000
    ]  # fmt: skip
    found += [(lambda op=op, args=args: op(*args)) for op, args in samples]
    block = fnn.BasicBlock(8, 8).eval()
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    frozen, optimized = fastres.freeze(network, torch.randn(1, 3, 6, 6)), fastres.optimize(copy.deepcopy(network))
    for _ in range(12):
        x = torch.randn(draw.randint(1, 3), 8, draw.randint(1, 7), draw.randint(1, 7))
        y = torch.randn(1, 3, draw.randint(3, 9), draw.randint(3, 9))

        def gradient(x=x) -> torch.Tensor:
            given = x.detach().requires_grad_()
            functional.add_act(given, x).sum().backward()
            return given.grad

        def inside(module, x) -> torch.Tensor:
            with torch.no_grad():
                return module(x)

        found += [gradient, lambda x=x, run=inside: run(block, x)]
        found += [lambda y=y, m=m, run=inside: run(m, y) for m in (frozen, optimized)]
    draw.shuffle(found)
    return found


def resident() -> int:
    """Bytes of memory of its own that the process holds, after what the allocator keeps was given back. Pages of files, which
    the system drops and reads again as it likes, are not among them.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file.read().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Anonymous", "Swap")) * 1024


def steady(tally: Tally, count: int) -> None:
    """All calls of one thread in rounds; from the second tenth on memory may not grow."""
    torch.manual_seed(0)
    ready = calls(0)
    functions = itertools.cycle(ready)
    before, rounds = 0, max(4, count // ROUND)
    for number in range(rounds):
        for _ in range(count // rounds):
            with tally.case(f"call {tally.tried}"):
                next(functions)()
        if number == max(1, rounds // 10):
            before = resident()
    if (grown := resident() - before) > GROWTH:
        tally.fail(f"{tally.tried} calls: memory grew by {grown} bytes")


def values(result: object) -> list[torch.Tensor]:
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]


def agree(own: list, first: list) -> None:
    for a, b in zip(own, first, strict=True):
        fine = torch.equal(a, b) or not a.dtype.is_floating_point or errors(a, b)["max"] < 1e-6  # NaN apart
        assert fine or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())), "differs"


def at_once(tally: Tally, each: int) -> None:
    """The same calls from eight threads, each in its own order, give what they give alone."""
    torch.manual_seed(0)
    functions = calls(0)
    alone = [values(f()) for f in functions]
    tallies = [Tally() for _ in range(THREADS)]
    gate = threading.Barrier(THREADS)

    def work(number: int) -> None:
        torch.set_num_threads(1 + number % 2)
        draw = random.Random(number)
        gate.wait()
        for _ in range(each):
            index = draw.randrange(len(functions))
            with tallies[number].case(f"thread {number}"):
                agree(values(functions[index]()), alone[index])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in tallies:
        tally.tried += found.tried
        for text in found.failures:
            tally.fail(text)


def answer(seed: int, queue) -> None:
    torch.manual_seed(0)
    queue.put(sum(float(v.double().nan_to_num().sum()) for f in calls(seed)[:200] for v in values(f())))


def processes(tally: Tally, each: int) -> None:
    """Processes that are forked after calls, or spawned, compute the same. One with threads of OpenMP cannot be forked by
    PyTorch's own rule, so the parent has one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here = sum(float(v.double().nan_to_num().sum()) for f in calls(3)[:200] for v in values(f()))
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        for number in range(each):
            with tally.case(f"{method} {number}"):
                queue = context.Queue()
                child = context.Process(target=answer, args=(3, queue))
                child.start()
                there = queue.get(timeout=300)
                child.join(300)
                assert child.exitcode == 0 and abs(there - here) <= 1e-6 * abs(here), f"{there}, not {here}"
