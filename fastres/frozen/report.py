"""What ``fastres.explain`` says about a frozen network: its steps in order and, if asked, how long each takes."""

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.errors import must
from fastres.frozen.base import Frozen, check_images
from fastres.frozen.layers import Layer
from fastres.frozen.module import NativeFrozen
from fastres.frozen.program import FIELDS, Program, Step
from fastres.kernels import native
from fastres.memory import large_pages

_REPEATS = 7


@dataclass
class StepReport:
    """One step: ``images`` a pass, sizes as (channels, height, width), milliseconds and rates for the whole batch. On a GPU
    also the share of the peak, of a copy or a matrix product, that bounds it, and what the kernels tried took or why not."""

    name: str
    op: str
    algorithm: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    images: int
    ms: float | None = None
    gflop_per_s: float | None = None
    gb_per_s: float | None = None
    of_peak: float | None = None
    bound: str = ""  # copy or matmul
    tried: dict[str, float | str] = field(default_factory=dict)  # milliseconds, or a reason, by kernel


@dataclass
class PlanReport:
    """A plan for one input shape: ``str()`` for people, ``to_dict()`` for programs. On a GPU, with times, also what one
    replay of its graph takes, and the peaks of the device."""

    model: str
    dtype: str
    shape: tuple[int, ...]
    arena_bytes: int
    constant_bytes: int
    parts: int
    steps: list[StepReport]
    replay_ms: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)  # GB/s of a copy, GFLOP/s of a product

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mib = f"{self.constant_bytes / 2**20:.1f} MiB of constants, {self.arena_bytes / 2**20:.1f} MiB of activations"
        total = sum(step.ms or 0.0 for step in self.steps)
        shared = f", {self.parts} parts with a thread each" if self.parts > 1 else ""
        head = f"{self.model}, frozen in {self.dtype}, channels_last, for {_by(self.shape)}"
        lines = [f"{head}: {len(self.steps)} steps, {mib}{shared}"]
        if self.replay_ms is not None:
            rates = f"{self.peaks['copy']:.0f} GB/s copied, {self.peaks['matmul'] / 1e3:.0f} TFLOP/s multiplied"
            lines.append(f"one replay {self.replay_ms:.3f} ms, its steps alone {total:.3f} ms; peaks {rates}")
        for step in self.steps:
            timed = "" if step.ms is None else f"  {step.ms:8.3f} ms {100 * step.ms / total:3.0f} %"
            timed += _rate(step)
            sizes = f"{_by(step.x)} -> {_by(step.y)}"
            passes = f" {step.images:3} a pass" if step.images < self.shape[0] else ""
            lines.append(f"{step.name:28} {step.op:16} {step.algorithm:9} {sizes:28}{passes}{timed}")
        return "\n".join(lines)


def _rate(step: StepReport) -> str:
    if step.of_peak is not None:
        rate = f"{step.gb_per_s:6.0f} GB/s" if step.bound == "copy" else f"{(step.gflop_per_s or 0) / 1e3:6.0f} TFLOP/s"
        return f" {rate}, {100 * step.of_peak:.0f} % of {step.bound}"
    return "" if step.gflop_per_s is None else f" {step.gflop_per_s:6.0f} GFLOP/s"


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def explain(frozen: Frozen, x: Tensor | None = None) -> PlanReport:
    """The plan for the last input shape, or, with times, for that of x.

    Raises:
        TypeError, ValueError: x is not a batch of images that fits, or there is no shape yet and no x.
    """
    if x is not None:
        check_images("x", x, frozen.device)
        if x.numel() == 0:
            raise must("explain", "x", "not empty", tuple(x.shape))
        frozen(x)
    if isinstance(frozen, NativeFrozen):
        return _native(frozen, None if x is None else x.detach())
    from fastres.frozen import device_report  # imported here, as what it reports on

    return device_report.report(frozen, None if x is None else x.detach())


def needed(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of what was planned last."""
    if shape is None:
        raise must("explain", "x", "given for a plan that has not run yet", "none")
    return shape


def _native(frozen: NativeFrozen, x: Tensor | None) -> PlanReport:
    shape = needed(frozen.last_shape())
    plan = frozen.program(shape)
    times: list[float | None] = [None] * len(plan.steps)
    if x is not None:
        times = _times(frozen, plan, frozen.readable(x))
    rows = zip(plan.steps, plan.chunks, times, strict=True)
    reports = [_report(step, images, shape[0], ms) for step, images, ms in rows]
    constants = sum(tensor.nbytes for tensor in plan.constants)
    return PlanReport(frozen.name, str(frozen.dtype)[6:], shape, plan.arena_bytes, constants, plan.parts, reports)


def operation(layer: Layer) -> str:
    """What a layer does, in words."""
    added = layer.residual is not None and layer.kind != "add"
    parts = [layer.function or layer.kind, "add" if added else "", "relu" if layer.relu else ""]
    return "+".join(part for part in dict.fromkeys(parts) if part)


def _report(step: Step, images: int, batch: int, ms: float | None) -> StepReport:
    layer = step.layer
    algorithm = "" if step.row_kind != "conv" else "winograd" if step.winograd else "direct"
    flops = None
    if ms and step.row_kind == "conv":
        kernel = step.x_size[0] // layer.groups * layer.kernel[0] * layer.kernel[1]
        flops = 2 * batch * step.y_size[0] * step.y_size[1] * step.y_size[2] * kernel / ms / 1e6
    return StepReport(layer.name, operation(layer), algorithm, step.x_size, step.y_size, images, ms, flops)


def _times(frozen: NativeFrozen, plan: Program, x: Tensor) -> list[float | None]:
    """Median milliseconds of each step over the batch, run one by one in their order."""
    arena, ys = large_pages(plan.arena_bytes), frozen.results(plan, len(x))
    singles = []
    for row in plan.rows:
        if row[0] == 0:
            chunk = row[2].item()
        else:
            singles.append(torch.stack([torch.tensor([0, 1, chunk] + [0] * (FIELDS - 3), device="cpu"), row]))
    run = native.op("cpu_plan")
    found: list[list[float]] = [[] for _ in singles]
    for _ in range(_REPEATS):
        for times, single in zip(found, singles, strict=True):
            start = time.perf_counter()
            run(x, single, plan.constants, arena, ys, plan.parts)
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in found]
