"""What is done on a device, one task at a time: a task is plain data, ``perform`` gives its rows.

Only the lists of tasks are about GPUs: on the CPU the same code runs the backends that exist there.
"""

import copy
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastres
from benchmarks import harness, sources
from benchmarks.acceptance import beside, cudnn_graphs
from benchmarks.bench_ops import CASE_IDS, call, wanting
from benchmarks.cases import AROUND, CASES, CHAIN, GRADIENT, INTEGERS, JOINED, LONG_CHAIN
from benchmarks.cases import STEM as POOLED_STEM
from fastres import info, tuner
from fastres.dispatch import Backend
from fastres.experiments import rivals
from fastres.experiments.compare import Row, compare, prepared
from fastres.experiments.subject import DTYPES, Subject, load
from fastres.ops import REGISTRY, conv_int8
from fastres.ops._op import Op

Task = dict[str, Any]
INFERENCE = (
    rivals.OPTIMIZED, rivals.FROZEN, rivals.CHANNELS_LAST, rivals.AMP, rivals.COMPILE, rivals.CUDA_GRAPHS, rivals.MAX_AUTOTUNE,
)  # fmt: skip
TRAINING = (
    rivals.OPTIMIZED, rivals.GRAPHED, rivals.CHANNELS_LAST, rivals.COMPILE, rivals.CUDA_GRAPHS, rivals.MAX_AUTOTUNE,
)  # fmt: skip
WAYS = {way.name: way for way in (*INFERENCE, *TRAINING, rivals.EAGER, rivals.FREEZING)}
COMPILED_BESIDE = (rivals.CUDA_GRAPHS.name, rivals.COMPILE.name)  # which of a network's rivals --warm compiles: the first
STATISTICS = "conv_statistics"
TORCH = "torch"  # the plain composition: what the kernels' times are held against
BATCH = 256
SOME = 48  # images that make many tiles for each multiprocessor; in float64, in several processes, memory holds no more
# What batch norm and addition see in ResNet-50, the largest first.
SHAPES = [(BATCH, 256, 56, 56), (BATCH, 64, 56, 56), (BATCH, 512, 28, 28), (BATCH, 1024, 14, 14), (BATCH, 2048, 7, 7)]
STEM_SHAPE = (BATCH, 64, 112, 112)
# Its convolutions: channels in and out, kernel, stride, side of the input; those that end a block with an addition, those
# inside, and the rest. In each, what weighs most comes first.
BLOCK_ENDS = [(64, 256, 1, 1, 56), (128, 512, 1, 1, 28), (256, 1024, 1, 1, 14), (512, 2048, 1, 1, 7)]
# And those whose shortcut is a projection: channels and stride of the shortcut behind the five; the last one is ResNet-18's.
PROJECTED = [
    (64, 256, 1, 1, 56, 64, 1), (128, 512, 1, 1, 28, 256, 2), (256, 1024, 1, 1, 14, 512, 2), (512, 2048, 1, 1, 7, 1024, 2),
    (128, 128, 3, 1, 28, 64, 2),
]  # fmt: skip
# 3x3, then 1x1 to so many channels with an addition, the end of a block; then 1x1 to as many as at first, of the next block.
CHAINED = [(64, 64, 3, 1, 56, 256), (128, 128, 3, 1, 28, 512)]
INNER = [
    (256, 64, 1, 1, 56), (64, 64, 3, 1, 56), (512, 128, 1, 1, 28), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7), (1024, 256, 1, 1, 14), (2048, 512, 1, 1, 7), (3, 64, 7, 2, 224), (128, 128, 3, 2, 56),
    (256, 512, 1, 2, 56),
]  # fmt: skip
STEM = [(3, 64, 7, 2, 224)]  # the first one, with the pool behind it and in training
# Some whose batch norm asks for statistics: bound by memory, and by products.
MEASURED = [(64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 1024, 1, 1, 14)]
# Those of a block's inside with stride 1, whose backward goes on through a batch norm; the same two bounds.
BEHIND_NORMS = [(64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (128, 128, 3, 1, 28), (128, 512, 1, 1, 28), (256, 1024, 1, 1, 14)]
CONVOLUTIONS = {
    "conv_bn_add_act": BLOCK_ENDS, CHAIN: CHAINED, LONG_CHAIN: CHAINED, JOINED: PROJECTED,
    "conv_bn_act": INNER, POOLED_STEM: STEM, "conv": STEM, "conv_backward_weight": STEM,
    STATISTICS: MEASURED, GRADIENT: BEHIND_NORMS,
}  # fmt: skip
INT8 = "int8"  # the dtype of tasks in 8-bit integers
OF_INTEGERS = [*BLOCK_ENDS[:2], *INNER[:4], INNER[5], (4, *INNER[8][1:])]  # images are of whole words
OF_BYTES = {"quantize_int8-forward": (BATCH, 3, 224, 224), "pool_int8-forward": STEM_SHAPE}
SECONDS = 0.6  # of one kernel's rows together
PATIENCE_S, COMPILING_S = 60.0, 90.0  # in which one kernel's task answers, unless it never ends; more for Triton's samples


def validations(place: torch.device) -> Iterator[Task]:
    """Every kernel that this device can run, but PyTorch's own, in each dtype; what has yet to be compiled comes last."""
    wanted = ("cuda", "cuda_wide", "cuda_cluster", "cudnn", "triton") if place.type == "cuda" else ("cpu", "onednn")
    for name, op, dtype in itertools.product(wanted, reversed(REGISTRY.values()), DTYPES):
        if any(b.name == name and info.status(op, b).startswith("live") for b in op.backends):
            patience = PATIENCE_S + COMPILING_S * (name == "triton")
            yield {"do": "validate", "name": op.name, "rival": name, "dtype": dtype, "patience": patience}


def kernels(broken: Sequence[list[str]] = ()) -> Iterator[Task]:
    """The ops of ResNet-50 at its shapes, what weighs most first; bf16, then fp16; without what is ``broken``: op, backend."""
    with_backward = {op for case in CASES if case.backward for op in case.covers}
    chosen = {name: case for name, case in CASE_IDS.items() if case.backward or case.op not in with_backward}
    plain = [name for name, case in chosen.items() if not case.convolution and case.op not in AROUND]
    for dtype, most in (("bf16", None), ("fp16", 1)):
        common = {"do": "kernel", "dtype": dtype, "patience": PATIENCE_S, "broken": broken}
        yield {"do": "peaks", "name": "peaks", "dtype": dtype}
        for name, sizes in CONVOLUTIONS.items():
            yield from ({**common, "name": name, "batch": BATCH, "convolution": size} for size in sizes[:most])
        if most is None:
            of_bytes = {**common, "dtype": INT8}
            yield from ({**of_bytes, "name": INTEGERS, "batch": BATCH, "convolution": size} for size in OF_INTEGERS)
            yield from ({**of_bytes, "name": name, "shape": shape} for name, shape in OF_BYTES.items())
        for shape in SHAPES[:most]:
            yield from ({**common, "name": name, "shape": shape} for name in plain if "maxpool" not in name)
        yield from ({**common, "name": name, "shape": STEM_SHAPE} for name in plain if "maxpool" in name)


def networks(warm: bool = False) -> Iterator[Task]:
    """ResNet-50 before the others, bf16 before fp16, the large batch and the single image, which is also timed as a user
    calls it, before what lies between.

    Args:
        warm: what is compiled may come out of torch.compile's caches.
    """
    order = [("resnet50", "bf16"), ("resnet50", "fp16"), ("resnet18", "bf16"), ("resnet152", "bf16")]
    order += [("resnet18", "fp16"), ("resnet152", "fp16")]
    passes = [(False, 256, True), (True, 256, True), (False, 1, True), (False, 1, False), (False, 32, True), (True, 64, True)]
    for (name, dtype), (training, batch, replay) in itertools.product(order, passes):
        mode = rivals.COMPILE if batch >= 64 else rivals.CUDA_GRAPHS  # of the two that which suits the batch
        ways = [way.name for way in (TRAINING if training else INFERENCE) if way.name not in COMPILED_BESIDE or way is mode]
        task = {"do": "network", "name": name, "dtype": dtype, "training": training, "batch": batch, "replay": replay}
        yield task | {"warm": [way for way in ways if way in COMPILED_BESIDE] if warm else [], "ways": ways}


def whole(warm: bool = False) -> Iterator[Task]:
    """Networks, behind the first one the same in 8-bit integers."""
    found = networks(warm)
    yield next(found)
    yield {"do": "integers", "name": "resnet50", "batch": BATCH, "dtype": INT8, "training": False}
    yield from found


def compilations() -> Iterator[Task]:
    """What is compiled when it is first called: a rival of each of the networks that come first, then Triton's kernels."""
    for task in itertools.islice(networks(), 3):
        way = next(way for way in COMPILED_BESIDE if way in task["ways"])
        yield {**task, "do": "compile", "ways": [way]}
    yield from ({**task, "do": "compile"} for task in kernels() if task["do"] == "kernel" and task["dtype"] in ("bf16", INT8))


def graphs_of_cudnn() -> Iterator[Task]:
    """What cuDNN may do in one graph, the largest layer first; one task, which says so, where its frontend is not installed."""
    installed = importlib.util.find_spec("cudnn") is not None
    cells = itertools.product(cudnn_graphs.SIZES, ("fp16", "bf16"), cudnn_graphs.PATTERNS)
    for size, dtype, name in itertools.islice(cells, None if installed else 1):
        shape = [BATCH, size[0], size[4], size[4]]
        yield {"do": "cudnn", "name": name, "rival": cudnn_graphs.GRAPH, "dtype": dtype, "shape": shape, "convolution": size}


def label(task: Task) -> str:
    return " ".join(str(value) for key, value in task.items() if key not in ("ways", "warm", "patience", "broken"))


def missing(task: Task, reason: str) -> list[Row]:
    """The row of a task that gave none."""
    row: Row = {"do": task["do"], "name": task["name"], "rival": task.get("rival", rivals.FASTRES), "missing": reason}
    if "shape" in task or "batch" in task:
        row |= {"shape": task.get("shape") or [task["batch"], 3, task.get("size", 224), task.get("size", 224)]}
    return [row | {key: task[key] for key in ("dtype", "training") if key in task}]


class Worker:
    """Performs tasks on one device, and knows the peaks that it measured."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.peaks: dict[str, tuple[float, float]] = {}

    def perform(self, task: Task, seconds_left: Callable[[], float] = lambda: math.inf) -> list[Row]:
        run: dict[str, Callable] = {
            "validate": self.validate, "peaks": self.measure_peaks, "kernel": self.kernel, "network": self.network,
            "compile": self.compile, "integers": self.integers, "cudnn": self.graph_of_cudnn,
        }  # fmt: skip
        found = run[task["do"]](task, seconds_left)
        return [{"do": task["do"], **row} for row in found]

    def validate(self, task: Task, seconds_left: Callable) -> list[Row]:
        """One backend's kernels of one op on all its samples of a dtype."""
        op = REGISTRY[task["name"]]
        backend = next(backend for backend in op.backends if backend.name == task["rival"])
        reason = tuner.Session(self.place).on_samples(op, backend, (DTYPES[task["dtype"]],))
        reason = reason or self.at_real_sizes(op, backend, task["dtype"])
        row: Row = {"name": op.name, "pass": "parity", "rival": backend.name, "dtype": task["dtype"], "ok": reason is None}
        row |= {} if reason is None else {"failure": reason}
        return [row | ({"source": sources.fingerprint(op.name, backend.name)} if backend.name in sources.ROOMS else {})]

    def at_real_sizes(self, op: Op, backend: Backend, dtype: str) -> str | None:
        """The same for convolutions in CUDA at sizes of which multiprocessors walk many tiles: a kernel that fails there, or
        never ends, is not timed beside others."""
        own = backend.name in ("cuda", "cuda_wide") and dtype != "fp32" and self.place.type == "cuda"
        for size in CONVOLUTIONS.get(op.name, ()) if own else ():
            args = convolution({"name": op.name, "batch": SOME, "convolution": size}, DTYPES[dtype], self.place)
            if backend.why_not(*args) is None and (reason := tuner.judge(op, backend.load(), args)):
                return f"on {SOME} images, {size}: {reason}"
        return None

    def measure_peaks(self, task: Task, seconds_left: Callable) -> list[Row]:
        """GB/s of a large copy and flop/s of a large product, against which kernels are held."""
        copy_peak, matmul_peak = harness.copy_peak(self.place), harness.matmul_peak(self.place, DTYPES[task["dtype"]])
        self.peaks[task["dtype"]] = copy_peak * 1e9, matmul_peak * 1e9
        self.peaks[INT8] = copy_peak * 1e9, 2 * matmul_peak * 1e9  # tensor cores multiply twice as many
        return [{"name": "peaks", "dtype": task["dtype"], "rival": TORCH, "gb_per_s": copy_peak, "gflop_per_s": matmul_peak}]

    def kernel(self, task: Task, seconds_left: Callable) -> list[Row]:
        """Every op of a case at one shape on each of its backends, beside PyTorch."""
        with fastres.use(TORCH):
            calls = self.recorded(task)
        with torch.no_grad():
            return [row for op, args in calls for row in self.backends(op, args, task["dtype"], task.get("broken", ()))]

    def recorded(self, task: Task) -> list[tuple[Op, tuple]]:
        """The calls of ops that a task is about, with their arguments."""
        dtype = torch.int8 if task["dtype"] == INT8 else DTYPES[task["dtype"]]
        if "convolution" in task:
            return [(REGISTRY[task["name"]], convolution(task, dtype, self.place))]
        case = CASE_IDS[task["name"]]
        tensors = case.tensors(tuple(task["shape"]), dtype, self.place)
        with torch.set_grad_enabled(case.backward):
            return list(tuner.recorded(lambda: call(case.fused, case, wanting(case, tensors))).values())

    def backends(self, op: Op, args: tuple, dtype: str, broken: Sequence[list[str]] = ()) -> list[Row]:
        """Rows of one call: a backend that takes the arguments is judged, and timed where it keeps the budget."""
        calls: dict[str, Callable] = {}
        extra: dict[str, Row] = {}
        truth = tuner.Truth(op, args) if any(b.why_not(*args) is None for b in op.backends if b.name != TORCH) else None
        for backend in op.backends:
            if backend.why_not(*args) is not None:
                continue
            run, wrong = backend.load(), [op.name, backend.name] in broken  # and may end this process, or never end
            judged = None if wrong or truth is None or backend.name == TORCH else truth.judge(run)
            failure = "it failed its validation" if wrong else judged
            extra[backend.name] = {"ok": failure is None} if failure is None else {"ok": False, "failure": failure}
            if failure is None:
                calls[backend.name] = harness.rotated(run, args, self.place)
        del truth  # float64 takes memory
        peers = beside.apart(op, args) if op.fallback is not None else beside.cudnn_alone(op, args)
        for name, run in peers.items():
            extra[name], calls[name] = {}, harness.rotated(run, args, self.place)
        moved, flops = op.cost(*args)
        common = {**named(op, args), "dtype": dtype, "bytes": moved, "flops": flops}
        found = harness.rows_of(common, calls, extra, self.place, base=TORCH, seconds=SECONDS)
        bytes_per_s, flops_per_s = self.peaks[dtype]
        roof = max(moved / bytes_per_s, flops / flops_per_s)  # seconds below which neither peak lets it go
        bound = "memory" if roof == moved / bytes_per_s else "matmul"
        return [{**row, "bound": bound, "of_roof": roof / row["median_s"]} if "median_s" in row else row for row in found]

    def compile(self, task: Task, seconds_left: Callable) -> list[Row]:
        """Compiles a network's rivals into torch.compile's caches, or the kernels of a call into Triton's; measures nothing."""
        if "ways" not in task:
            with fastres.use(TORCH):
                calls = self.recorded(task)
            with torch.no_grad():
                for backend, args in ((b, args) for op, args in calls for b in op.backends if b.name == "triton"):
                    if backend.why_not(*args) is None:
                        backend.load()(*args)
            return []
        subject, lower = self.subject(task)
        for rival in (WAYS[name] for name in task["ways"]):
            if rival.compiles:
                prepared(rival, copy.deepcopy(subject.model.train(task["training"])), subject.x, lower, cold=False)
        return []

    def subject(self, task: Task) -> tuple[Subject, torch.dtype | None]:
        """A network with its input, and the dtype of autocast, under which all ways train."""
        lower = DTYPES[task["dtype"]] if task["training"] and task["dtype"] != "fp32" else None
        options = {"size": task.get("size"), "device": self.place.type}
        return load(task["name"], batch=task["batch"], dtype="fp32" if lower else task["dtype"], **options), lower

    def graph_of_cudnn(self, task: Task, seconds_left: Callable) -> list[Row]:
        """One graph of one layer; raises where the frontend is not installed."""
        return cudnn_graphs.rows(importlib.import_module("cudnn"), task, self.place)

    def integers(self, task: Task, seconds_left: Callable) -> list[Row]:
        """A network in 8-bit integers by kernels yet to be validated, held against the definition; its time beside bf16's."""
        few, forced = 8, {}
        subject, _ = self.subject({**task, "dtype": "fp32"})
        for op in (REGISTRY[name] for name in (*AROUND, INTEGERS) if self.place.type == "cuda"):
            reason = tuner.Session(self.place).on_samples(op, op.backends[0], (torch.float32,))
            if reason and op.name == INTEGERS:
                return missing(task, reason)
            forced[op.name] = TORCH if reason else op.backends[0].name
        images = fastres.Calibration([subject.x[:64]], error=None, progress=False)
        with fastres.use(**forced):
            frozen = fastres.freeze(subject.model, subject.x, quantize=images)
            own = frozen(subject.x[:few])
        with tempfile.TemporaryDirectory() as folder, fastres.use(TORCH):
            frozen.save(path := Path(folder) / "network")
            same = torch.equal(fastres.load_frozen(path, subject.x[:few])(subject.x[:few]), own)
        x = subject.x.bfloat16()
        half = fastres.freeze(subject.model.bfloat16(), x)
        calls = {rivals.FROZEN.name: lambda: frozen(subject.x), "fastres.freeze in bf16": lambda: half(x)}
        common = {"name": task["name"], "pass": "inference", "shape": list(x.shape), "dtype": INT8}
        assert frozen.quality is not None
        extra = {rivals.FROZEN.name: {"ok": same, "error": frozen.quality.error, "agreement": frozen.quality.agreement}}
        seconds = {"seconds": task.get("seconds", 3.0), "batches": (3, 60)}
        return harness.rows_of(common, calls, extra, self.place, base=rivals.FROZEN.name, **seconds)

    def network(self, task: Task, seconds_left: Callable) -> list[Row]:
        """A whole network, the ways to run it in turns; in training all of them under autocast."""
        subject, lower = self.subject(task)
        return compare(
            subject, [WAYS[name] for name in task["ways"]], training=task["training"], lower=lower,
            seconds=task.get("seconds", 3.0), batches=(3, 60), replay=task.get("replay", True), warm=task.get("warm", ()),
            seconds_left=seconds_left,
        )  # fmt: skip


def convolution(task: Task, dtype: torch.dtype, place: torch.device) -> tuple[Any, ...]:
    """Arguments of a convolution of a residual network; at the end of a block with the other one's values."""
    channels, out, kernel, stride, side, *of_other = task["convolution"]
    if task["name"] == INTEGERS:
        geometry = (stride, stride), (kernel // 2, kernel // 2), (1, 1)
        x, weight = (task["batch"], channels, side, side), (out, channels, kernel, kernel)
        return conv_int8.drawn(x, weight, geometry, (channels, out, kernel, stride, side) in BLOCK_ENDS, True, place)
    padding, generator = kernel // 2, torch.Generator(place).manual_seed(0)
    out_side = (side + 2 * padding - kernel) // stride + 1

    def image(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=place).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    weight, geometry = image(out, channels, kernel, kernel), ((stride, stride), (padding, padding), (1, 1), 1)
    weight /= (channels * kernel * kernel) ** 0.5
    x, like_y = image(task["batch"], channels, side, side), image(task["batch"], out, out_side, out_side)
    if task["name"] == STATISTICS:
        return (x, weight, *geometry)
    if task["name"] in ("conv", "conv_backward_weight"):
        return (*((x, weight, None) if task["name"] == "conv" else (like_y, x, (kernel, kernel))), *geometry)
    if task["name"] == GRADIENT:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        parameters = torch.rand(2, channels, generator=generator, device=place) + 0.5
        return (like_y, weight, x, *parameters, mean, var, 1e-5, "relu", *geometry)
    residual = [like_y] if task["name"] == "conv_bn_add_act" else []
    norm = torch.rand(4, out, generator=generator, device=place) + 0.5
    if task["name"] in (CHAIN, LONG_CHAIN):
        args = [x, image(task["batch"], *of_other, out_side, out_side), weight, None, *norm, 1e-5, *geometry, "relu"]
        for k, depth in [(*of_other, out), (channels, *of_other)][: 2 if task["name"] == LONG_CHAIN else 1]:
            own_norm = torch.rand(4, k, generator=generator, device=place) + 0.5
            args += [image(k, depth, 1, 1) / depth**0.5, None, *own_norm, 1e-5, "relu"]
        return tuple(args)
    if task["name"] == JOINED:
        depth, step = of_other
        shortcut, own = image(task["batch"], depth, out_side * step, out_side * step), image(out, depth, 1, 1) / depth**0.5
        main, other = (weight, None, *norm), (own, None, *norm.flip(0))
        return (x, shortcut, *main, 1e-5, *geometry, *other, 1e-5, (step, step), "relu")
    pool = ((3, 3), (2, 2), (1, 1)) if task["name"] == POOLED_STEM else ()
    return (x, *residual, weight, None, *norm, 1e-5, *geometry, "relu", *pool)


def named(op: Op, args: tuple) -> Row:
    """What tells one call of an op from another: a convolution's channels, kernel and stride too."""
    x = next(a for a in args if isinstance(a, Tensor))
    if not op.name.startswith("conv"):
        return {"name": op.name, "shape": list(x.shape)}
    found = dict(zip(op.parameters, args, strict=True))
    if op.name == "conv_backward_weight":
        out, channels, kernel = found["grad_y"].shape[1], found["x"].shape[1], found["kernel"]
    else:
        out, channels, *kernel = found["weight"].shape
    name = f"{op.name} {kernel[0]}x{kernel[1]}/{found['stride'][0]} {channels}→{out}"
    if op.name == JOINED:
        name += f", 1x1/{found['shortcut_stride'][0]} {found['shortcut_weight'].shape[1]}→{out}"
    for weight in [found[key] for key in ("last_weight", "next_weight") if key in found]:
        name += f", 1x1/1 {weight.shape[1]}→{weight.shape[0]}"
    return {"name": name, "shape": list(x.shape)}
