"""A frozen network as calls of ops: the fastest kernel of each layer, all of them in one CUDA graph per size.

A plan is made for one batch size and one image size. It has a buffer for the images; running the kernels on it once leaves a
graph that reads the buffer and writes the outputs. A call copies its images in, replays, and copies the outputs out.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.errors import UnsupportedError
from fastres.frozen import calls, choose, join
from fastres.frozen.base import Frozen
from fastres.frozen.calls import Call
from fastres.frozen.choose import Choice
from fastres.frozen.graph import Graphs
from fastres.frozen.join import Fusion
from fastres.frozen.layers import Layer, Network
from fastres.frozen.program import Size, sized
from fastres.frozen.record import Value
from fastres.ops._op import signature

_PLANS = 16  # sizes whose graphs are kept
Shape = tuple[int, ...]


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without inference mode (whose tensors cannot be written to later), autograd and autocast, whatever surrounds the call."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(eq=False)
class Step:
    """A call with its kernel; ``dead`` are values that nobody reads after it."""

    call: Call
    choice: Choice
    dead: list[Value] = field(default_factory=list)

    def run(self, values: dict[Value, Tensor]) -> Any:
        return self.choice.run(*(values[value] for value in self.call.inputs), *self.call.rest)


@dataclass(eq=False)
class Plan:
    """The steps for one shape of images, the buffer that they read, and the function that replays them into ``ys``."""

    shape: Shape
    steps: list[Step]
    sizes: dict[Value, Size]
    x: Tensor
    replay: Callable[[], object]
    ys: list[Tensor]


class GraphFrozen(Frozen):
    """A network on a GPU: a graph for each size of batches and images."""

    _DERIVED = ("_plans", "_choices", "_constants", "graphs")
    _FUSIONS: tuple[Fusion, ...] = join.FUSIONS
    _LAYOUT = torch.channels_last  # of the buffer for images

    def __init__(self, found: Network, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        super().__init__(found, dtype, device)
        self.batch = batch  # of the example
        self._forget()

    def _forget(self) -> None:
        self._plans: OrderedDict[Shape, Plan] = OrderedDict()
        self._choices: dict[tuple[Any, ...], Choice] = {}
        self.graphs = Graphs(self.device)
        with torch.inference_mode(False), torch.no_grad():
            self._constants = self._fixed()

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of images in a plan's buffer, and of results."""
        return self.dtype

    @property
    def _ends(self) -> tuple[Value, list[Value]]:
        """What the steps begin with, as the buffer holds it, and what they leave."""
        return self.network.x, self.network.outputs

    def _fixed(self) -> dict[Layer, calls.Constants]:
        """What each layer's kernels read beside activations."""
        return calls.constants(self.network.layers)

    def _call_of(self, layer: Layer, channels: int) -> Call:
        """A layer with this many input channels, as a call."""
        return calls.call(layer, self._constants.get(layer, ()), channels, self.device)

    def _drawn(self, shapes: list[Shape], call: Call) -> tuple[Any, ...]:
        """Random arguments of a call, with inputs of these shapes."""
        return choose.drawn(shapes, call.rest, self.dtype, self.device)

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
        x = torch.zeros(shape, dtype=self.result_dtype, device=self.device).contiguous(memory_format=self._LAYOUT)
        replay, ys = self.graphs.captured(lambda: self.run(steps, x))
        return Plan(shape, steps, sizes, x, replay, ys)

    def _steps(self, batch: int, sizes: dict[Value, Size]) -> list[Step]:
        """A kernel for every layer, or one for several layers where that is faster."""
        readers = [value for layer in self.network.layers for value in layer.operands] + self.network.outputs
        steps: dict[int, Step] = {}  # by their places
        makers: dict[Value, int] = {}
        for place, layer in enumerate(self.network.layers):
            call = self._call_of(layer, sizes[layer.x][0])
            step = Step(call, self._chosen(call, batch, sizes))
            faster: list[tuple[Step, int, int]] = []  # with the places of the one before and of itself
            for fusion in self._FUSIONS:
                operand = fusion.operand_of(call)
                before = None if operand is None else makers.get(operand)
                if before is not None and fusion.joins(call, steps[before].call, readers):
                    both = self._joined(fusion, step, steps[before], batch, sizes)
                    if both.choice.kernel != calls.TORCH:
                        faster.append((both, before, place if fusion.at_last else before))
            if faster:
                step, before, place = max(faster, key=lambda found: found[0].choice.gain)
                del steps[before]
            steps[place] = step
            makers |= dict.fromkeys(step.call.outputs, place)
        made = [steps[place] for place in sorted(steps)]
        last_readers = {value: step for step in made for value in step.call.inputs}
        for value, reader in last_readers.items():
            if value not in self.network.outputs:
                reader.dead.append(value)
        return made

    def _joined(self, fusion: Fusion, last: Step, first: Step, batch: int, sizes: dict[Value, Size]) -> Step:
        """One step for two."""
        call = fusion.call(last.call, first.call, last.choice.run, first.choice.run)
        return Step(call, self._chosen(call, batch, sizes))

    def _chosen(self, call: Call, batch: int, sizes: dict[Value, Size]) -> Choice:
        """The kernel of a call; calls of one op that differ only in values share it."""
        if call.op is None:
            return Choice(*next(iter(call.plain.items())))
        shapes: list[Shape] = [(batch, *sizes[value]) for value in call.inputs]
        key = (call.op.name, *shapes, signature(tuple(a for a in call.rest if type(a) is not float))[0])
        if key not in self._choices:
            self._choices[key] = choose.choose(call, call.op, self._drawn(shapes, call), self.device)
        return self._choices[key]

    def run(
        self, steps: list[Step], x: Tensor, see: Callable[[Step, dict[Value, Tensor]], object] | None = None
    ) -> list[Tensor]:
        """The kernels one after the other, on images as the plan's buffer holds them; ``see`` is shown each with its inputs."""
        first, ends = self._ends
        values = {first: x}
        for step in steps:
            if see is not None:
                see(step, values)
            made = step.run(values)
            values |= zip(step.call.outputs, made if isinstance(made, tuple) else (made,), strict=True)
            for value in step.dead:
                del values[value]
        return [values[end] for end in ends]

    def call(self, x: Tensor) -> Any:
        self.check(x)
        batch = len(x)
        plan = self.plan(tuple(x.shape))
        x = x.detach()
        if self.graphs.is_capturing():
            with plainly(self.device):
                padded = torch.zeros_like(plan.x)
                padded[:batch].copy_(x)
                return self.network.result([y[:batch] for y in self.run(plan.steps, padded)])
        with torch.inference_mode(False), torch.no_grad(), self.graphs.turn():
            plan.x[:batch].copy_(x)
            plan.replay()
            return self.network.result([y[:batch].clone() for y in plan.ys])

    def take(self, found: Network) -> None:
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
