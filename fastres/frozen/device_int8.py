"""A network in 8-bit integers as calls of ops: what the CPU's plan of it computes, byte for byte, in one CUDA graph a size.

Images are quantised by ``quantize_int8``; convolutions, linear layers and pools are calls of ops too, each on the kernel that
is chosen for it. Steps that residual networks seldom have (batch norms, additions and ReLUs of their own, copies) are
PyTorch's operations, with the float constants that the CPU's kernels read (``int8.packed``).
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import dispatch
from fastres.errors import UnsupportedError
from fastres.frozen import choose, file, int8, plain
from fastres.frozen.calls import TORCH, Call, Constants, Run
from fastres.frozen.device import GraphFrozen, Plan, Shape, Step
from fastres.frozen.int8 import Scale
from fastres.frozen.layers import Layer, Network, Pair
from fastres.frozen.program import Size
from fastres.frozen.record import Value
from fastres.ops import _conv_cpu, conv_int8
from fastres.ops._int8 import SHIFT, byte, fused, stored
from fastres.ops.conv_int8 import CONV_INT8
from fastres.ops.pool_int8 import POOL_INT8
from fastres.ops.quantize_int8 import QUANTIZE_INT8

_ONE_NUMBER: Size = (1, 1, 1)  # an image


class IntegersFrozen(GraphFrozen):
    """A quantised network on a GPU. Images are float32, as results are; one that is not finite gives NaN for its results, since
    nobody waits for the images to refuse them."""

    _FUSIONS = ()
    _LAYOUT = torch.contiguous_format  # four pixels of a channel at once become four words of bytes

    def __init__(self, found: Network, scales: Mapping[Value, Scale], device: torch.device, batch: int) -> None:
        self.scales = dict(scales)  # first: the constants follow from them
        self._images, self._nonfinite, self._y = Value(()), Value(()), Value(())  # before and behind the layers
        super().__init__(found, torch.int8, device, batch)

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.float32

    def _made(self, shape: Shape) -> Plan:
        check_kernel(self.device)  # a backend may have been forced for the plans before
        return super()._made(shape)

    @property
    def _ends(self) -> tuple[Value, list[Value]]:
        return self._images, [self._y]

    def _fixed(self) -> dict[Layer, Constants]:
        return {layer: self._constants_of(layer) for layer in self.network.layers}

    def _constants_of(self, layer: Layer) -> Constants:
        """What the step reads: computed on the CPU, where a division is one; on a GPU the quotient could be another."""
        if layer.kind == "max_pool":
            return None, None
        if layer.kind == "pad":
            return (self.scales[layer.x].zero - SHIFT,)
        here = Layer(layer.kind, layer.name, layer.x, layer.y, layer.residual)
        here.weight, here.bias, here.scale = (None if t is None else t.cpu() for t in (layer.weight, layer.bias, layer.scale))
        if layer.kind == "avg_pool":
            return tuple(int8.packed(here, self.scales)[0].tolist())
        if here.scale is None:
            return tuple(t.to(self.device) for t in int8.packed(here, self.scales))
        assert here.weight is not None and layer.weight is not None
        total, offset, part = int8.conv_constants(here, self.scales)
        start = SHIFT * here.weight.sum((1, 2, 3), dtype=torch.int32)
        rows = (t.to(self.device) for t in (start, total.float(), offset.float()))
        further = self._taken[0] - self.network.channels if layer.x is self.network.x else 0
        weight = F.pad(layer.weight, (0, 0, 0, 0, 0, further)) if further else layer.weight  # which shares its memory
        weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, *rows, torch.tensor(part).item(), self.scales[layer.x].zero - SHIFT  # as the kernel reads them: float32

    @functools.cached_property
    def _taken(self) -> tuple[int, Pair]:
        """Channels and padding of the quantised images: as they are, or, where convolutions alone read them, whole words, whose
        further weights are 0, with the padding that all of them want."""
        readers = [layer for layer in self.network.layers if self.network.x in (layer.x, layer.residual)]
        if any(layer.scale is None or layer.residual is self.network.x for layer in readers):
            return self.network.channels, (0, 0)
        paddings = {layer.padding for layer in readers}
        return _conv_cpu.whole_words(self.network.channels, torch.int8), paddings.pop() if len(paddings) == 1 else (0, 0)

    def _call_of(self, layer: Layer, channels: int) -> Call:
        own, integers = self._constants[layer], layer.y in self.scales
        inputs = (layer.x,) if layer.residual is None else (layer.x, layer.residual)
        if layer.kind in ("max_pool", "avg_pool"):
            rest = (layer.kernel, layer.stride, layer.padding, layer.ceil, *own)
            return Call(layer, POOL_INT8, inputs, rest, {TORCH: POOL_INT8.reference})
        if layer.scale is None:
            return Call(layer, None, inputs, (), {TORCH: _step(layer, own, integers)})
        added = () if layer.residual is not None else (None,)
        padding = (0, 0) if layer.x is self.network.x and any(self._taken[1]) else layer.padding
        rest = (*added, *own, layer.stride, padding, layer.dilation, integers)
        return Call(layer, CONV_INT8, inputs, rest, {TORCH: CONV_INT8.reference})

    def _steps(self, batch: int, sizes: dict[Value, Size]) -> list[Step]:
        """The layers' steps between one that quantises the images and one that marks the results of those that it could not."""
        x, y = self.network.x, self.network.layers[-1].y
        (_, height, width), (channels, (down, right)) = sizes[x], self._taken
        sizes |= {self._images: sizes[x], self._nonfinite: _ONE_NUMBER, self._y: sizes[y]}
        sizes[x] = channels, height + 2 * down, width + 2 * right
        scale, zero = int8.input_constants(self.scales[x])[0].tolist()
        rest = scale, int(zero), channels, (down, right)
        made = Layer("quantize", "the images", self._images, x)
        first = Call(made, QUANTIZE_INT8, (self._images,), rest, {TORCH: QUANTIZE_INT8.reference}, outputs=(x, self._nonfinite))
        marked = Layer("mark", "the results", y, self._y)
        last = Call(marked, None, (y, self._nonfinite), (), {TORCH: _marked})
        steps = [Step(call, self._chosen(call, batch, sizes)) for call in (first, last)]
        return [steps[0], *super()._steps(batch, sizes), steps[1]]

    def _drawn(self, shapes: list[Shape], call: Call) -> tuple[Any, ...]:
        if call.op is QUANTIZE_INT8:
            args = choose.drawn(shapes, call.rest, torch.float32, self.device)
            return args[0].contiguous(), *args[1:]
        if call.op is POOL_INT8:
            return conv_int8.whole(shapes[0], torch.Generator(self.device).manual_seed(0)), *call.rest
        *_, weight, _, _, _, _, pad, stride, padding, dilation, integers = call.rest
        geometry = stride, padding, dilation
        return conv_int8.drawn(shapes[0], tuple(weight.shape), geometry, len(shapes) > 1, integers, self.device, pad)

    def save(self, path: str | os.PathLike[str]) -> None:
        file.write(path, self.network, self.scales, self.quality)


def check_kernel(device: torch.device) -> None:
    """Whether there is a kernel for the convolutions: PyTorch has none, and the reference is slower than 16 bits.

    Raises:
        UnsupportedError: no kernel runs there, or the device's architecture has validated none; a forced backend is one.
    """
    if device.type != "cuda" or dispatch.wished(CONV_INT8.name, CONV_INT8.backends) is not None:
        return
    with torch.no_grad():
        args = CONV_INT8.samples(device, torch.float32)[0].args
    kernels = [b for b in CONV_INT8.backends if b.name != TORCH]
    reasons = [b.why_not(*args) or dispatch.why_not_proven(CONV_INT8.name, b, device) for b in kernels]
    if None not in reasons:
        raise UnsupportedError(
            f"fastres.freeze: no int8 convolution kernel is validated on {device}: {reasons[0]}; freeze on the CPU, or in 16"
            f" bits, or force one: fastres.use({CONV_INT8.name}={kernels[0].name!r}), or the slow {TORCH!r}"
        )


# ---- steps of PyTorch's operations -----------------------------------------------------------------


def _marked(y: Tensor, nonfinite: Tensor) -> Tensor:
    return y + nonfinite.view(-1, 1, 1, 1)


def _step(layer: Layer, own: Constants, integers: bool) -> Run:
    """A function of the inputs of a layer that has no op."""
    return functools.partial(_STEPS[layer.kind], layer, own, stored if integers else lambda value: value)


def _bn(layer: Layer, own: Constants, finish: Run, x: Tensor) -> Tensor:
    scale, bias = own[0].view(2, -1, 1, 1)
    return finish(fused(byte(x), scale, bias))


def _add(layer: Layer, own: Constants, finish: Run, x: Tensor, residual: Tensor | None = None) -> Tensor:
    ((scale, part, bias),) = own
    value = fused(byte(x), scale, bias)
    return finish(value if residual is None else fused(byte(residual), part, value))


def _pad(layer: Layer, own: Constants, finish: Run, x: Tensor) -> Tensor:
    return plain.pad(layer, x, own[0])


_STEPS = {"bn": _bn, "add": _add, "relu": _add, "pad": _pad}
