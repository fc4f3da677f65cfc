"""A frozen network as calls of ops: the fastest kernel of each layer, all of them in one CUDA graph a size.

A plan is made for one batch and one size of images. It has a buffer for the images, and the kernels, run on it once, leave a
graph that reads the buffer and writes one output. A call copies its images in, replays, and copies the output out.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.errors import UnsupportedError
from fastres.frozen import calls, choose
from fastres.frozen.base import Frozen
from fastres.frozen.calls import Call, Join
from fastres.frozen.choose import Choice
from fastres.frozen.graph import Graphs
from fastres.frozen.layers import Layer, Network
from fastres.frozen.program import Size, sized
from fastres.frozen.record import Value
from fastres.ops._op import _signature

_PLANS = 16  # sizes whose graphs are kept
Shape = tuple[int, ...]


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Whatever surrounds the call: no inference mode, whose tensors nobody may write to, no autograd, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(eq=False)
class Step:
    """A call with its kernel; ``dead`` are values that nobody reads after it."""

    call: Call
    choice: Choice
    dead: list[Value] = field(default_factory=list)

    def run(self, values: dict[Value, Tensor]) -> Tensor:
        return self.choice.run(*(values[value] for value in self.call.inputs), *self.call.rest)


@dataclass(eq=False)
class Plan:
    """The steps for one shape of images, the buffer that they read, and what replays them into ``y``."""

    shape: Shape
    steps: list[Step]
    sizes: dict[Value, Size]
    x: Tensor
    replay: Callable[[], object]
    y: Tensor


class GraphFrozen(Frozen):
    """A network on a GPU: a graph for each size of batches and images."""

    _DERIVED = ("_plans", "_choices", "_constants", "graphs")

    def __init__(self, found: Network, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        super().__init__(found, dtype, device)
        self.batch = batch  # of the example
        self._forget()

    def _forget(self) -> None:
        self._plans: OrderedDict[Shape, Plan] = OrderedDict()
        self._choices: dict[tuple[Any, ...], Choice] = {}
        self.graphs = Graphs(self.device)
        with torch.inference_mode(False), torch.no_grad():
            self._constants = calls.constants(self.network.layers)

    def bucket(self, batch: int) -> int:
        """The batch that so many images are padded to."""
        if batch > self.batch:
            return batch
        return min(1 << max(batch - 1, 0).bit_length(), self.batch)

    def plan(self, shape: Shape) -> Plan:
        """The plan for images of a shape, whose batch is padded; made at the first call.

        Raises:
            ArgumentError: images of that size do not fit the network.
            UnsupportedError: it would have to be made inside the caller's capture.
        """
        shape = (self.bucket(shape[0]), *shape[1:])
        with self.graphs.lock:
            found = self._plans.get(shape)
            if found is not None:
                self._plans.move_to_end(shape)
                return found
            if self.graphs.is_capturing():
                what = f"images of {'x'.join(map(str, shape))} have no plan yet: call it once before capturing a graph"
                raise UnsupportedError(f"fastres.freeze: {what}")
            with self.graphs.turn(), plainly(self.device):
                found = self._plans[shape] = self._made(shape)
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        return found

    def _made(self, shape: Shape) -> Plan:
        batch, channels, height, width = shape
        sizes: dict[Value, Size] = {self.network.x: (channels, height, width)}
        for layer in self.network.layers:
            sized(layer, sizes, (channels, height, width))
        steps = self._steps(batch, sizes)
        x = torch.zeros(shape, dtype=self.dtype, device=self.device).contiguous(memory_format=torch.channels_last)
        replay, y = self.graphs.captured(lambda: self.run(steps, x))
        return Plan(shape, steps, sizes, x, replay, y)

    def _steps(self, batch: int, sizes: dict[Value, Size]) -> list[Step]:
        """A kernel for every layer, and one for a layer and the one before where the two are faster so."""
        made = {layer.y: layer for layer in self.network.layers}
        readers = [value for layer in self.network.layers for value in (layer.x, layer.residual)]
        steps: dict[Layer, Step] = {}
        for layer in self.network.layers:
            own = self._constants.get(layer, ())
            call = calls.call(layer, own, sizes[layer.x][0], self.device)
            steps[layer] = step = Step(call, self._chosen(call, batch, sizes))
            for join in calls.JOINS:
                value = join.between(layer)
                before = steps.get(made[value]) if value in made else None
                if before is None or before.call.before is not None or readers.count(value) != 1:
                    continue
                joined = self._joined(join, step, before, batch, sizes) if join.can_join(layer, before.call.layer) else None
                if joined is not None:
                    del steps[before.call.layer]
                    steps[layer] = joined
                    break
        found = list(steps.values())
        last = {value: step for step in found for value in step.call.inputs}
        for value, step in last.items():
            step.dead.append(value)
        return found

    def _joined(self, join: Join, last: Step, before: Step, batch: int, sizes: dict[Value, Size]) -> Step | None:
        call = join.joined(last.call, before.call, last.choice.run, before.choice.run)
        choice = self._chosen(call, batch, sizes)
        return None if choice.kernel == calls.TORCH else Step(call, choice)

    def _chosen(self, call: Call, batch: int, sizes: dict[Value, Size]) -> Choice:
        """Calls of one op that differ in nothing but values get one kernel."""
        if call.op is None:
            return Choice(*next(iter(call.plain.items())))
        shapes: list[Shape] = [(batch, *sizes[value]) for value in call.inputs]
        key = (call.op.name, *shapes, _signature(call.rest)[0])
        if key not in self._choices:
            args = choose.drawn(shapes, call.rest, self.dtype, self.device)
            self._choices[key] = choose.choose(call, call.op, args, self.device)
        return self._choices[key]

    def run(self, steps: list[Step], x: Tensor, see: Callable[[Step, dict[Value, Tensor]], object] | None = None) -> Tensor:
        """The kernels one after the other, on images as the plan's buffer holds them; ``see`` is shown each with its inputs."""
        values = {self.network.x: x}
        for step in steps:
            if see is not None:
                see(step, values)
            values[step.call.layer.y] = step.run(values)
            for value in step.dead:
                del values[value]
        y = values[self.network.layers[-1].y]
        return y.flatten(1) if self.network.flat else y

    def call(self, x: Tensor) -> Tensor:
        self.check(x)
        batch = len(x)
        plan = self.plan(tuple(x.shape))
        x = x.detach()
        if self.graphs.is_capturing():
            with plainly(self.device):
                padded = torch.zeros_like(plan.x)
                padded[:batch].copy_(x)
                return self.run(plan.steps, padded)[:batch]
        with torch.inference_mode(False), torch.no_grad(), self.graphs.turn():
            plan.x[:batch].copy_(x)
            plan.replay()
            return plan.y[:batch].clone()

    def _take(self, found: Network) -> None:
        with self.graphs.turn(), plainly(self.device):
            for layer, fresh in zip(self.network.layers, found.layers, strict=True):
                for old, new in ((layer.weight, fresh.weight), (layer.bias, fresh.bias)):
                    if old is not None and new is not None:
                        old.copy_(new)
            for plan in self._plans.values():  # each kernel then packs its weights anew, where they lie
                self.run(plan.steps, plan.x)

    def last_shape(self) -> Shape | None:
        """The shape planned last."""
        return next(reversed(self._plans), None)
