"""Parameters in another memory format or dtype, and back: the same bits, unless they were written in between.

Gradients and the state of fused optimizers follow the memory format: the optimizers' kernels walk through memory in order, and
would otherwise mix up weights.
"""

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_followed: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()  # states laid out as their parameters


@dataclass
class Conversion:
    """One parameter or buffer: where it lives, what it held, and the mark of what it was converted to."""

    owner: nn.Module
    name: str
    original: Tensor | None  # None: only the memory format changed
    mark: tuple[Any, ...]

    def undo(self) -> None:
        """Put the original back; a value written since is kept, in the original's dtype or contiguous."""
        tensor: Any = self.owner._parameters.get(self.name)
        is_parameter = tensor is not None
        tensor = tensor if is_parameter else self.owner._buffers.get(self.name)
        if tensor is None:
            return
        if self.original is None:
            _lay(tensor, torch.contiguous_format)
            return
        new = self.original if _mark(tensor) == self.mark else tensor.data.to(self.original.dtype)
        if is_parameter:
            tensor.data = new
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.data.to(new.dtype)
        else:
            self.owner._buffers[self.name] = new


def _mark(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _tensors(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer, with the module that holds it and its name there."""
    found = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            found += [(module, name, tensor) for name, tensor in table.items() if tensor is not None]
    return found


def cast(model: nn.Module, dtype: torch.dtype) -> list[Conversion]:
    """``model.to(dtype)``, which can be undone."""
    before = [
        (owner, name, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)
        for owner, name, tensor in _tensors(model)
        if tensor.is_floating_point() and tensor.dtype != dtype
    ]
    model.to(dtype)
    made = []
    for owner, name, original in before:
        table = owner._parameters if name in owner._parameters else owner._buffers
        made.append(Conversion(owner, name, original, _mark(table[name])))
    return made


def to_channels_last(model: nn.Module) -> list[Conversion]:
    """4-D parameters in channels_last, as ``model.to(memory_format=torch.channels_last)`` has them."""
    made = []
    for owner, name, tensor in _tensors(model):
        if not isinstance(tensor, nn.Parameter) or tensor.dim() != 4 or not tensor.is_contiguous():
            continue
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            _lay(tensor, torch.channels_last)
            made.append(Conversion(owner, name, None, ()))
    return made


def _lay(parameter: Tensor, layout: torch.memory_format) -> None:
    """Bring a parameter and its gradient to a memory format."""
    with torch.inference_mode(parameter.is_inference()):  # it may be trained later, even where that is on now
        parameter.data = parameter.data.contiguous(memory_format=layout)
    if parameter.grad is not None:
        parameter.grad.data = parameter.grad.data.contiguous(memory_format=layout)
    _watch_optimizers()
    _followed.clear()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_follow)


def _follow(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Bring the state of a fused optimizer, also that from ``load_state_dict``, to its parameters' memory format."""
    state = optimizer.state
    if torch.compiler.is_compiling() or _followed.get(optimizer) is state:
        return
    _followed[optimizer] = state
    for parameter in (p for group in optimizer.param_groups if group.get("fused") for p in group["params"]):
        kept = state.get(parameter, {})
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
