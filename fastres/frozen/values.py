"""The layers that a recording has given so far, and what is known of the values between them."""

from collections import Counter
from typing import Any

from fastres.errors import UnsupportedError
from fastres.frozen.layers import Layer
from fastres.frozen.record import Recording, Value, values_in


class Values:
    """Layers in the order in which they were found; who makes and who reads each value; and which values are the same."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        operands = (value for operation in recording.operations for value in values_in(operation.args))
        self.uses = Counter((*operands, *recording.ys))
        self.found: list[Layer] = []
        self.same: dict[Value, Value] = {}  # a value that holds what an earlier one holds
        self.expanded: dict[Value, Value] = {}  # what nothing but a gate may read
        self.makers: dict[Value, Layer] = {}

    def needed(self) -> list[Layer]:
        """The layers that lead to the outputs, with every alias resolved."""
        ends = set(map(self.value, self.recording.ys))
        kept: list[Layer] = []
        wanted = set(ends)
        for layer in reversed(self.found):
            if layer.y in wanted:
                wanted.update(layer.operands)
                kept.append(layer)
        if not ends <= self.makers.keys():
            raise UnsupportedError("fastres.freeze: the network computes nothing that a plan could run")
        for shape in (y.shape for y in self.recording.ys):
            if len(shape) not in (2, 4) or shape[0] != self.recording.x.shape[0]:
                raise UnsupportedError(f"fastres.freeze: the network must return (N, C, H, W) or (N, features), got {shape}")
        made = {self.recording.x}
        for layer in kept[::-1]:
            if not made.issuperset(layer.operands):
                raise UnsupportedError(f"fastres.freeze: the layer {layer.name!r} reads what no step of a plan computes")
            if layer.kind == "upsample" and layer.residual is layer.like is None and 0 in layer.stride:
                _fix_size(layer)
            made.add(layer.y)
        return kept[::-1]

    def value(self, value: Value) -> Value:
        while value in self.same:
            value = self.same[value]
        return value

    def add(self, layer: Layer) -> None:
        layer.x = self.value(layer.x)
        self.found.append(layer)
        self.makers[layer.y] = layer

    def pass_on(self, x: Value, y: Value) -> None:
        self.uses[x] += self.uses[y] - 1
        self.same[y] = x

    def stored(self, x: Value, y: Value) -> Value:
        """The output value of a layer that keeps the shape of x: y itself or, where y is flattened, what y is a view of."""
        source = self.value(x)
        if len(source.shape) == len(y.shape):
            return y
        self.same[y] = self.between(source.shape, self.uses[y])
        return self.same[y]

    def between(self, shape: tuple[int, ...], uses: int = 1) -> Value:
        """A further value, from one layer to so many others."""
        self.uses[value := Value(shape)] = uses
        return value

    def private(self, value: Any, *kinds: str) -> Layer | None:
        """The layer that made a value, if it has one of these kinds, no addition or ReLU yet, and no other reader."""
        value = self.value(value)
        layer = self.makers.get(value)
        fits = layer is not None and layer.kind in kinds and not layer.relu and layer.residual is None
        return layer if fits and self.uses[value] == 1 else None

    def rename(self, layer: Layer, y: Value) -> None:
        del self.makers[layer.y]
        layer.y = y
        self.makers[y] = layer


def _fix_size(layer: Layer) -> None:
    """An upsampling to numbers, with nothing to say where they come from, serves images of the example's size alone."""
    before, after = layer.x.shape[2:], layer.y.shape[2:]
    if any(large % small for large, small in zip(after, before, strict=True)):
        what = "by whole factors, or directly before an addition or a concatenation"
        raise UnsupportedError(f"fastres.freeze: upsampling is supported only {what}")
    layer.stride, layer.expects = (after[0] // before[0], after[1] // before[1]), (before[0], before[1])
