"""A frozen network on the CPU: a program for each input size, run by one native call."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastres.errors import UnsupportedError
from fastres.frozen import file, int8
from fastres.frozen.base import Frozen
from fastres.frozen.int8 import Scale
from fastres.frozen.layers import Layer, Network
from fastres.frozen.program import Program, Step, parts_of, program, steps
from fastres.frozen.record import Value
from fastres.kernels import native
from fastres.memory import large_pages
from fastres.ops import _conv_cpu

_PROGRAMS = 32  # input sizes whose programs are kept
_LARGE = (1 << 10, 1 << 10)  # an output size that suits every algorithm
_ARENAS = 4  # blocks of memory kept for later calls


class NativeFrozen(Frozen):
    """A network on the CPU, run by one native call: ``program`` for each input size."""

    _DERIVED = ("_programs", "_arenas", "_lock")

    def __init__(self, found: Network, dtype: torch.dtype, scales: Mapping[Value, Scale] | None = None) -> None:
        super().__init__(found, dtype, torch.device("cpu"))
        self.scales, self._level = scales, native.cpu_features()["level"]
        self.result_dtype = torch.float32 if dtype == torch.int8 else dtype
        self._offset = frozenset(value for value, scale in (scales or {}).items() if scale.zero)
        self._packed: dict[tuple[Layer, bool], tuple[Tensor, ...]] = {}  # by whether they are transformed for Winograd
        self._forget()

    def _forget(self) -> None:
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._arenas: list[Tensor] = []
        self._running = 0  # calls
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # each piece of a block would take the whole block with it, and one of another dtype be refused
            apart = {key: tuple(tensor.clone() for tensor in own) for key, own in self._packed.items()}
        return super().__getstate__() | {"_packed": apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed = _together(self._packed)
        if self._level != (here := native.cpu_features()["level"]):  # weights are packed in vectors of the processor's size
            what = f"a network frozen for x86-64-v{self._level} cannot run on x86-64-v{here}: freeze its model again here"
            raise UnsupportedError(f"fastres.freeze: {what}")

    def take(self, found: Network) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for layer, fresh in zip(self.network.layers, found.layers, strict=True):
                layer.weight, layer.bias = fresh.weight, fresh.bias
            try:
                if not self._running:
                    self._repack()
                    return
            except BaseException:
                self._unpack()
                raise
            self._unpack()

    def _repack(self) -> None:
        """The constants of all programs anew, where they lie."""
        for (layer, winograd), constants in self._packed.items():
            for constant, fresh in zip(constants, self._pack(layer, winograd, constants[0]), strict=True):
                if fresh is not constant:
                    constant.copy_(fresh.flatten())
        self._release(layer for layer, _ in self._packed)

    def _unpack(self) -> None:
        """Leave programs and constants to the calls that run: the next one makes others."""
        self._packed = {}
        self._programs.clear()

    def program(self, shape: tuple[int, ...]) -> Program:
        """The program for one input shape, made at the first call.

        Raises:
            ArgumentError: images of that size do not fit the network.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._program(shape)

    def _program(self, shape: tuple[int, ...]) -> Program:
        parts = parts_of(shape[0], torch.get_num_threads())
        key = (*shape, parts)
        found = self._programs.get(key)
        if found is None:
            batch, channels, height, width = shape
            size = (channels, height, width)
            laid = steps(self.network.layers, self.network.x, size, self.dtype, self._offset)
            found = self._programs[key] = program(
                laid, self.network.outputs, batch, parts, self.dtype, self._constants(laid)
            )
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        else:
            self._programs.move_to_end(key)
        return found

    def _constants(self, laid: list[Step]) -> dict[Layer, tuple[Tensor, ...]]:
        """The packed constants of every step; those packed now go into one block of large pages."""
        constants, kinds = {}, {"conv", "linear", "bn"}
        if self.scales is not None:
            constants = {step.layer: self._copied(step) for step in laid if step.layer.kind == "pad"}
            kinds |= {"add", "relu", "avg_pool"}
        wanted = dict.fromkeys((step.layer, step.winograd) for step in laid if step.layer.kind in kinds)
        missing = [key for key in wanted if key not in self._packed]
        self._packed |= _together({key: tuple(self._pack(*key)) for key in missing})
        self._release(layer for layer, _ in missing)
        return constants | {key[0]: self._packed[key] for key in wanted}

    def _release(self, packed: Iterable[Layer]) -> None:
        """Drop original weights, but those of 3x3 convolutions, whose other sizes want the other algorithm, and those of a
        quantised network, which are saved."""
        for layer in packed if self.scales is None else ():
            weight = layer.weight
            geometry = layer.stride, layer.dilation, _LARGE
            if weight is None or layer.groups > 1 or not _conv_cpu.suits_winograd(weight.shape, self.dtype, *geometry):
                layer.weight = layer.bias = None

    def _copied(self, step: Step) -> tuple[Tensor, ...]:
        """What a copy of 8-bit integers, or into them, reads."""
        assert self.scales is not None
        scale = self.scales[step.x]
        return int8.input_constants(scale) if step.x is self.network.x else int8.zero_constants(scale)

    def _pack(self, layer: Layer, winograd: bool, into: Tensor | None = None) -> Iterator[Tensor]:
        """What the runner reads for a layer, the weights of a convolution in memory that is given."""
        if self.scales is not None:
            yield from int8.packed(layer, self.scales)
            return
        assert layer.weight is not None
        if layer.bias is None:  # mean, scale and bias of a batch norm
            yield layer.weight
        else:
            yield _conv_cpu.pack(layer.weight.to(self.dtype), layer.groups, winograd, into)
            yield layer.bias

    def last_shape(self) -> tuple[int, ...] | None:
        """The input shape planned or run last."""
        key = next(reversed(self._programs), None)
        return None if key is None else key[:-1]

    def call(self, x: Tensor) -> Any:
        self.check(x)
        with torch.inference_mode(False), torch.no_grad(), self._call((max(x.shape[0], 1), *x.shape[1:])) as plan:
            ys = self.results(plan, len(x))
            if x.shape[0]:
                self.run(plan, self.readable(x.detach().resolve_conj().resolve_neg()), ys)
        return self.network.result([y.permute(0, 3, 1, 2) for y in ys])

    def results(self, plan: Program, batch: int) -> list[Tensor]:
        """Memory for the outputs, channels last."""
        shapes = [(batch, *pixels, channels) for channels, *pixels in plan.outputs]
        return [torch.empty(shape, dtype=self.result_dtype, device="cpu") for shape in shapes]

    @contextlib.contextmanager
    def _call(self, shape: tuple[int, ...]) -> Iterator[Program]:
        """A program whose constants stay as they are meanwhile."""
        with self._lock:
            plan = self._program(shape)
            self._running += 1
        try:
            yield plan
        finally:
            with self._lock:
                self._running -= 1

    def readable(self, x: Tensor) -> Tensor:
        """The images in a dtype that the plan reads: float32, or that of its results."""
        return x if x.dtype == torch.float32 else x.to(self.result_dtype)

    def run(self, plan: Program, x: Tensor, ys: list[Tensor]) -> None:
        """One native call, in a block of memory that no other call uses meanwhile."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = None
        if arena is None or arena.numel() < plan.arena_bytes:
            arena = large_pages(plan.arena_bytes)
        native.op("cpu_plan")(x, plan.rows, plan.constants, arena[: plan.arena_bytes], ys, plan.parts)
        if len(self._arenas) < _ARENAS:
            self._arenas.append(arena)

    def save(self, path: str | os.PathLike[str]) -> None:
        if self.scales is None:
            super().save(path)
            return
        file.write(path, self.network, self.scales, self.quality)


def _together(constants: dict[Any, tuple[Tensor, ...]]) -> dict[Any, tuple[Tensor, ...]]:
    """Move constants into one block of large pages, in the order in which they are read."""
    sizes = [-(-tensor.nbytes // 64) * 64 for own in constants.values() for tensor in own]
    if not sizes:
        return {}
    block = large_pages(sum(sizes))
    pieces = iter(block.split(sizes))
    return {
        key: tuple(next(pieces)[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten()) for tensor in own)
        for key, own in constants.items()
    }
