"""Batch norm folded into copies of convolution weights, kept until a parameter changes; the originals stay untouched.

conv(x, w, b) normalised is conv(x, w * s, (b - mean) * s + bias) with s = bn_weight / sqrt(var + eps), one s per output
channel (Jacob et al. 2018, section 3.2). s in float64, the product in fp32 (fp64 for fp64 weights).

A fold is valid while every tensor it came from keeps its storage and its version counter, which all in-place operations,
optimizers and load_state_dict advance; for fused optimizers, which do not, ``watch_optimizers`` does. Writes through
``tensor.data`` do not: call ``fastres.refresh()`` after those.

Captured graphs read a fold where it lies. Those of parameters given to ``keep`` stay there: after a change the next call
that asks for one rewrites it in place.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_lock = threading.Lock()
_entries: dict[tuple[int, int], "_Entry"] = {}


class _Entry:
    """One convolution with one batch norm: what it was folded from, and each backend's finished form."""

    def __init__(self, parameters: tuple[Tensor | None, ...], eps: float, anchor: weakref.ref) -> None:
        self.anchor, self.eps, self.kept = anchor, eps, False
        self.forms: dict[Hashable, Any] = {}
        self.stale: set[Hashable] = set()  # forms of a kept one to be rewritten
        self.read(parameters)

    def read(self, parameters: tuple[Tensor | None, ...]) -> None:
        """Take the parameters as they are now for what the forms are made from."""
        self.stale = set(self.forms)
        # Aliases keep the storages alive, so that an address in use again cannot pass for the old tensor.
        self.sources = tuple(None if p is None else (p.detach(), p._version, p.data_ptr()) for p in parameters)

    def holds(self, parameters: tuple[Tensor | None, ...], eps: float) -> bool:
        if eps != self.eps:
            return False
        for parameter, source in zip(parameters, self.sources, strict=True):
            if parameter is None or source is None:
                if parameter is not source:
                    return False
            elif parameter._version != source[1] or parameter.data_ptr() != source[2]:
                return False
        return True


def _drop(key: tuple[int, int], _: weakref.ref) -> None:
    _entries.pop(key, None)


@functools.cache
def watch_optimizers() -> None:
    """From now on count up the versions of what fused optimizers change: their kernels do not."""
    register_optimizer_step_post_hook(_count_fused)


def _count_fused(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    fused = (group["params"] for group in optimizer.param_groups if group.get("fused"))
    torch.autograd.graph.increment_version([p for parameters in fused for p in parameters if p.grad is not None])


def fold(parameters: Sequence[Any], eps: float) -> tuple[Tensor, Tensor]:
    """The folded weight and bias, always new tensors, of weight, bias, bn_weight, bn_bias, mean and var."""
    weight, bias, bn_weight, bn_bias, mean, var = parameters
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False), torch.no_grad():
        scale = torch.rsqrt(var.double() + eps)
        if bn_weight is not None:
            scale = scale * bn_weight.double()
        shift = -mean.double() if bias is None else bias.double() - mean.double()
        shift = shift * scale
        if bn_bias is not None:
            shift = shift + bn_bias.double()
        return weight.to(dtype) * scale.to(dtype).view(-1, 1, 1, 1), shift.to(dtype)


def folded(parameters: tuple[Any, ...], eps: float, form: Hashable, finish: Callable[[Tensor, Tensor], Any]) -> Any:
    """``finish(folded weight, folded bias)``, computed once per form until one of the parameters changes.

    Args:
        parameters: weight, bias, bn_weight, bn_bias, mean, var.
        form: names what finish makes of the fold, among all callers.
    """
    weight, mean = parameters[0], parameters[4]
    if any(p is not None and p.is_inference() for p in parameters):  # their changes cannot be seen: fold every time
        return finish(*fold(parameters, eps))
    key = (id(weight), id(mean))
    entry = _entries.get(key)
    if entry is not None and entry.kept and entry.anchor() is weight:
        if not entry.holds(parameters, eps):
            entry.read(parameters)
    elif entry is None or entry.anchor() is not weight or not entry.holds(parameters, eps):
        watch_optimizers()
        entry = _Entry(parameters, eps, weakref.ref(weight, functools.partial(_drop, key)))
        with _lock:
            _entries[key] = entry
    result = entry.forms.get(form)
    if result is None:
        result = entry.forms[form] = finish(*fold(parameters, eps))
    elif form in entry.stale:
        _rewrite(result, finish(*fold(parameters, eps)))
        entry.stale.discard(form)
    return result


def keep(parameters: tuple[Any, ...], eps: float) -> None:
    """Keep the folds of these parameters, in whatever forms and wherever they then lie, until the weight dies."""
    weight, mean = parameters[0], parameters[4]
    key = (id(weight), id(mean))
    entry = _Entry(parameters, eps, weakref.ref(weight, functools.partial(_drop, key)))
    entry.kept = True
    with _lock:
        _entries[key] = entry


def _rewrite(old: Any, new: Any) -> None:
    """Tensors in place, in whatever holds them."""
    if isinstance(old, Tensor):
        old.copy_(new)
    elif isinstance(old, tuple):
        for one, other in zip(old, new, strict=True):
            _rewrite(one, other)
    else:  # an object of a backend on the CPU, where no graph reads
        vars(old).update(vars(new))


def forget(parameters: Iterable[Tensor] | None = None) -> None:
    """Drop the folds of these convolution weights, or all; those that are kept stay."""
    with _lock:
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        for key in list(_entries):  # a copy, of keys alone: weights that die meanwhile, or while it is made, drop theirs
            entry = _entries.get(key)
            if entry is not None and not entry.kept and (wanted is None or key[0] in wanted):
                _entries.pop(key, None)


def forget_statistics(mean: Tensor | None) -> None:
    """Fold anew where these running statistics are the batch norm's: something wrote them that no version tells of."""
    with _lock:
        for key in [key for key in _entries if key[1] == id(mean)]:
            entry = _entries.get(key)
            if entry is not None and entry.kept:
                entry.stale = set(entry.forms)
            else:
                _entries.pop(key, None)
