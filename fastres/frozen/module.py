"""``freeze`` and the module it returns: a network as one native call."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import UnsupportedError, must, must_type
from fastres.frozen import file, int8
from fastres.frozen.calibrate import Calibration, Quality, calibrate, checked, judge
from fastres.frozen.int8 import Scale
from fastres.frozen.layers import Layer, Network, network
from fastres.frozen.program import Program, Step, parts_of, program, steps
from fastres.frozen.record import Value, record
from fastres.kernels import native
from fastres.memory import large_pages
from fastres.ops import _conv_cpu
from fastres.terminal import Progress

DTYPES = (torch.float32, torch.bfloat16)
_PROGRAMS = 32  # input sizes whose programs are kept
_LARGE = (1 << 10, 1 << 10)  # an output that suits every algorithm
_ARENAS = 4  # blocks of memory kept for calls to come, the largest that were needed


def freeze(
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype | None = None,
    quantize: Calibration | Iterable[Any] | None = None,
) -> "Frozen":
    """Make a static inference plan of a network, run by one native call.

    Equivalent to ``model.eval()`` without autograd, in ``dtype``. Batch norm is folded, weights are packed for this
    processor, activations stay channels_last from end to end, each convolution runs with its bias, addition and ReLU in one
    pass, and every value has its place in one block of memory. The model is left as it is, and later changes of it do not
    reach the plan. Other batch and image sizes are planned at their first call, on the branches that the network's Python
    took for the example; calls from several threads may overlap.

    Args:
        model: a network from one image batch to one tensor: any composition of convolutions in one group, batch norm,
            additions, ReLU, max and average pooling and linear layers, however its Python is written.
        example: images (N, C, H, W) on the CPU, float32 or bfloat16; the network runs once on them.
        dtype: ``torch.float32`` or ``torch.bfloat16`` for weights and activations; None is the parameters' own. In bfloat16
            sums, biases and batch norm are float32, and each layer rounds once.
        quantize: image batches, or pairs of one and its labels, or a ``fastres.Calibration`` of them: the network then runs
            in 8-bit integers, scaled for such images (signed weights with a scale for each output channel, unsigned
            activations with one scale each; sums exact, results float32), and ``save`` keeps it in a file. On processors
            with AMX, bfloat16 of PyTorch itself can be the faster one.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        UnsupportedError: an operation, the processor or a weight (not finite) that a plan cannot serve; the text says which.
        VerificationError: quantised, the network is not as good as the calibration asks.
    """
    dtype = _check(model, example, dtype, quantize)
    _check_processor(dtype)
    found = network(type(model).__name__, recording := record(model, example))
    for layer in found.layers:
        if layer.weight is not None and not layer.weight.isfinite().all():
            what = "must be finite: a plan multiplies padding too"
            raise UnsupportedError(f"fastres.freeze: the weights of {layer.name} {what}")
    frozen = Frozen(found, dtype) if quantize is None else _quantized(found, checked(quantize, found.channels))
    frozen.signature = recording.signature()
    frozen.program(tuple(example.shape))
    return frozen


def _check_processor(dtype: torch.dtype) -> None:
    reason = native.why_not("cpu_plan") or _conv_cpu.lacks(dtype)
    if reason is not None:
        raise UnsupportedError(f"fastres.freeze: the plan's kernels cannot run: {reason}")


def _quantized(found: Network, wanted: Calibration) -> "Frozen":
    """The network in 8-bit integers, if that is good enough."""
    last = found.layers[-1]
    if last.kind not in ("conv", "linear", "add", "relu") or last.relu:  # kernels whose results can be float32 write no ReLU
        found.layers.append(Layer("relu", "dequantize", last.y, Value(last.y.shape)))
    batches = len(list(wanted.batches))
    with Progress(f"Quantising {found.name}", 3 * batches, quiet=not wanted.progress) as progress:
        calibrated = calibrate(found.layers, found.x, wanted, progress)
        int8.with_int8_weights(found.layers)
        frozen, results = Frozen(found, torch.int8, calibrated.scales), []
        for index, (images, _) in enumerate(calibrated.batches):
            progress.step(f"results, batch {index + 1} of {batches}")
            results.append(frozen(images))
    frozen.quality = judge(results, calibrated, wanted)
    return frozen


def load_frozen(path: str | os.PathLike[str]) -> "Frozen":
    """A quantised network as ``Frozen.save`` wrote it.

    Nothing in the file is run: it holds safetensors, and the layers as JSON, each checked.

    Raises:
        ArgumentError: the file is not such a one, or is damaged.
        UnsupportedError: this processor cannot run it.
    """
    _check_processor(torch.int8)
    found, scales, quality = file.read(path)
    frozen = Frozen(found, torch.int8, scales)
    frozen.quality = quality
    return frozen


def _check(model: object, example: object, dtype: object, quantize: object) -> torch.dtype:
    if not isinstance(model, nn.Module):
        raise must_type("freeze", "model", "a torch.nn.Module", model)
    if isinstance(model, Frozen):
        raise must("freeze", "model", "the network itself", "one that is frozen already")
    check_images("example", example)
    if quantize is not None and dtype not in (None, torch.int8):
        raise must("freeze", "dtype", "None or torch.int8 with quantize", dtype)
    if quantize is None and dtype == torch.int8:
        raise must("freeze", "quantize", "given for torch.int8", "None", "give image batches to find the scales with")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), getattr(example, "dtype", None))
    if quantize is None and dtype not in DTYPES:
        raise must("freeze", "dtype", "torch.float32 or torch.bfloat16", dtype)
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise must("freeze", "model", "on the CPU", ", ".join(sorted(devices)), "move it with .cpu()")
    return torch.int8 if quantize is not None else dtype  # type: ignore[return-value]


def check_images(name: str, x: Any) -> None:
    """A plain batch of images on the CPU."""
    if not isinstance(x, Tensor):
        raise must_type("freeze", name, "a torch.Tensor", x)
    if x.layout is not torch.strided or x.is_nested:
        raise must("freeze", name, "a strided tensor", "another layout", "call .to_dense()")
    if x.device.type != "cpu":
        raise must("freeze", name, "on the CPU", x.device)
    if x.dtype not in DTYPES:
        raise must("freeze", name, "of dtype float32 or bfloat16", x.dtype)
    if x.dim() != 4:
        raise must("freeze", name, "of 4 dimensions (N, C, H, W)", tuple(x.shape))
    if name == "example" and x.numel() == 0:
        raise must("freeze", name, "not empty", tuple(x.shape))


class Frozen(nn.Module):
    """A network as ``freeze`` planned it: call it with images (N, C, H, W), as its model.

    It holds packed constants, not parameters: it has an empty state dict, cannot train or move, and its results carry no
    gradient. ``fastres.explain(frozen)`` prints the plan, ``fastres.explain(frozen, x)`` with times.
    """

    def __init__(self, found: Network, dtype: torch.dtype, scales: Mapping[Value, Scale] | None = None) -> None:
        super().__init__()
        self.name, self.dtype, self.network, self.scales = found.name, dtype, found, scales
        self.result_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.quality: Quality | None = None  # of a quantised network
        self.signature: list[tuple[Any, ...]] | None = None  # of what was recorded
        self._offset = frozenset(value for value, scale in (scales or {}).items() if scale.zero)
        self._packed: dict[tuple[Layer, bool], tuple[Tensor, ...]] = {}  # by whether they are transformed for Winograd
        self._forget()

    def _forget(self) -> None:
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._arenas: list[Tensor] = []
        self._lock = threading.Lock()
        super().train(False)

    def program(self, shape: tuple[int, ...]) -> Program:
        """The program for one input shape, made at the first call.

        Raises:
            ArgumentError: images of that size do not fit the network.
        """
        parts = parts_of(shape[0], torch.get_num_threads())
        key = (*shape, parts)
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                batch, channels, height, width = shape
                size = (channels, height, width)
                laid = steps(self.network.layers, self.network.x, size, self.dtype, self._offset)
                found = self._programs[key] = program(laid, batch, parts, self.dtype, self._constants(laid))
                if len(self._programs) > _PROGRAMS:
                    self._programs.popitem(last=False)
            else:
                self._programs.move_to_end(key)
        return found

    def _constants(self, laid: list[Step]) -> dict[Layer, tuple[Tensor, ...]]:
        """The packed constants of every step, in one block of large pages those that are packed now.

        A 3x3 convolution keeps its weights as they were, for sizes that want the other algorithm; a quantised one to be saved.
        """
        constants = {}
        wanted = {(step.layer, step.winograd) for step in laid if step.layer.kind in ("conv", "linear", "bn")}
        if self.scales is not None:
            constants = {step.layer: self._copied(step) for step in laid if step.layer.kind == "pad"}
            wanted |= {(step.layer, False) for step in laid if step.layer.kind in ("add", "relu", "avg_pool")}
        missing = [step for step in laid if (step.layer, step.winograd) in wanted - self._packed.keys()]
        self._packed |= _together({(step.layer, step.winograd): tuple(self._pack(step)) for step in missing})
        for layer in (step.layer for step in missing if self.scales is None):
            weight = layer.weight
            if weight is None or not _conv_cpu.suits_winograd(weight.shape, self.dtype, layer.stride, layer.dilation, _LARGE):
                layer.weight = layer.bias = None
        return constants | {layer: self._packed[layer, winograd] for layer, winograd in wanted}

    def _copied(self, step: Step) -> tuple[Tensor, ...]:
        """What a copy of 8-bit integers, or into them, reads."""
        assert self.scales is not None
        scale = self.scales[step.x]
        return int8.input_constants(scale) if step.x is self.network.x else int8.zero_constants(scale)

    def _pack(self, step: Step) -> Iterator[Tensor]:
        """What the runner reads for a layer."""
        layer = step.layer
        if self.scales is not None:
            yield from int8.packed(layer, self.scales)
            return
        assert layer.weight is not None
        if layer.bias is None:  # mean, scale and bias of a batch norm
            yield layer.weight.contiguous()
        else:
            packed = _conv_cpu.Packed(layer.weight, layer.bias, self.dtype, step.winograd)
            yield from (packed.weight, packed.bias)

    def last_shape(self) -> tuple[int, ...] | None:
        """The input shape planned or run last."""
        key = next(reversed(self._programs), None)
        return None if key is None else key[:-1]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # decorated here: doing so above would import the compiler with fastres
            return torch.compiler.disable(Frozen.call)(self, x)
        return self.call(x)

    def call(self, x: Tensor) -> Tensor:
        """What ``forward`` does, never compiled."""
        check_images("x", x)
        if x.shape[1] != self.network.channels or 0 in x.shape[1:]:
            raise must("freeze", "x", f"of {self.network.channels} channels and not without pixels", tuple(x.shape))
        if x.requires_grad and torch.is_grad_enabled():
            raise must("freeze", "x", "without gradient", "one that requires it", "fastres.optimize has a backward")
        plan = self.program((max(x.shape[0], 1), *x.shape[1:]))
        with torch.inference_mode(False), torch.no_grad():
            channels, *pixels = plan.output
            y = torch.empty((x.shape[0], *pixels, channels), dtype=self.result_dtype)
            if x.shape[0]:
                self.run(plan, self.readable(x.detach().resolve_conj().resolve_neg()), y)
        y = y.permute(0, 3, 1, 2)
        return y.flatten(1) if self.network.flat else y

    def readable(self, x: Tensor) -> Tensor:
        """The images in a dtype that the plan reads: its results' own, or float32."""
        return x if x.dtype == torch.float32 else x.to(self.result_dtype)

    def run(self, plan: Program, x: Tensor, y: Tensor) -> None:
        """One native call, in a block of memory that no other call uses meanwhile."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = None
        if arena is None or arena.numel() < plan.arena_bytes:
            arena = large_pages(plan.arena_bytes)
        native.op("cpu_plan")(x, plan.rows, plan.constants, arena[: plan.arena_bytes], y, plan.parts)
        if len(self._arenas) < _ARENAS:
            self._arenas.append(arena)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a quantised network to one file, safetensors with the layers as JSON; ``fastres.load_frozen`` reads it.

        The file is replaced whole, or not at all.

        Raises:
            UnsupportedError: the plan is not of 8-bit integers: its model can be frozen again.
        """
        if self.scales is None:
            raise UnsupportedError("fastres.freeze: only quantised networks are saved: keep the model, and freeze it again")
        file.write(path, self.network, self.scales, self.quality)

    def train(self, mode: bool = True) -> "Frozen":
        if mode:
            raise UnsupportedError("fastres.freeze: a frozen network cannot train: train its model and freeze that again")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Frozen":
        raise UnsupportedError("fastres.freeze: a frozen network cannot be moved or cast: freeze its model again")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_programs", "_arenas", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def extra_repr(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {len(self.network.layers)} layers"


def _together(constants: dict[Any, tuple[Tensor, ...]]) -> dict[Any, tuple[Tensor, ...]]:
    """The same constants in one block of large pages, in the order in which they are read."""
    sizes = [-(-tensor.nbytes // 64) * 64 for own in constants.values() for tensor in own]
    if not sizes:
        return {}
    block = large_pages(sum(sizes))
    pieces = iter(block.split(sizes))
    return {
        key: tuple(next(pieces)[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten()) for tensor in own)
        for key, own in constants.items()
    }
