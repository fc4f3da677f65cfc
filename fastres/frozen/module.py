"""``freeze`` and the module it returns: a network as one native call."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import UnsupportedError, must, must_type
from fastres.frozen.layers import Layer, layers
from fastres.frozen.program import Program, Step, program, steps
from fastres.frozen.record import Recording, record
from fastres.kernels import native
from fastres.ops import _conv_cpu

DTYPES = (torch.float32, torch.bfloat16)
_PROGRAMS = 32  # input sizes whose programs are kept
_LARGE = (1 << 10, 1 << 10)  # an output that suits every algorithm
_ARENAS = 4  # blocks of memory kept for calls to come, the largest that were needed


def freeze(model: nn.Module, example: Tensor, dtype: torch.dtype | None = None) -> "Frozen":
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

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        UnsupportedError: an operation, the processor or a weight (not finite) that a plan cannot serve; the text says which.
    """
    dtype = _check(model, example, dtype)
    reason = native.why_not("cpu_plan") or _conv_cpu.lacks(dtype)
    if reason is not None:
        raise UnsupportedError(f"fastres.freeze: the plan's kernels cannot run: {reason}")
    frozen = Frozen(type(model).__name__, record(model, example), dtype)
    frozen.program(tuple(example.shape))
    return frozen


def _check(model: object, example: object, dtype: object) -> torch.dtype:
    if not isinstance(model, nn.Module):
        raise must_type("freeze", "model", "a torch.nn.Module", model)
    if isinstance(model, Frozen):
        raise must("freeze", "model", "the network itself", "one that is frozen already")
    check_images("example", example)
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), getattr(example, "dtype", None))
    if dtype not in DTYPES:
        raise must("freeze", "dtype", "torch.float32 or torch.bfloat16", dtype)
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise must("freeze", "model", "on the CPU", ", ".join(sorted(devices)), "move it with .cpu()")
    return dtype  # type: ignore[return-value]


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

    def __init__(self, name: str, recording: Recording, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype, self.signature = name, dtype, recording.signature()
        self.channels, self.flat = recording.x.shape[1], len(recording.y.shape) == 2
        self._layers, self._x = layers(recording), recording.x
        for layer in self._layers:
            if layer.weight is not None and not layer.weight.isfinite().all():
                what = "must be finite: a plan multiplies padding too"
                raise UnsupportedError(f"fastres.freeze: the weights of {layer.name} {what}")
        self._packed: dict[tuple[Layer, bool], tuple[Tensor, ...]] = {}  # by whether they are transformed for Winograd
        self._forget()

    def _forget(self) -> None:
        self._programs: OrderedDict[tuple, Program] = OrderedDict()
        self._arenas: list[Tensor] = []
        self._lock = threading.Lock()
        super().train(False)

    def program(self, shape: tuple[int, ...]) -> Program:
        """The program for one input shape, made at the first call.

        Raises:
            ArgumentError: images of that size do not fit the network.
        """
        key = tuple(shape)
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                batch, channels, height, width = key
                laid = steps(self._layers, self._x, (channels, height, width), self.dtype)
                found = self._programs[key] = program(laid, batch, self.dtype, self._constants(laid))
                if len(self._programs) > _PROGRAMS:
                    self._programs.popitem(last=False)
            else:
                self._programs.move_to_end(key)
        return found

    def _constants(self, laid: list[Step]) -> dict[Layer, tuple[Tensor, ...]]:
        """The packed constants of every step, in one block of large pages those that are packed now.

        A 3x3 convolution keeps its weights as they were, for sizes that want the other algorithm.
        """
        wanted = {(step.layer, step.winograd): step for step in laid if step.layer.kind in ("conv", "linear", "bn")}
        missing = {key: tuple(_pack(*key, self.dtype)) for key in wanted if key not in self._packed}
        self._packed |= _together(missing)
        for layer, _ in missing:
            weight = layer.weight
            if weight is None or not _conv_cpu.suits_winograd(weight.shape, self.dtype, layer.stride, layer.dilation, _LARGE):
                layer.weight = layer.bias = None
        return {layer: self._packed[layer, winograd] for layer, winograd in wanted}

    def last_shape(self) -> tuple[int, ...] | None:
        """The input shape planned or run last."""
        return next(reversed(self._programs), None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # decorated here: doing so above would import the compiler with fastres
            return torch.compiler.disable(Frozen.call)(self, x)
        return self.call(x)

    def call(self, x: Tensor) -> Tensor:
        """What ``forward`` does, never compiled."""
        check_images("x", x)
        if x.shape[1] != self.channels or 0 in x.shape[1:]:
            raise must("freeze", "x", f"of {self.channels} channels and not without pixels", tuple(x.shape))
        if x.requires_grad and torch.is_grad_enabled():
            raise must("freeze", "x", "without gradient", "one that requires it", "fastres.optimize has a backward")
        plan = self.program((max(x.shape[0], 1), *x.shape[1:]))
        with torch.inference_mode(False), torch.no_grad():
            channels, *pixels = plan.output
            y = torch.empty((x.shape[0], *pixels, channels), dtype=self.dtype)
            if x.shape[0]:
                self.run(plan, x.detach().resolve_conj().resolve_neg().to(self.dtype), y)
        y = y.permute(0, 3, 1, 2)
        return y.flatten(1) if self.flat else y

    def run(self, plan: Program, x: Tensor, y: Tensor) -> None:
        """One native call, in a block of memory that no other call uses meanwhile."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = None
        if arena is None or arena.numel() < plan.arena_bytes:
            arena = native.op("cpu_large_pages")(y, plan.arena_bytes)
        native.op("cpu_plan")(x, plan.rows, plan.constants, arena, y)
        if len(self._arenas) < _ARENAS:
            self._arenas.append(arena)

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
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {len(self._layers)} layers"


def _pack(layer: Layer, winograd: bool, dtype: torch.dtype) -> Iterator[Tensor]:
    """What the runner reads for a layer."""
    weight, bias = layer.weight, layer.bias
    assert weight is not None
    if bias is None:  # mean, scale and bias of a batch norm
        yield weight.contiguous()
    else:
        packed = _conv_cpu.Packed(weight, bias, dtype, winograd)
        yield from (packed.weight, packed.bias)


def _together(constants: dict[Any, tuple[Tensor, ...]]) -> dict[Any, tuple[Tensor, ...]]:
    """The same constants in one block of large pages, in the order in which they are read."""
    sizes = [-(-tensor.nbytes // 64) * 64 for own in constants.values() for tensor in own]
    if not sizes:
        return {}
    block = native.op("cpu_large_pages")(next(iter(constants.values()))[0], sum(sizes))
    pieces = iter(block.split(sizes))
    return {
        key: tuple(next(pieces)[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten()) for tensor in own)
        for key, own in constants.items()
    }
