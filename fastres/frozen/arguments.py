"""The arguments of recorded operations, as the layers of a plan take them."""

import inspect
from typing import Any

from torch import Tensor

from fastres.frozen import weights
from fastres.frozen.layers import Pair
from fastres.frozen.record import Value

_IN_PLACE = ("relu_", "add_", "sub_", "mul_", "div_", "sigmoid_", "silu_", "hardsigmoid_", "hardswish_",
             "leaky_relu_", "hardtanh_")  # fmt: skip


class Refused(Exception):
    """No layer does what an operation does with these arguments."""


def stem(target: str) -> str:
    name = target.split(".")[1]
    return {"flatten": "view", "reshape": "view"}.get(name, name.removesuffix("_") if name in _IN_PLACE else name)


def pair(value: Any) -> Pair:
    values = tuple(int(v) for v in ([value] if isinstance(value, int) else value))
    return values if len(values) == 2 else (values[0], values[0])  # type: ignore[return-value]


def constant(value: Value | None) -> Tensor | None:
    """The tensor of a parameter; refuses a value that the network computes."""
    if value is not None and value.constant is None:
        raise Refused
    return None if value is None else value.constant


def of_channels(x: Value, factor: Any) -> Tensor:
    """A constant that scales or shifts channels of x, one value for each."""
    found = weights.of_channels(constant(factor), x.shape) if isinstance(factor, Value) else None
    if found is None:
        raise Refused
    return found


def layer_name(parameter: Value) -> str:
    return parameter.name.rpartition(".")[0] or parameter.name


def has_room(take: Any, args: tuple) -> bool:
    """Whether a step takes so many arguments; ``rounding_mode`` of a division is one more."""
    wanted = inspect.signature(take).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in wanted) or len(args) < len(wanted)
