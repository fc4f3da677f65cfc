"""What ``fastres.explain`` tells of a frozen network: its steps in order, and how long each takes if asked."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.errors import must
from fastres.frozen.base import Frozen, check_images
from fastres.frozen.module import NativeFrozen
from fastres.frozen.program import FIELDS, Program, Step
from fastres.kernels import native
from fastres.memory import large_pages

_REPEATS = 7


@dataclass
class StepReport:
    """One step: ``images`` a pass, sizes as (channels, height, width), milliseconds and GFLOP/s for the whole batch."""

    name: str
    op: str
    algorithm: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    images: int
    ms: float | None = None
    gflop_per_s: float | None = None


@dataclass
class PlanReport:
    """A plan for one input shape: ``str()`` for people, ``to_dict()`` for programs."""

    model: str
    dtype: str
    shape: tuple[int, ...]
    arena_bytes: int
    constant_bytes: int
    parts: int
    steps: list[StepReport]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mib = f"{self.constant_bytes / 2**20:.1f} MiB of constants, {self.arena_bytes / 2**20:.1f} MiB of activations"
        total = sum(step.ms or 0.0 for step in self.steps)
        shared = f", {self.parts} parts with a thread each" if self.parts > 1 else ""
        head = f"{self.model}, frozen in {self.dtype}, channels_last, for {_by(self.shape)}"
        lines = [f"{head}: {len(self.steps)} steps, {mib}{shared}"]
        for step in self.steps:
            timed = "" if step.ms is None else f"  {step.ms:8.3f} ms {100 * step.ms / total:3.0f} %"
            timed += "" if step.gflop_per_s is None else f" {step.gflop_per_s:6.0f} GFLOP/s"
            sizes = f"{_by(step.x)} -> {_by(step.y)}"
            lines.append(f"{step.name:28} {step.op:16} {step.algorithm:9} {sizes:28} {step.images:3} a pass{timed}")
        return "\n".join(lines)


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def explain(frozen: Frozen, x: Tensor | None = None) -> PlanReport:
    """The plan for the last input shape, or, with times, for that of x.

    Raises:
        TypeError, ValueError: x is not a batch of images that fits, or there is no shape yet and no x.
    """
    if x is not None:
        check_images("x", x)
        if x.numel() == 0:
            raise must("explain", "x", "not empty", tuple(x.shape))
        frozen(x)
    shape = frozen.last_shape()
    if shape is None:
        raise must("explain", "x", "given for a plan that has not run yet", "none")
    plan = frozen.program(shape)
    times: list[float | None] = [None] * len(plan.steps)
    if x is not None:
        times = _times(frozen, plan, frozen.readable(x.detach()))
    rows = zip(plan.steps, plan.chunks, times, strict=True)
    reports = [_report(step, images, shape[0], ms) for step, images, ms in rows]
    constants = sum(tensor.nbytes for tensor in plan.constants)
    return PlanReport(frozen.name, str(frozen.dtype)[6:], shape, plan.arena_bytes, constants, plan.parts, reports)


def _report(step: Step, images: int, batch: int, ms: float | None) -> StepReport:
    layer = step.layer
    parts = [layer.kind, "add" if layer.residual is not None and layer.kind != "add" else "", "relu" if layer.relu else ""]
    op = "+".join(part for part in dict.fromkeys(parts) if part)
    algorithm = "" if step.row_kind != "conv" else "winograd" if step.winograd else "direct"
    flops = None
    if ms and step.row_kind == "conv":
        kernel = step.x_size[0] * layer.kernel[0] * layer.kernel[1]
        flops = 2 * batch * step.y_size[0] * step.y_size[1] * step.y_size[2] * kernel / ms / 1e6
    return StepReport(layer.name, op, algorithm, step.x_size, step.y_size, images, ms, flops)


def _times(frozen: Frozen, plan: Program, x: Tensor) -> list[float | None]:
    """Median milliseconds of each step over the batch, run one by one in their order."""
    rows, channels = plan.rows, plan.output
    arena = large_pages(plan.arena_bytes)
    y = torch.empty((x.shape[0], *channels[1:], channels[0]), dtype=frozen.result_dtype)
    singles = []
    for row in rows:
        if row[0] == 0:
            chunk = row[2].item()
        else:
            singles.append(torch.stack([torch.tensor([0, 1, chunk] + [0] * (FIELDS - 3)), row]))
    run = native.op("cpu_plan")
    found: list[list[float]] = [[] for _ in singles]
    for _ in range(_REPEATS):
        for times, single in zip(found, singles, strict=True):
            start = time.perf_counter()
            run(x, single, plan.constants, arena, y, plan.parts)
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in found]
