"""The layers of a static plan: what a network computes, with batch norm folded, and additions and ReLUs joined to what they
follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastres.frozen.record import Value

Pair = tuple[int, int]
ONE = (1, 1)
FUNCTIONS = ("sigmoid", "silu", "hardsigmoid", "hardswish", "leaky_relu", "clamp")  # enum Function of csrc/cpu/plan.h


@dataclass(eq=False)
class Layer:
    """One step of a plan. ``kind`` is conv, linear, max_pool, avg_pool, bn, add, relu, activation (``function``, with bounds or
    a slope), gate (x times ``gate``, a value for each channel), upsample (x enlarged by nearest pixels: to the size of the
    residual, which it is added to, or of ``like``, or by ``stride``), pad (a strided identity, with extra channels of zeros),
    cat (x and ``others``, by channels), slice (channels of x from ``begin`` on) or turn (one pixel of many channels becomes
    many pixels of one, or the other way); ``kernel`` of an avg_pool is (0, 0) for all pixels."""

    kind: str
    name: str
    x: Value
    y: Value
    residual: Value | None = None
    relu: bool = False
    kernel: Pair = ONE
    stride: Pair = ONE
    padding: Pair = (0, 0)
    dilation: Pair = ONE
    groups: int = 1
    ceil: bool = False
    out_channels: int = 0
    expects: Pair | None = None  # the one image size that it was made for
    weight: Tensor | None = None  # conv, linear: (K, C, R, S), folded; bn: (3, C) of mean, scale, bias
    bias: Tensor | None = None
    scale: Tensor | None = None  # of each output channel's weights where those are int8
    gate: Value | None = None
    others: tuple[Value, ...] = ()
    like: Value | None = None
    begin: int = 0
    function: str = ""  # of an activation, one of FUNCTIONS
    low: float = 0.0  # bounds of a clamp; the slope of a leaky_relu
    high: float = 0.0
    divisor: int = 0  # of an avg_pool's sums; 0 for the number of pixels inside the image

    @property
    def operands(self) -> list[Value]:
        """What it reads."""
        return [value for value in (self.x, self.residual, self.gate, self.like, *self.others) if value is not None]


@dataclass(frozen=True)
class Output:
    """A tensor that a network returns: the place of its value among the outputs, and whether it is flattened."""

    index: int
    flat: bool


@dataclass(eq=False)
class Network:
    """Layers in an order in which they can run, from images ``x`` with ``channels`` channels to ``outputs``. ``form`` is what
    the network returns, alone or in lists, tuples and dicts, with an ``Output`` for each tensor."""

    name: str
    layers: list[Layer]
    x: Value
    channels: int
    outputs: list[Value]
    form: Any

    def result(self, ys: Sequence[Tensor]) -> Any:
        """What the network returns, from the outputs as (N, C, H, W)."""
        return tree_map(lambda output: ys[output.index].flatten(1) if output.flat else ys[output.index], self.form)
