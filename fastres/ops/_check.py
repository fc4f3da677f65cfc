"""Argument checks shared by the ops' pages: every message says what must be, what was got and what to do."""

import torch
from torch import Tensor

from fastres.errors import must, must_type

ACTS = ("relu", "none")
MOST = 2**31 - 1  # largest number that describes a window: what every convolution library takes


def strided(op: str, name: str, tensor: object) -> None:
    """A tensor whose values lie in memory by strides."""
    if not isinstance(tensor, Tensor):
        raise must_type(op, name, "a torch.Tensor", tensor)
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise must(op, name, "a strided tensor", f"a {kind} one", "call .to_dense() or pad it")


def tensors(op: str, **arguments: Tensor) -> None:
    """Plain strided real floating-point tensors on one device."""
    first = None
    for name, tensor in arguments.items():
        strided(op, name, tensor)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise must(op, name, "of dtype float64, float32, float16 or bfloat16", tensor.dtype)
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise must(op, name, f"on the device of {first[0]} ({first[1]})", tensor.device, "move one of them")


def images(op: str, **arguments: Tensor) -> None:
    """Activations of shape (N, C, H, W)."""
    tensors(op, **arguments)
    for name, tensor in arguments.items():
        if tensor.dim() != 4:
            raise must(op, name, "of 4 dimensions (N, C, H, W)", f"shape {tuple(tensor.shape)}")


def same_shape(op: str, **arguments: Tensor) -> None:
    """All of the shape of the first."""
    (first, expected), *others = arguments.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise must(op, name, f"of {first}'s shape {tuple(expected.shape)}", tuple(tensor.shape))


def same_dtype(op: str, **arguments: Tensor | None) -> None:
    """All of the dtype of the first; None passes."""
    (first, expected), *others = arguments.items()
    assert expected is not None
    for name, tensor in others:
        if tensor is not None and tensor.dtype != expected.dtype:
            raise must(op, name, f"of {first}'s dtype {expected.dtype}", tensor.dtype, "cast one of them")


def per_channel(op: str, channels: int, like: Tensor, **parameters: Tensor | None) -> None:
    """One value per channel, on the device of the activation; None passes."""
    given = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    tensors(op, x=like, **given)
    whose = "x" if channels == like.shape[1] else "the output"
    for name, tensor in given.items():
        if tuple(tensor.shape) != (channels,):
            raise must(op, name, f"of shape ({channels},), one value a channel of {whose}", tuple(tensor.shape))


def act(op: str, value: str) -> None:
    if not isinstance(value, str):
        raise must_type(op, "act", "a str", value)
    if value not in ACTS:
        raise must(op, "act", f"one of {ACTS}", repr(value))


def flag(op: str, name: str, value: object) -> None:
    if type(value) is not bool:
        raise must_type(op, name, "a bool", value)


def eps(op: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise must_type(op, "eps", "a float", value)
    if not 0 < value < (2**63 if isinstance(value, int) else float("inf")):  # beyond it an int is no double for PyTorch
        raise must(op, "eps", "a finite number above 0", value)


def batch_statistics(op: str, x: Tensor) -> None:
    """The check of torch.nn.BatchNorm2d, with the same error: one value per channel has no variance."""
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def pair(op: str, name: str, value: object, least: int) -> None:
    """Two whole numbers, each at least ``least``."""
    if not isinstance(value, (tuple, list)) or not all(type(item) is int for item in value):
        raise must_type(op, name, "a pair of int", value)
    if len(value) != 2 or min(value) < least or max(value) > MOST:
        raise must(op, name, f"two whole numbers from {least} to {MOST}", tuple(value))


def size(op: str, name: str, value: object) -> None:
    """A height and a width; in a trace they may be symbols, which the shapes of what is computed bound."""
    if isinstance(value, (tuple, list)) and any(isinstance(item, torch.SymInt) for item in value):
        value = tuple(1 if isinstance(item, torch.SymInt) else item for item in value)
    pair(op, name, value, 1)
