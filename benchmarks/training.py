"""``python -m benchmarks.training kernels|steps|memory``: training on the CPU against eager PyTorch.

``kernels`` times batch norm with what follows it, ``steps`` whole training steps (forward, backward, SGD with momentum),
``memory`` the peak of a process that trains. Every part adds its rows to those that this commit has in its file,
``training-steps.json`` and so on, so that a long measurement can be made in pieces.
"""

import argparse
import copy
import functools
import itertools
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from benchmarks import command, harness
from benchmarks.peers.process import Died
from benchmarks.table import text_table
from fastres import functional
from fastres.experiments import parity, rivals
from fastres.experiments.compare import Row, training_step
from fastres.experiments.rivals import FASTRES, Rival
from fastres.experiments.subject import Subject, load
from fastres.ops import REGISTRY

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 32
# Channels and side of what batch norm sees in ResNet-18 and ResNet-50; at the end of a block a residual joins.
INNER = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
ENDS = [(64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
WAYS = (rivals.OPTIMIZED, rivals.CHANNELS_LAST, rivals.EAGER)
PROCESSES = 5  # of each rival whose memory is measured
JUDGED = 4  # images that parity is judged on: float64 convolutions are slow
EAGER = rivals.CHANNELS_LAST.name


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser("training", "Training on the CPU against eager PyTorch: kernels, steps, or peak memory.")
    parser.add_argument("part", choices=("kernels", "steps", "memory"))
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="one or more; both by default")
    parser.add_argument("--model", action="append", help="of steps and memory; resnet18 and resnet50 by default")
    parser.add_argument("--batch", type=command.images, action="append", help="of steps and memory; 8 and 32 by default")
    parser.add_argument("--size", type=command.images, action="append", help="of steps: rows and columns; 224 by default")
    parser.add_argument("--reuse-memory", action="store_true", help="measure all rivals after fastres.reuse_memory()")
    parser.add_argument("--no-record", action="store_true", help="write no result file")
    parser.add_argument("--way", choices=[way.name for way in WAYS], help=argparse.SUPPRESS)  # a process of memory
    args = parser.parse_args(arguments)
    if args.reuse_memory:
        fastres.reuse_memory()
    models, batches = args.model or ["resnet18", "resnet50"], args.batch or [8, 32]
    dtypes = args.dtype or list(DTYPES)
    if args.way:
        print(peak(args.way, models[0], batches[0], dtypes[0]))
        return 0
    if not args.no_record:
        harness.check_writable(CPU)
    for model in models if args.part != "kernels" else ():
        load(model, device="cpu")  # or fail now, not after minutes of work
    common = {"memory": "reused" if args.reuse_memory else "fresh"}
    rows: list[Row] = []
    if args.part == "kernels":
        for dtype in dtypes:
            rows += kernels(dtype, common)
    else:
        for model, batch, dtype in itertools.product(models, batches, dtypes):
            if args.part == "memory":
                rows += memory(model, batch, dtype, common)
            else:
                for size in args.size or [224]:
                    rows += steps(model, batch, size, dtype, common)
    print(text_table(rows))
    if not args.no_record:
        print(f"wrote {harness.extend(f'training-{args.part}', rows, CPU)}")
    return 0


# ---- batch norm and what follows it -------------------------------------------------------------------------


def kernels(dtype: str, common: Row) -> list[Row]:
    """bn_act and bn_add_act at every shape, forward alone and with backward."""
    peak = harness.copy_peak(CPU)
    rows: list[Row] = []
    for op, shapes in (("bn_act", INNER), ("bn_add_act", ENDS)):
        for channels, side in shapes:
            tensors = kernel_tensors(op, (BATCH, channels, side, side), DTYPES[dtype])
            check_kernel(op, tensors)
            for backward in (False, True):
                calls = {name: kernel_call(run[op], tensors, backward) for name, run in RUNS.items()}
                about = {
                    "name": op, "pass": "forward+backward" if backward else "forward", "shape": list(tensors[0].shape),
                    "dtype": str(DTYPES[dtype]).removeprefix("torch."), "layout": "channels_last", **common,
                    **kernel_cost(op, tensors, backward),
                }  # fmt: skip
                found = harness.rows_of(about, calls, {}, CPU)
                rows += [{**row, "of_copy_peak": row["gb_per_s"] / peak} for row in found]
    return rows


def kernel_tensors(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, the residual where there is one, weight, bias, all to be differentiated by."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2 if op == "bn_add_act" else 1)]
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    vectors = torch.rand(2, shape[1], generator=generator) + 0.5
    return [t.detach().requires_grad_() for t in (*images, *vectors)]


def native_bn_act(x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> Tensor:
    return F.relu_(F.batch_norm(x, *running, weight, bias, True))


def native_bn_add_act(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> Tensor:
    y = F.batch_norm(x, *running, weight, bias, True)
    y += residual
    return F.relu_(y)


def fused_bn_act(x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> Tensor:
    return functional.bn_act(x, *running, weight, bias, True)


def fused_bn_add_act(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> Tensor:
    return functional.bn_add_act(x, residual, *running, weight, bias, True)


RUNS = {
    FASTRES: {"bn_act": fused_bn_act, "bn_add_act": fused_bn_add_act},
    EAGER: {"bn_act": native_bn_act, "bn_add_act": native_bn_add_act},
}


def kernel_call(run: Callable, tensors: list[Tensor], backward: bool) -> Callable[[], object]:
    """One pass, with the running statistics that a module keeps."""
    running = torch.zeros(tensors[0].shape[1]), torch.ones(tensors[0].shape[1])
    seed = torch.ones_like(tensors[0]).detach()
    if backward:
        return lambda: torch.autograd.grad(run(*tensors, *running), tensors, seed)
    return lambda: run(*tensors, *running)


def check_kernel(op: str, tensors: list[Tensor]) -> None:
    """Refuse to time what misses the budget, on a part of the batch."""

    def results(name: str, double: bool) -> tuple[Tensor, ...]:
        part = [t.detach()[:JUDGED].contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        part = [(t.double() if double else t).detach().requires_grad_() for t in part]
        running = [torch.zeros_like(part[-1].detach()) for _ in range(2)]
        y = RUNS[name][op](*part, *running)
        return y, *torch.autograd.grad(y, part, torch.ones_like(y)), *running

    parts = results(FASTRES, False), results(EAGER, False), results(EAGER, True)
    harness.check_parity(f"{op} {tuple(tensors[0].shape)}", *parts, tensors[0].dtype)


def kernel_cost(op: str, tensors: list[Tensor], backward: bool) -> dict[str, int]:
    x = tensors[0].detach()
    costs = [REGISTRY[name].cost(x) for name in (f"{op}_train", f"{op}_backward")[: 2 if backward else 1]]
    return {"bytes": sum(moved for moved, _ in costs), "flops": sum(flops for _, flops in costs)}


# ---- training steps -----------------------------------------------------------------------------------------


def steps(model: str, batch: int, size: int, dtype: str, common: Row) -> list[Row]:
    """Whole training steps, in fp32 or under bf16 autocast; parity is judged on a few images first."""
    subject = load(model, batch=batch, size=size, device="cpu")
    subject.model.train()
    few = subject.x[:JUDGED]
    reference = parity.Reference(subject.model, few, None if dtype == "fp32" else DTYPES[dtype])
    calls, extra = {}, {}
    for way in WAYS:
        run, network, x = prepared(way, subject, dtype)
        verdict = reference.judge(parity.outputs(run, network, x[:JUDGED]))
        extra[way.name] = verdict.to_dict()
        if verdict.ok:
            calls[way.name] = training_step(run, network, x)
    about = {**step_row(subject, dtype), **common}
    found = harness.rows_of(about, calls, extra, CPU, seconds=20.0, batches=(3, 30))
    harness.refuse_wrong(found)
    return found


def prepared(way: Rival, subject: Subject, dtype: str) -> tuple[Callable, torch.nn.Module, Tensor]:
    """What is called, the model that owns the parameters, the input."""
    network = copy.deepcopy(subject.model)
    run, x = way.prepare(network, subject.x)
    return run if dtype == "fp32" else functools.partial(parity.autocast, run, DTYPES[dtype]), network, x


def step_row(subject: Subject, dtype: str) -> Row:
    name = "float32" if dtype == "fp32" else "bfloat16 autocast"
    return {"name": subject.name, "pass": "training", "shape": list(subject.x.shape), "dtype": name}


def memory(model: str, batch: int, dtype: str, common: Row) -> list[Row]:
    """The peak of resident memory of a process that trains, the median of some: the heap's luck moves one by a few percent."""
    peaks: dict[str, list[int]] = {way.name: [] for way in WAYS}
    for way in WAYS * PROCESSES:
        words = [sys.executable, "-m", "benchmarks.training", "memory", "--way", way.name, "--model", model]
        words += ["--batch", str(batch), "--dtype", dtype]
        words += ["--reuse-memory"] if common["memory"] == "reused" else []
        done = subprocess.run(words, capture_output=True, text=True, cwd=harness.ROOT)
        if done.returncode:
            raise Died(f"{way.name}: exit code {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2] or 'no words'}")
        peaks[way.name].append(int(done.stdout))
    rows: list[Row] = [{"rival": name, "peak_bytes": statistics.median(found)} for name, found in peaks.items()]
    subject = load(model, batch=batch, device="cpu")
    about = {**step_row(subject, dtype), "pass": "training, peak memory", **common}
    return [{**about, **row, "ratio": row["peak_bytes"] / rows[0]["peak_bytes"]} for row in rows]


def peak(name: str, model: str, batch: int, dtype: str) -> int:
    """Bytes resident at most in this process, which trains a few steps."""
    way = next(way for way in WAYS if way.name == name)
    subject = load(model, batch=batch, device="cpu")
    subject.model.train()
    step = training_step(*prepared(way, subject, dtype))
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(command.run(main))
