"""Calls of kernels, recorded while Python runs as usual and then repeated without Python's choices, checks and formulas.

A recorder sees what reaches the kernels. Another call with tensors of the same kind (dtypes, devices, shapes, strides; the
caller guarantees that) needs the same kernels in the same order, until ``dispatch.forget`` is called. Where layers are small,
what is left out takes most of their time.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops._op import REGISTRY
from fastres.ops.conv_statistics import CONV_STATISTICS

_aten = torch.ops.aten
# PyTorch's operations that can be repeated, and the quickest way to call each.
_KNOWN: dict[Any, Callable] = {
    _aten.convolution.default: torch.convolution,
    _aten.convolution_backward.default: _aten.convolution_backward.default,
    _aten._to_copy.default: _aten._to_copy.default,
    _aten.clone.default: torch.clone,
    _aten.sum.dim_IntList: torch.sum,
}


class Unrecorded(Exception):
    """The calls must run without a recorder; the text says why."""


class _Call(NamedTuple):
    run: Callable
    args: list[Any]
    made: list[int]  # numbers of the results
    is_one: bool


class Recording:
    """The calls, on a list of values: the inputs, then constants, then the results of each call."""

    def __init__(self, calls: Sequence[tuple], constants: Sequence[Any], outputs: Sequence[int]) -> None:
        self._calls, self._constants, self._outputs = calls, constants, _getter(outputs)

    def __call__(self, inputs: Sequence[Any]) -> tuple:
        """The outputs for other inputs of the same kind."""
        values = [*inputs, *self._constants]
        for run, arguments, is_one, done in self._calls:
            found = run(*arguments(values))
            if is_one:
                values.append(found)
            else:
                values += found
            for place in done:
                values[place] = None
        return self._outputs(values)


class Recorder(TorchDispatchMode):
    """Records the calls made while it is entered; ``why_not`` says why they cannot be repeated, None where they can."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.why_not: str | None = None
        self._inputs = len(inputs)
        self._calls: list[_Call] = []
        self._unseen: list[Any] = []
        self._values: list[Any] = list(inputs)  # kept, so that no id is used twice
        self._numbers = {id(value): number for number, value in enumerate(inputs) if value is not None}
        if len(self._numbers) < sum(value is not None for value in inputs):
            self.why_not = "a tensor is given twice"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _KNOWN.get(func)
        if func.namespace == "fastres":
            args = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args)
            name = func._schema.name.removeprefix("fastres::")
            run = REGISTRY[name].chosen(*args)
            if name == CONV_STATISTICS.name:
                raise Unrecorded("a batch norm uses statistics that the preceding convolution found")
        if run is None:  # such as a check's; a problem only if its results are read, or if it writes
            if func._schema.is_mutable:
                self.why_not = f"{func} writes, and is not one of the calls that can be repeated"
            found = func(*args, **kwargs or {})
            self._unseen.append(found)  # kept, as all are
            return found
        if kwargs:
            run = functools.partial(run, **kwargs)
        found = run(*args)
        is_one = not isinstance(found, (tuple, list))
        results = [found] if is_one else found
        numbers = range(len(self._values), len(self._values) + len(results))
        self._numbers.update({id(value): number for value, number in zip(results, numbers, strict=True) if value is not None})
        self._values += results
        self._calls.append(_Call(run, list(args), [*numbers], is_one))
        return found

    def recording(self, outputs: Sequence[Tensor]) -> Recording | None:
        """The recording that makes these tensors; None where the recorder did not see how they, or their inputs, were made."""
        if any(id(tensor) not in self._numbers for tensor in outputs):
            self.why_not = self.why_not or "a result was not computed by a recorded call"
        if self.why_not is not None:
            return None
        constants: list[Any] = []
        read: list[list[int]] = []  # of each call, the numbers of its arguments; constants count down from -1
        for call in self._calls:
            numbers = []
            for arg in call.args:
                if isinstance(arg, Tensor) and id(arg) not in self._numbers:
                    self.why_not = "a call reads a tensor that no recorded call computed"
                    return None
                if isinstance(arg, Tensor):
                    numbers.append(self._numbers[id(arg)])
                else:
                    constants.append(arg)
                    numbers.append(-len(constants))
            read.append(numbers)

        def place(number: int) -> int:
            if number < 0:
                return self._inputs - 1 - number
            return number if number < self._inputs else number + len(constants)

        leaving = {self._numbers[id(tensor)] for tensor in outputs}
        last = {number: at for at, numbers in enumerate(read) for number in (*numbers, *self._calls[at].made)}
        ended: list[list[int]] = [[] for _ in self._calls]
        for number, at in last.items():
            if number >= self._inputs and number not in leaving:
                ended[at].append(place(number))
        calls = [
            (call.run, _getter([place(number) for number in numbers]), call.is_one, tuple(done))
            for call, numbers, done in zip(self._calls, read, ended, strict=True)
        ]
        return Recording(calls, constants, [place(self._numbers[id(tensor)]) for tensor in outputs])


def _getter(places: Sequence[int]) -> Callable[[list], tuple]:
    """A function that picks the values in these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
