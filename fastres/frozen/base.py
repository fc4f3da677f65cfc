"""What every frozen network is, wherever it runs: a module without parameters that is called as its model."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastres.errors import UnsupportedError, must, must_type
from fastres.frozen.build import network
from fastres.frozen.calibrate import Quality
from fastres.frozen.layers import Network
from fastres.frozen.record import Recording, Value, record
from fastres.ops._conv_cpu import is_finite

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
# A graph that holds the plan's native call would hold the memory that it works in too: calls that overlap would share it.
_CLOSED = "fastres.freeze: a frozen network cannot be traced, scripted or exported: pickle it, or export its model"
RECORDED = 2  # images at most that a network runs on to be recorded


class NotFinite(UnsupportedError):
    """Weights that a plan cannot serve until they change."""


def named(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes in words."""
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}"


def check_images(name: str, x: Any, device: torch.device | None = None) -> None:
    """A plain batch of images on the device, or on any that networks are frozen for."""
    if not isinstance(x, Tensor):
        raise must_type("freeze", name, "a torch.Tensor", x)
    if x.layout is not torch.strided or x.is_nested:
        raise must("freeze", name, "a strided tensor", "another layout", "call .to_dense()")
    if x.device.type not in DTYPES or x.device != (device or x.device):
        where = "the CPU or a CUDA device" if device is None else "the CPU" if device.type == "cpu" else device
        raise must("freeze", name, f"on {where}", x.device)
    if x.dtype not in DTYPES[x.device.type]:
        raise must("freeze", name, f"of dtype {named(DTYPES[x.device.type])}", x.dtype)
    if x.dim() != 4:
        raise must("freeze", name, "of 4 dimensions (N, C, H, W)", tuple(x.shape))
    if name == "example" and x.numel() == 0:
        raise must("freeze", name, "not empty", tuple(x.shape))


def recorded(model: nn.Module, example: Tensor) -> tuple[Network, Recording]:
    """The layers of a model as it is now, run in its parameters' dtype, whatever that of the example.

    Raises:
        UnsupportedError: an operation or a weight (not finite) that a plan cannot serve.
    """
    recording = record(model, example.to(parameter_dtype(model) or example.dtype))
    return layers_of(type(model).__name__, recording), recording


def layers_of(name: str, recording: Recording) -> Network:
    """The layers of a recorded model, with its parameters as they are now.

    Raises:
        UnsupportedError: as above.
    """
    found = network(name, recording)
    for layer in found.layers:
        if layer.weight is not None and not is_finite(layer.weight):
            what = "must be finite: a plan multiplies padding too"
            raise NotFinite(f"fastres.freeze: the weights of {layer.name} {what}")
    return found


def parameter_dtype(model: nn.Module) -> torch.dtype | None:
    """That of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


class Frozen(nn.Module):
    """A network as ``freeze`` planned it: call it with images (N, C, H, W), as its model.

    It holds packed constants, not parameters: it has an empty state dict, cannot train or move, and its results carry no
    gradient. ``fastres.explain(frozen)`` prints the plan, ``fastres.explain(frozen, x)`` with times.
    """

    network: Network
    dtype: torch.dtype
    device: torch.device
    signature: list[tuple[Any, ...]] | None = None  # of what was recorded
    images: tuple[int, ...] | None = None  # shape of those that it was recorded on
    quality: Quality | None = None  # of a quantised network
    _DERIVED: tuple[str, ...] = ()  # attributes that copies and pickles make anew

    def __init__(self, found: Network, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name, self.dtype, self.network, self.device = found.name, dtype, found, device
        super().train(False)

    def forward(self, x: Tensor) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise UnsupportedError(_CLOSED)
        if torch.compiler.is_compiling():  # decorated here: doing so above would import the compiler with fastres
            return torch.compiler.disable(type(self).call)(self, x)
        return self.call(x)

    def call(self, x: Tensor) -> Any:
        """What ``forward`` does, never compiled."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> "Frozen":
        """Called by ``torch.jit.script``."""
        raise UnsupportedError(_CLOSED)

    def check(self, x: Any) -> None:
        """Images that this network can be called with."""
        check_images("x", x, self.device)
        if x.shape[1] != self.network.channels or 0 in x.shape[1:]:
            raise must("freeze", "x", f"non-empty images with {self.network.channels} channels", tuple(x.shape))
        forward = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
        if forward or (x.requires_grad and torch.is_grad_enabled()):
            raise must("freeze", "x", "without gradient", "one that requires it", "fastres.optimize has a backward")

    def update(self, model: nn.Module) -> None:
        """Take over the weights and statistics of a model that does what the frozen one did, such as that one after more
        training.

        The model runs once, on zeros of the example's size. The new weights are written where the old ones lie, and plans and
        captured graphs read them there. Calls that overlap use the old weights.

        Raises:
            TypeError, ValueError: no module, on another device, or one that does something else, or with other shapes.
            UnsupportedError: the network is quantised (freeze the model again), or a weight is not finite.
        """
        if not isinstance(model, nn.Module):
            raise must_type("freeze", "model", "a torch.nn.Module", model)
        if isinstance(model, Frozen):
            raise must("freeze", "model", "the network itself", "one that is frozen already")
        if self.images is None:
            raise UnsupportedError("fastres.freeze: a quantised network has scales for its weights: freeze the model again")
        check_device(model, self.device)
        example = torch.zeros(self.images, dtype=self.dtype, device=self.device)
        found, recording = recorded(model, example)
        if _structure(found) != _structure(self.network):
            raise must("freeze", "model", f"one that does what the frozen {self.name} did", "another structure or other shapes")
        self.take(found)
        self.signature = recording.signature()

    def take(self, found: Network) -> None:
        """Run with the weights of these layers, of a network that does the same."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a quantised network to one file, safetensors with the layers as JSON; ``fastres.load_frozen`` reads it.

        The file is replaced whole, or not at all.

        Raises:
            UnsupportedError: the plan is not of 8-bit integers: its model can be frozen again.
        """
        raise UnsupportedError("fastres.freeze: only quantised networks are saved: keep the model, and freeze it again")

    def train(self, mode: bool = True) -> "Frozen":
        if mode:
            raise UnsupportedError("fastres.freeze: a frozen network cannot train: train its model and freeze that again")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Frozen":
        raise UnsupportedError("fastres.freeze: a frozen network cannot be moved or cast: freeze its model again")

    def _forget(self) -> None:
        """Begin without what is derived."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def extra_repr(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {len(self.network.layers)} layers"


def check_device(model: nn.Module, device: torch.device) -> None:
    """All of a model on one device."""
    others = {str(t.device) for t in (*model.parameters(), *model.buffers()) if t.device != device}
    if others:
        where, do = ("the CPU", "move it with .cpu()") if device.type == "cpu" else (device, "move it, or the images")
        raise must("freeze", "model", f"on {where}", ", ".join(sorted(others)), do)


def _structure(found: Network) -> list[tuple[Any, ...]]:
    """What layers do with what, and the shapes of their weights."""
    order: dict[Value | None, int] = {None: -1, found.x: 0}
    order |= {layer.y: index + 1 for index, layer in enumerate(found.layers)}
    return [
        (layer.kind, order[layer.x], order[layer.residual], order[layer.gate], order[layer.like],
         *map(order.get, layer.others), layer.relu,
         layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups, layer.ceil, layer.out_channels, layer.expects,
         layer.begin, layer.divisor, layer.function, layer.low, layer.high)
        for layer in found.layers
    ] + [(found.channels, *(order[y] for y in found.outputs), found.form)]  # fmt: skip
