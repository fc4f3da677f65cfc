"""R23: allocations that fail, Ctrl-C, kill -9. What was on disk is whole, and the process goes on as if nothing had been."""

# ruff: noqa: E501

import copy
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from test_train import FEW, Net, some_images
from torch import nn

import fastres
from fastres import tune, tuner
from fastres.ops import REGISTRY
from fastres.train import Trainer, checkpoint
from reliability import children
from reliability.board import Tally, scored
from reliability.parity import backward, tuple_of

LEAST = 2048  # bytes of an allocation that may fail: tensors, workspaces, tables. PyTorch ends the process for want of a smaller list
CPU = torch.device("cpu")


@scored("R23", "allocations that fail, Ctrl-C in tune, freeze and training, kill -9 while files are written", full=700, short=45)
def interruptions(tally: Tally, count: int) -> None:
    children.apart(tally, "interruptions.signals", count // 3, count // 6)
    children.apart(tally, "interruptions.allocations", 2 * count // 3, watched=True)


def signals(tally: Tally, killed: int, interrupted: int) -> None:
    threads = torch.get_num_threads()
    kills(tally, killed)
    torch.set_num_threads(threads)
    control_c(tally, interrupted)


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.MaxPool2d(2)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)).eval()


def integers(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return fastres.freeze(model, x, quantize=fastres.Calibration([x], error=None, progress=False))


def tasks() -> dict[str, Callable[[], tuple]]:
    """Everything in which memory may run out; each gives the same tensors at every call. Files are not among them:
    safetensors ends the process where it gets no memory.
    """
    model, x = network(), torch.randn(2, 16, 14, 14, generator=torch.Generator().manual_seed(0))
    frozen, quantised, optimised = fastres.freeze(model, x), integers(model, x), fastres.optimize(copy.deepcopy(model))

    def without_gradient(run: Callable[[], torch.Tensor]) -> tuple:
        with torch.no_grad():
            return (run(),)

    def step() -> tuple:
        one = copy.deepcopy(optimised).train()
        one(x).square().sum().backward()
        return tuple(p.grad for p in one.parameters())

    found: dict[str, Callable[[], tuple]] = {
        "freeze": lambda: (fastres.freeze(model, x)(x),), "freeze to 8 bits": lambda: (integers(model, x)(x),), "frozen": lambda: (frozen(x),),
        "frozen in 8 bits": lambda: (quantised(x),), "step": step,
        "optimised": lambda: without_gradient(lambda: optimised(x)),
        "optimize": lambda: without_gradient(lambda: fastres.optimize(copy.deepcopy(model))(x)),
    }  # fmt: skip
    for name, op in REGISTRY.items():
        args = list(max(op.samples(CPU, torch.float32), key=lambda s: s.args[0].numel()).args)
        found[name] = lambda op=op, args=args: tuple_of(op(*args))
        if op.differentiable:
            found[f"{name}, gradients"] = lambda op=op, args=args: tuple(backward(op, args, 0))
    return found


def same(own: tuple, first: tuple) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(own, first, strict=True))


def allocations(tally: Tally, count: int) -> None:
    """Each allocation of a task fails once, or as many as fit the count, evenly.

    PyTorch's own convolutions run without oneDNN, which ends the process where it gets no memory.
    """
    torch.backends.mkldnn.enabled = False
    ready = tasks()
    for name, task in ready.items():
        first = task()
        assert same(task(), first), f"{name} is not the same twice"
        with children.failing(-1, LEAST) as seen:
            task()
        share = max(1, count // len(ready))
        for nth in range(0, max(1, seen[0]), max(1, seen[0] // share)):
            with tally.case(f"{name}: allocation {nth} of {seen[0]} fails"):
                with children.failing(nth, LEAST):
                    try:
                        found = task()
                    except MemoryError:
                        found = first
                    except (RuntimeError, SystemError) as error:  # the latter, without a word of memory, of Python's compiler
                        assert any(word in str(error).lower() for word in ("alloc", "memory", "without exception set")), error
                        found = first
                assert same(found, first), "another result for want of memory"
                assert same(task(), first), "another result afterwards"


def interrupted(task: Callable[[], object], delay: float) -> None:
    """Ctrl-C after so many seconds."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        task()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass


def control_c(tally: Tally, count: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTRES_CACHE_DIR"] = f"{folder}/cache"
        for make in (in_freeze, in_tune, in_training):
            task, check = make(Path(folder))
            start = time.perf_counter()
            task()
            taken = time.perf_counter() - start
            check()
            each = max(1, count // 3)
            for index in range(each):
                with tally.case(f"{make.__name__} after {index}/{each} of {taken:.2f} s"):
                    interrupted(task, max(1e-4, taken * (index + 0.5) / each))
                    check()


def in_freeze(folder: Path) -> tuple[Callable, Callable]:
    model, x = network(), torch.randn(2, 16, 14, 14)
    model[1].train()
    modes, state, first = [m.training for m in model.modules()], copy.deepcopy(model.state_dict()), integers(model, x)(x)

    def check() -> None:
        assert modes == [m.training for m in model.modules()], "modes changed"
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the model changed"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks were left"
        assert torch.equal(integers(model, x)(x), first), "another network afterwards"

    return lambda: integers(model, x), check


def in_tune(folder: Path) -> tuple[Callable, Callable]:
    model, x = fastres.optimize(network()), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        first = model(x).clone()

    def check() -> None:
        path = tune.cache_file(CPU)
        if path.exists():
            tune.read(path)
        assert not fastres.dispatch.is_forced(), "a backend is still forced"
        with torch.no_grad():
            assert torch.allclose(model(x), first, rtol=1e-4, atol=1e-4), "another result afterwards"

    return lambda: tuner.tune_model(model, x, seconds=0.002), check


def in_training(folder: Path) -> tuple[Callable, Callable]:
    """What was interrupted goes on to the same bits as what was not."""
    settings, data = FEW, some_images()

    def trainer(out: Path) -> Trainer:
        torch.manual_seed(1)
        return Trainer(Net(), data, settings, out=out)

    def bits(found: Trainer) -> dict:
        return {k: v.clone() for k, v in found._tensors().items()}

    whole = trainer(folder / "whole")
    whole.run()
    expected, number = bits(whole), iter(range(1_000_000))
    current = [folder / "whole"]

    def task() -> None:
        current[0] = folder / f"run{next(number)}"
        trainer(current[0]).run()

    def check() -> None:
        again = trainer(current[0])
        again.run()
        assert all(torch.equal(v, expected[k]) for k, v in bits(again).items()), "other weights in the end"

    return task, check


def write_checkpoints(folder: Path, version: int) -> None:
    checkpoint.save(folder, {"a": torch.full((40_000,), float(version))}, {"step": version})


def read_checkpoints(folder: Path) -> int:
    tensors, state = checkpoint.load(folder)
    assert (tensors["a"] == state["step"]).all(), "a mixture"
    return state["step"]


def write_cache(folder: Path, version: int) -> None:
    tune.store(CPU, {"cpu": ["add_act"]}, {f"key {k}": {"backend": "cpu", "config": [version]} for k in range(500)})


def read_cache(folder: Path) -> int:
    versions = {choice["config"][0] for choice in tune.read(tune.cache_file(CPU))["choices"].values()}
    assert len(versions) == 1, f"a mixture of {versions}"
    return versions.pop()


def kills(tally: Tally, count: int) -> None:
    """A forked process writes one version after the other until it is killed; then the last whole one is there."""
    torch.set_num_threads(1)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FASTRES_CACHE_DIR"] = f"{folder}/cache"
        x = torch.randn(2, 16, 14, 14)
        networks = [integers(network(), x * (1 + index)) for index in range(2)]
        answers = [found(x) for found in networks]

        def write_network(folder: Path, version: int) -> None:
            networks[version % 2].save(folder / "network")

        def read_network(folder: Path) -> int:
            y = fastres.load_frozen(folder / "network")(x)
            assert any(torch.equal(y, answer) for answer in answers), "another network"
            return 0

        pairs = (write_checkpoints, read_checkpoints), (write_cache, read_cache), (write_network, read_network)
        for index in range(count):
            write, read = pairs[index % 3]
            with tally.case(f"{write.__name__} killed, {index}"):
                write(folder, 0)
                child = os.fork()
                if child == 0:
                    for version in range(1, 1_000_000):
                        write(folder, version)
                time.sleep(draw.uniform(0.0, 0.02))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                read(folder)
                write(folder, 1)
                read(folder)
