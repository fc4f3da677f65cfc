"""What ``fastres.explain`` says about a network frozen on a GPU: the kernel of each step, its time, and its share of the peak
that bounds it, of a copy or of a matrix product.
"""

from typing import Any, cast

import torch
from torch import Tensor

from fastres import timing
from fastres.frozen.base import Frozen
from fastres.frozen.device import GraphFrozen, Plan, Step, plainly
from fastres.frozen.record import Value
from fastres.frozen.report import PlanReport, StepReport, needed, operation

_SECONDS = 0.03  # of one step's timing


def report(network: Frozen, x: Tensor | None) -> PlanReport:
    """The plan for the last shape of images, or, with times, for that of x, of a network frozen on a GPU."""
    frozen = cast(GraphFrozen, network)
    plan = frozen.plan(needed(frozen.last_shape()))
    found = [_step(step, plan) for step in plan.steps]
    weights = sum(t.numel() for layer in frozen.network.layers for t in (layer.weight, layer.bias) if t is not None)
    size = frozen.dtype.itemsize
    told = PlanReport(frozen.name, str(frozen.dtype)[6:], plan.shape, _activations(plan) * size, weights * size, 1, found)
    if x is not None:
        _time(frozen, plan, told)
    return told


def _step(step: Step, plan: Plan) -> StepReport:
    layer, layers, choice = step.call.layer, step.call.layers, step.choice
    tried = {c.backend: c.failure or 1e3 * (c.seconds or 0.0) for c in choice.candidates}
    name, op = (layer if layer.weight is not None else layers[0]).name, "+".join(map(operation, layers))
    sizes = plan.sizes[step.call.inputs[0]], plan.sizes[layer.y]
    return StepReport(name, op, choice.kernel, *sizes, plan.shape[0], tried=tried)


def _activations(plan: Plan) -> int:
    """Elements that live at once, at most."""
    live = {step.call.inputs[0] for step in plan.steps[:1]}
    most = 0
    for step in plan.steps:
        live |= set(step.call.outputs)
        most = max(most, sum(_elements(plan, value) for value in live))
        live -= set(step.dead)
    return most


def _elements(plan: Plan, value: Value) -> int:
    channels, height, width = plan.sizes[value]
    return plan.shape[0] * channels * height * width


def _time(frozen: GraphFrozen, plan: Plan, told: PlanReport) -> None:
    """Run the steps in their order, each many times, then the whole graph."""
    integers = frozen.dtype == torch.int8
    copy_peak, matmul_peak = timing.peaks(frozen.device, torch.bfloat16 if integers else frozen.dtype)
    matmul_peak *= 1 + integers  # tensor cores multiply twice as many
    told.peaks = {"copy": copy_peak / 1e9, "matmul": matmul_peak / 1e9}
    reports = iter(told.steps)

    def see(step: Step, values: dict[Value, Tensor]) -> None:
        measured = timing.interleaved({"": lambda: step.run(values)}, frozen.device, seconds=_SECONDS)[""]
        moved, flops = _cost(step, plan, values)
        row, seconds = next(reports), measured.median
        roofs = {"copy": moved / copy_peak, "matmul": flops / matmul_peak}
        row.bound = max(roofs, key=lambda name: roofs[name])
        row.ms, row.of_peak = 1e3 * seconds, roofs[row.bound] / seconds
        row.gb_per_s, row.gflop_per_s = moved / seconds / 1e9, flops / seconds / 1e9

    with frozen.graphs.turn(), plainly(frozen.device):
        frozen.run(plan.steps, plan.x, see)
        whole = timing.interleaved({"": plan.replay}, frozen.device, seconds=4 * _SECONDS, graph=False)[""]
    told.replay_ms = 1e3 * whole.median


def _cost(step: Step, plan: Plan, values: dict[Value, Tensor]) -> tuple[int, int]:
    """Bytes moved and operations."""
    call, args = step.call, [values[value] for value in step.call.inputs]
    if call.op is not None:
        return call.op.cost(*args, *call.rest)
    layer = call.layer
    tensors: list[Any] = [*args, *([] if layer.weight is None else [layer.weight])]
    moved = sum(tensor.numel() for tensor in tensors) + _elements(plan, layer.y)
    multiplied = 0 if layer.weight is None else 2 * plan.shape[0] * layer.weight.numel()
    return moved * args[0].element_size(), multiplied
