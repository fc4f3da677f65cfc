"""What a network computes, as a list of PyTorch's own operations: recorded while it runs once on an example.

Everything a frozen network does is in this list, whatever Python produced it. An operation that reads a value (a branch
on data), draws a random number or writes into memory that others see has no place in a static plan and is refused.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastres.errors import UnsupportedError
from fastres.ops import REGISTRY

_PASSED = frozenset(("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default"))
_SPLITS = frozenset(("aten.split.Tensor", "aten.split_with_sizes.default"))
_RESHAPES = frozenset(("view", "_unsafe_view", "as_strided_", "empty", "upsample_nearest2d"))  # their integers are sizes


@dataclass(eq=False)
class Value:
    """A tensor between two operations, or a constant of the network."""

    shape: tuple[int, ...]
    constant: Tensor | None = None
    name: str = ""  # of a parameter or buffer


@dataclass
class Operation:
    """One call: ``args`` are those of PyTorch's schema with a ``Value`` for each tensor, alone or in a list."""

    target: str
    args: tuple
    result: Value


def values_in(args: Iterable[Any]) -> list[Value]:
    """The values among arguments, and in lists of them."""
    each = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args)
    return [value for values in each for value in values if isinstance(value, Value)]


@dataclass
class Recording:
    """The operations that lead from ``x`` to ``ys``; ``form`` is what the network returns, with their places for tensors."""

    x: Value
    ys: list[Value]
    form: Any
    operations: list[Operation] = field(default_factory=list)

    def reads_parameters(self) -> bool:
        """Whether every constant is a parameter's memory, so that layers made again have what was written there."""
        computed = [operation for operation in self.operations if operation.result.constant is not None]
        return all(any(_storage(arg) == _storage(operation.result) for arg in operation.args) for operation in computed)

    def signature(self) -> list[tuple]:
        """What was done to what, without the sizes of images: equal for recordings that one plan can serve."""
        order = {self.x: 0} | {operation.result: index + 1 for index, operation in enumerate(self.operations)}

        def told(arg: Any) -> Any:
            if not isinstance(arg, Value):
                return tuple(map(told, arg)) if isinstance(arg, list) else arg
            return order[arg] if arg in order else (arg.name, None if arg.constant is None else arg.constant.data_ptr())

        found = []
        for operation in self.operations:
            reshapes = operation.target.split(".")[1] in _RESHAPES
            args = [arg for arg in operation.args if isinstance(arg, (Value, float)) or not reshapes]
            found.append((operation.target, len(operation.result.shape), *map(told, args)))
        return [*found, (*(order[y] for y in self.ys), self.form)]


def _storage(value: Any) -> int | None:
    constant = value.constant if isinstance(value, Value) else None
    return None if constant is None else constant.untyped_storage().data_ptr()


def _in_order(func: Any, args: tuple, kwargs: dict) -> list:
    """The arguments of a call, in its schema's order with the defaults of those not given."""
    further = func._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in further)]


def _holds_tensors(args: tuple) -> bool:
    return any(isinstance(each, Tensor) for arg in args if isinstance(arg, list | tuple) for each in arg)


class _Recorder(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.x: Value | None = None
        self.operations: list[Operation] = []
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.constants: dict[int, Value] = {}
        self.in_storage: dict[int, set[int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and its wrapper would import the compiler: 1.3 s of the first freeze

    def value(self, tensor: Tensor) -> Value:
        found = self.values.get(id(tensor)) or self.constants.get(id(tensor))
        if found is None:
            found = Value(tuple(tensor.shape), tensor.detach(), self.names.get(id(tensor), "a constant"))
            self.constants[id(tensor)] = found
            self.alive.append(tensor)
        return found

    def operand(self, arg: Any) -> Any:
        """An argument with values for its tensors."""
        if isinstance(arg, (list, tuple)):
            return [self.value(each) if isinstance(each, Tensor) else each for each in arg]
        return self.value(arg) if isinstance(arg, Tensor) else arg

    def split(self, pieces: Sequence[Tensor], x: Tensor, _: Any, dim: int) -> None:
        """Each piece as a slice."""
        source, begin = self.value(x), 0
        of = None if source.constant is None else source
        for piece in pieces:
            args = (source, dim, begin, begin := begin + piece.shape[dim], 1)
            self.operations.append(Operation("aten.slice.Tensor", args, self.produce(piece, of)))

    def produce(self, tensor: Tensor, of: Value | None = None) -> Value:
        """A value between operations, or one computed of constants alone."""
        value = self.values[id(tensor)] = Value(tuple(tensor.shape))
        if of is not None:
            value.constant, value.name = tensor.detach(), of.name
        self.keep(tensor)
        return value

    def keep(self, tensor: Tensor) -> None:
        self.alive.append(tensor)
        self.in_storage.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, run = kwargs or {}, func
        if func.namespace == "profiler":  # a name for what runs, as DataParallel and users give it
            return func(*args, **kwargs)
        if func.namespace == "fastres":  # computed by its definition: no backend prepares weights for a single call
            run = REGISTRY[func._schema.name.removeprefix("fastres::")].reference
        out = run(*args, **kwargs)
        target = str(func)
        first, *others = out if isinstance(out, (tuple, list)) else (out,)
        if not isinstance(first, Tensor):
            raise UnsupportedError(f"fastres.freeze: the network reads a value ({target}), which a plan cannot follow")
        if target in _PASSED:
            self.values[id(first)] = self.value(args[0])
            self.keep(first)
            return out
        if target in _SPLITS:
            self.split(out, *_in_order(func, args, kwargs))
            return out
        operands = tuple(map(self.operand, _in_order(func, args, kwargs)))
        computed = any(value.constant is None for value in values_in(operands))
        if computed and first.is_floating_point() and first.dtype != self.alive[0].dtype:
            raise UnsupportedError(f"fastres.freeze: the network changes dtype to {first.dtype} ({target})")
        if func._schema.is_mutable:
            self.refuse_shared_write(args[0], target)
        constant = next(iter(values_in(operands)), None)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        of = None if computed or is_random or func._schema.is_mutable or _holds_tensors(args) else constant
        self.operations.append(Operation(target, operands, self.produce(first, of)))
        for other in others:
            if isinstance(other, Tensor):
                self.produce(other, of)
        return out

    def refuse_shared_write(self, tensor: Tensor, target: str) -> None:
        written = self.values.get(id(tensor))
        if written in (None, self.x) or written.constant is not None:
            raise UnsupportedError(f"fastres.freeze: the network writes into its input or its parameters ({target})")
        if len(self.in_storage.get(tensor.untyped_storage().data_ptr(), ())) > 1:
            raise UnsupportedError(f"fastres.freeze: the network writes into memory that a view shares ({target})")


def record(model: nn.Module, example: Tensor) -> Recording:
    """Run the model once, in evaluation and without autograd, and list its operations.

    Raises:
        UnsupportedError: it returns anything but tensors, or does what a plan cannot.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    recorder = _Recorder(names)
    modes = [(module, module.training) for module in model.modules() if module.training]
    try:
        for module, _ in modes:
            module.training = False
        with torch.inference_mode(False), torch.no_grad():  # in inference mode other operations would be recorded
            x = example.detach().clone()
            start = recorder.x = recorder.produce(x)
            with torch.autocast(x.device.type, enabled=False), recorder:  # what the caller casts is not the model's doing
                y = model(x)
    finally:
        for module, training in modes:
            module.training = training
    leaves, structure = tree_flatten(y)
    for leaf in leaves or [y]:
        if not isinstance(leaf, Tensor) or id(leaf) not in recorder.values:
            what = type(leaf).__name__ if not isinstance(leaf, Tensor) else "one that does not depend on the input"
            raise UnsupportedError(f"fastres.freeze: the network must return tensors, alone or in containers, got {what}")
    form = tree_unflatten(range(len(leaves)), structure)
    return Recording(start, [recorder.values[id(leaf)] for leaf in leaves], form, recorder.operations)
