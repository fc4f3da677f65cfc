"""Layers laid out for one input size: shapes, passes over the batch, and a place in the arena for every value.

The batch goes through early layers a few images at a time, so that what passes between them stays in the last-level
cache, and through later ones all at once, so that their large weights are read once. A run of layers with one such number
is a segment; a value that crosses into another segment is held for the whole batch, any other for one pass.
"""

import functools
import itertools
import math
import re
import struct
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.errors import must
from fastres.frozen.layers import FUNCTIONS, Layer, Pair
from fastres.frozen.record import Value
from fastres.kernels import layout
from fastres.ops import _conv_cpu

# enum Step of csrc/cpu/plan.h
KINDS = ("segment", "pad", "conv", "max_pool", "avg_pool", "bn", "add", "upsample", "gate", "activation", "copy")
FIELDS = 36  # of a row, struct PlanRow there
NONE, INPUT, OUTPUT = -1, -2, -3  # and -4 for the second output, and so on
_ROWS = {"linear": "conv", "relu": "add", "turn": "add", "cat": "copy", "slice": "copy"}  # kinds of layers that others serve
_ELEMENTWISE = ("activation", "add", "bn", "gate", "relu")
ALIGNMENT = 4096  # of a value in the arena, in bytes
MOST_LIVE = 8 << 20  # bytes that pass between steps, for each thread
Size = tuple[int, int, int]  # channels, height, width


class Step(NamedTuple):
    """A layer on one input size: the values it reads and writes, with their sizes."""

    layer: Layer
    x: Value
    residual: Value | None
    y: Value
    x_size: Size
    y_size: Size
    gate: Value | None = None
    padded: bool = False  # whether x comes with its padding written out
    winograd: bool = False
    at: int = 0  # the first of y's channels that it writes, of a cat, which has a step for each of its operands

    @property
    def operands(self) -> list[Value]:
        """What it reads."""
        return [value for value in (self.x, self.residual, self.gate) if value is not None]

    @property
    def replaced(self) -> list[Value]:
        """The operands whose places y may take, if nobody reads them later: kernels read an element before they write it."""
        own = [self.residual] if self.layer.kind not in _ELEMENTWISE else [self.residual, self.x]
        return [value for value in own if value is not None and self.operands.count(value) == 1]

    @property
    def row_kind(self) -> str:
        return _ROWS.get(self.layer.kind, self.layer.kind)


@dataclass
class Program:
    """Rows for the native runner, the constants they count, the arena they need, and what each row computes.

    With several parts the rows are those of one of them, which a thread sees through alone, and the arena holds them all.
    """

    rows: Tensor
    constants: list[Tensor]
    arena_bytes: int
    outputs: list[Size]
    steps: list[Step]
    parts: int = 1  # of the batch
    chunks: list[int] = field(default_factory=list)  # images a pass, for each step


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache as Linux tells it, else 8 MiB."""
    levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)K", path.read_text().strip()) for path in levels]
    return max((int(size[1]) << 10 for size in sizes if size), default=8 << 20)


def steps(layers: list[Layer], x: Value, size: Size, dtype: torch.dtype, offset: Set[Value] = frozenset()) -> list[Step]:
    """Every layer with its sizes; copies of the input, of images with few channels, and of what is padded with another
    byte than 0 (``offset``: values of integers with a zero point), become steps of their own.

    Raises:
        ArgumentError: the images are too small, or not of the size that a linear layer was made for.
    """
    sizes, found = {x: size}, list[Step]()
    plain = Value(())  # the input, channels last

    def copied(source: Value, y: Value, name: str, channels: int, padding: tuple[int, int]) -> Value:
        _, height, width = sizes[source]
        sizes[y] = (channels, height + 2 * padding[0], width + 2 * padding[1])
        pad = Layer("pad", name, source, y, padding=padding, out_channels=channels)
        found.append(Step(pad, source, None, y, sizes[source], sizes[y]))
        return y

    def readable(value: Value) -> Value:
        if value is not x:
            return value
        return plain if plain in sizes else copied(x, plain, "input", size[0], (0, 0))

    for layer in layers:
        if layer.kind == "cat":
            y, at = sized(layer, sizes, size), 0
            for value in layer.operands:
                found.append(Step(layer, readable(value), None, layer.y, sizes[value], y, at=at))
                at += sizes[value][0]
            continue
        channels = sizes[layer.x][0]
        padded = layer.kind in ("conv", "linear") and _conv_cpu.is_padded(channels, dtype)
        padded = padded or (layer.kind == "conv" and layer.x in offset and layer.padding != (0, 0))
        source = layer.x
        if padded:
            source = copied(layer.x, Value(()), layer.name, _conv_cpu.whole_words(channels, dtype), layer.padding)
        elif layer.kind != "pad":
            source = readable(layer.x)
        residual, gate = (None if value is None else readable(value) for value in (layer.residual, layer.gate))
        sized(layer, sizes, size)
        weight = (layer.out_channels, channels, *layer.kernel)
        winograd = layer.kind == "conv" and layer.groups == 1 and not padded
        winograd = winograd and _conv_cpu.suits_winograd(weight, dtype, layer.stride, layer.dilation, sizes[layer.y][1:])
        found.append(Step(layer, source, residual, layer.y, sizes[source], sizes[layer.y], gate, padded, winograd))
    return found


def sized(layer: Layer, sizes: dict[Value, Size], size: Size) -> Size:
    """The size of a layer's output, entered in ``sizes``; ``size`` is that of the input.

    Raises:
        ArgumentError: the layer cannot run on it.
    """
    channels, *image = sizes[layer.x]
    enlarged = layer.residual or layer.like if layer.kind == "upsample" else None
    y = output_size(layer, (image[0], image[1])) if enlarged is None else sizes[enlarged][1:]
    is_line = image[0] == 1 and 1 in (channels, image[1])
    if layer.kind == "turn":
        y, channels = (1, channels), image[1]
    sizes[layer.y] = (layer.out_channels or channels + sum(sizes[value][0] for value in layer.others), *y)
    fits = min(y) >= 1 and (is_line or layer.kind != "turn") and tuple(image) == (layer.expects or tuple(image))
    fits = fits and all(sizes[value][1:] == y for value in layer.others)
    fits = fits and (layer.gate is None or sizes[layer.gate] == (channels, 1, 1))
    if not fits or (layer.residual is not None and sizes[layer.residual] != sizes[layer.y]):
        raise must("freeze", "x", f"images whose size fits layer {layer.name!r}", f"{size[1]}x{size[2]}")
    return sizes[layer.y]


def output_size(layer: Layer, size: Pair) -> Pair:
    """Height and width of a layer's output."""
    if layer.kind in ("bn", "add", "relu", "gate", "activation", "cat", "slice", "turn"):
        return size
    if layer.kind == "linear" or layer.kernel == (0, 0):
        return 1, 1
    if layer.kind == "upsample":
        return size[0] * layer.stride[0], size[1] * layer.stride[1]
    if layer.kind == "pad":
        return tuple(math.ceil(s / t) for s, t in zip(size, layer.stride, strict=True))  # type: ignore[return-value]
    return layout.output_size(size, layer.kernel, layer.stride, layer.padding, layer.dilation, layer.ceil)


def parts_of(batch: int, threads: int) -> int:
    """As many as there are threads, if all get as many images: none then waits for another, nor reads what it wrote.
    (ResNet-50 at batch 8 in bfloat16: 1.08 times as fast as with all threads at each layer. AMD EPYC, 2026-11-25.)"""
    return threads if batch % threads == 0 else 1


def passes(found: list[Step], batch: int, parts: int, itemsize: int) -> list[int]:
    """Images a pass for each step: a power of two, as many as keep its live values in half of the last-level cache, and no
    more than a later step takes, so that the batch comes together once. (ResNet-50 at batch 32 in float32 ran 1.03 times
    as fast as with all images in every pass; a quarter or all of the cache gained less. AMD EPYC, 2026-11-25.) Of a large
    cache, which others may fill, a thread takes no more than 8 MiB. (At batch 8 and 32 in bfloat16 1.03 times as fast as with
    half of 105 MiB. Intel Xeon with AMX, 2026-11-28.)"""
    room = min(cache_bytes() // 2, MOST_LIVE * torch.get_num_threads()) // parts
    last = {value: index for index, step in enumerate(found) for value in step.operands}
    live, fits = dict[Value, int](), []
    for index, step in enumerate(found):
        live[step.y] = _bytes(step.y_size, itemsize)
        for value in [value for value in step.replaced if last[value] == index][:1]:
            live.pop(value, None)  # y takes its place
        fits.append(max(1, room // sum(live.values())))
        live = {value: size for value, size in live.items() if last.get(value, -1) > index}
    return [min(batch // parts, 1 << (int(least).bit_length() - 1)) for least in _minima(fits)]


def _minima(numbers: list[int]) -> list[int]:
    """The least of each number and all after it."""
    return list(itertools.accumulate(reversed(numbers), min))[::-1]


def program(
    found: list[Step],
    outputs: Sequence[Value],
    batch: int,
    parts: int,
    dtype: torch.dtype,
    constants: Mapping[Layer, tuple[Tensor, ...]],
) -> Program:
    """Rows for the runner; ``constants`` are what the kernels of the layers read: weights first, then biases or scales."""
    chunks = passes(found, batch, parts, dtype.itemsize)
    sizes = {step.y: step.y_size for step in found}
    itemsize = 4 if dtype == torch.int8 else dtype.itemsize  # of results
    given = {y: (OUTPUT - index, itemsize * math.prod(sizes[y])) for index, y in enumerate(outputs)}
    places, part_bytes = _Arena(found, given, chunks, batch // parts, dtype.itemsize).place()
    rows, tensors = [], list[Tensor]()
    for index, step in enumerate(found):
        if index == 0 or chunks[index] != chunks[index - 1]:
            count = next((i for i in range(index, len(found)) if chunks[i] != chunks[index]), len(found)) - index
            rows.append([0, count, chunks[index]] + [0] * (FIELDS - 3))
        own = constants.get(step.layer, ())
        first, last = (len(tensors), len(tensors) + len(own) - 1) if own else (NONE, NONE)
        tensors += own
        rows.append(_row(step, places, dtype, first, last))
    made = [sizes[y] for y in outputs]
    return Program(torch.tensor(rows, device="cpu"), tensors, part_bytes * parts, made, found, parts, chunks)


def _row(step: Step, places: dict[Value, tuple[int, int]], dtype: torch.dtype, weight: int, bias: int) -> list[int]:
    """The fields of struct PlanRow, in its order."""
    layer, (channels, height, width), (out_channels, out_h, out_w) = step.layer, step.x_size, step.y_size
    kernel, padding, run = layer.kernel, layer.padding, channels // layer.groups * dtype.itemsize // 4
    if step.padded:
        padding = (0, 0)
        if layer.dilation[1] == 1:  # the taps of a row are one run
            kernel, run = (layer.kernel[0], 1), run * layer.kernel[1]
    if kernel == (0, 0):
        kernel = (height, width)
    x, y = places.get(step.x, (INPUT, 0)), places[step.y]
    residual, gate = ((NONE, 0) if value is None else places[value] for value in (step.residual, step.gate))
    row = [KINDS.index(step.row_kind), 0, 0, *x, *residual, *y, weight, bias, layer.relu]
    if step.row_kind == "copy":
        run = min(channels, out_channels)
    if layer.kind == "avg_pool":
        run = layer.divisor
    if layer.kind == "activation":
        run = FUNCTIONS.index(layer.function)
    if step.row_kind == "pad":
        out_h, out_w = out_h - 2 * padding[0], out_w - 2 * padding[1]
    row += [channels, height, width, out_channels, out_h, out_w, *kernel, *layer.stride, *padding, *layer.dilation]
    row += [run, layer.groups, step.winograd, dtype == torch.int8, *gate, layer.begin, step.at]
    return [*map(int, row), _bits(layer.low), _bits(layer.high)]


def _bits(number: float) -> int:
    """A double as an int64 field holds it."""
    return int.from_bytes(struct.pack("=d", number), sys.byteorder, signed=True)


def _bytes(size: Size, itemsize: int) -> int:
    return -(-size[0] * size[1] * size[2] * itemsize // ALIGNMENT) * ALIGNMENT


class _Arena:
    """Where each value lives: ``(offset, bytes from one image to the next)``, 0 for a value of one pass.

    A value may take the place of an operand that nobody reads later.
    """

    def __init__(
        self, found: list[Step], given: dict[Value, tuple[int, int]], chunks: list[int], batch: int, itemsize: int
    ) -> None:
        self.found, self.given, self.chunks, self.batch, self.itemsize = found, given, chunks, batch, itemsize
        self.made = {step.y: index for index, step in reversed(list(enumerate(found)))}  # first
        self.last = {step.y: index for index, step in enumerate(found)}
        for index, step in enumerate(found):
            self.last.update({value: index for value in step.operands if value in self.made})

    def segment(self, index: int) -> tuple[int, int]:
        """First and last step of the segment of a step."""
        first = last = index
        while first > 0 and self.chunks[first - 1] == self.chunks[index]:
            first -= 1
        while last + 1 < len(self.chunks) and self.chunks[last + 1] == self.chunks[index]:
            last += 1
        return first, last

    def place(self) -> tuple[dict[Value, tuple[int, int]], int]:
        places = dict(self.given)  # outputs live outside
        taken: list[tuple[int, int, int, int]] = []  # first step, last step, offset, end
        for index, step in enumerate(self.found):
            if step.y in places:
                continue
            image = step.y_size[0] * step.y_size[1] * step.y_size[2] * self.itemsize
            whole = self.segment(index) != self.segment(self.last[step.y])
            begin = self.segment(index)[0] if whole else index
            end = self.segment(self.last[step.y])[1] if whole else self.last[step.y]
            heir = self.inherited(step, index, whole, places)
            if heir is not None:
                places[step.y] = places[heir]
                taken = [(a, max(b, end), lo, hi) if lo == places[heir][0] and a <= index <= b else (a, b, lo, hi)
                         for a, b, lo, hi in taken]  # fmt: skip
                continue
            size = -(-image * (self.batch if whole else self.chunks[index]) // ALIGNMENT) * ALIGNMENT
            offset = 0
            for lo, hi in sorted((lo, hi) for a, b, lo, hi in taken if a <= end and begin <= b):
                if offset + size <= lo:
                    break
                offset = max(offset, hi)
            taken.append((begin, end, offset, offset + size))
            places[step.y] = (offset, image if whole else 0)
        return places, max((hi for *_, hi in taken), default=0)

    def inherited(self, step: Step, index: int, whole: bool, places: dict[Value, tuple[int, int]]) -> Value | None:
        """The operand whose place y takes, if nobody reads it later and it is held alike."""
        for old in step.replaced:
            if old in self.given or old not in self.made or self.last[old] != index or whole != (places[old][1] != 0):
                continue
            if whole or self.segment(self.made[old]) == self.segment(index):
                return old
        return None
