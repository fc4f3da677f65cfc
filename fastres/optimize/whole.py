"""Runs an optimised model in evaluation as one native plan while it is unchanged. Where the whole model cannot be planned, each
of its largest parts that can be has a plan of its own: a backbone, a head, a stage.

Used for calls without autograd on a plain CPU tensor of the model's dtype, outside modes, transforms and torch.compile, and
with no backend forced. Unchanged means: every module's attributes, children, parameters, buffers and hooks, and the forward of
its class, are the same objects as when the plan was made. The plan takes over what is written to parameters and buffers; after
any other change a new plan is made. The model's Python runs once for every new image size, and both for one image and for
several: the plan is used only where the model executes the same operations. As everywhere in ``optimize``, Python whose effects
could get lost is not planned.
"""

import threading
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map

from fastres import dispatch
from fastres.errors import ArgumentError, UnsupportedError, is_out_of_memory
from fastres.frozen import Frozen, freeze
from fastres.frozen.base import NotFinite, layers_of
from fastres.frozen.record import Recording, record
from fastres.nn import _fused
from fastres.nn._plain import has_hooks, original_class
from fastres.ops import _fold
from fastres.ops._op import has_modes
from fastres.optimize.trace import CannotTrace, is_plain_mapping, is_trusted, read

STATE = "_fastres"  # of an instance: what swapping it added, a network's plan with it
_KEPT = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RAISED = "it raised"
_KINDS = 256  # of input that are remembered
_MOST_LOOKS = 9  # that are counted: 64 calls then go by without one


class _Made:
    """A plan with what it was made from."""

    def __init__(self, model: nn.Module, plan: Frozen | None, reason: str | None, by_values: bool) -> None:
        self.plan, self.reason = plan, reason
        self.by_values = by_values  # whether the values of weights are the reason that there is no plan
        self.looks = self.trusted = 0  # at why there is no plan, and calls until the next one
        self.recording: Recording | None = None  # once parameters were written to
        self.serves: dict[tuple[int, ...], bool] = {}  # whether the plan does what the network does, by kind of input
        own, *self.dicts = (state for module in model.modules() for state in _dicts(module))
        self.ids = self.identities(own)
        self.mappings = [(value, dict(value)) for module in model.modules() for value in _mappings(module)]
        # Alive, so that no id is reused; but not what holds this plan, or the network would only die with the next collection.
        self.objects = [value for name, value in own.items() if name != STATE]
        self.objects += chain.from_iterable(state.values() for state in self.dicts)
        _fold.watch_optimizers()
        tensors = (*model.parameters(), *model.buffers())
        self.tensors = [tensor for tensor in tensors if not tensor.is_inference()]  # all, where there is a plan
        self.marks = self.now()
        kinds: set[Any] = set(map(type, model.modules()))
        self.forwards = {kind: kind.forward for kind in kinds}

    def now(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self.tensors]

    def identities(self, own: dict[str, Any]) -> list[int]:
        return list(map(id, chain(own.values(), chain.from_iterable(state.values() for state in self.dicts))))

    def holds(self, model: nn.Module) -> bool:
        if any(kind.forward is not forward for kind, forward in self.forwards.items()):
            return False
        if any(mapping != before for mapping, before in self.mappings):
            return False
        return self.identities(model.__dict__) == self.ids and (self.now() == self.marks or self._takes_writes(model))

    def _takes_writes(self, model: nn.Module) -> bool:
        """Whether the plan could take over what was written to the same memory; where there is none, that stays so."""
        marks = self.now()
        if self.by_values or [mark[1] for mark in marks] != [mark[1] for mark in self.marks]:
            return False
        if self.plan is None:
            self.marks = marks
            return True
        assert self.plan.images is not None
        if self.recording is None:
            found = _recorded(model, torch.zeros(self.plan.images, dtype=self.plan.dtype, device="cpu"))
            if found is None or not found.reads_parameters() or found.signature() != self.plan.signature:
                return False
            self.recording = found
        try:
            self.plan.take(layers_of(self.plan.name, self.recording))
        except NotFinite:
            return False
        self.marks = marks
        return True


def _dicts(module: nn.Module) -> Iterator[dict[str, Any]]:
    state = module.__dict__
    yield state
    yield from (state[name] for name in (*_KEPT, *_HOOKS))


def _mappings(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Dicts of plain values that a forward may read, and others may write to."""
    return (value for name, value in module.__dict__.items() if name not in _KEPT and is_plain_mapping(value))


_all: weakref.WeakSet["Whole"] = weakref.WeakSet()


def forget_all() -> None:
    """Drop the plans of all networks."""
    for whole in list(_all):
        whole.forget()


class Whole:
    """The plan of one network, or of a part of one; copies and pickles leave it behind."""

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._lock = threading.RLock()
        _all.add(self)

    def forget(self) -> None:
        self._made = None

    def run(self, model: nn.Module, x: Tensor, channels_last: bool) -> Any:
        """The network's answer, in channels_last only if it may be or x is; None where its modules must run."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _why_not_call(x) is not None:
            return None
        made = self._current(model, x)
        plan = made.plan
        if plan is None or x.dtype != plan.dtype or x.shape[1] != plan.network.channels or not self._serves(made, model, x):
            return None
        try:
            y = plan(x)
        except ArgumentError:
            return None  # the modules raise PyTorch's own error
        if channels_last or x.is_contiguous(memory_format=torch.channels_last):
            return y
        return tree_map(Tensor.contiguous, y)

    def why_not(self, model: nn.Module, x: Tensor) -> str | None:
        """Why the modules run one by one; None where the plan runs."""
        if torch.is_grad_enabled():
            return "autograd is on; without it an unchanged network on a CPU runs as one plan"
        reason = _why_not_call(x)
        if reason is None:
            made = self._current(model, x, True)
            reason = made.reason
            if reason is None and not self._serves(made, model, x):
                reason = "at this input size the model executes different operations than at the size it was planned for"
        return reason

    def _serves(self, made: _Made, model: nn.Module, x: Tensor) -> bool:
        kind = _kind(x)
        if kind not in made.serves:
            if len(made.serves) >= _KINDS:
                made.serves.clear()
            found = None if made.plan is None else _recorded(model, x)
            made.serves[kind] = made.plan is not None and found is not None and found.signature() == made.plan.signature
        return made.serves[kind]

    def _current(self, model: nn.Module, x: Tensor, look: bool = False) -> _Made:
        """What holds now. That there is no plan is looked at less often in the long run: in a network of many small modules it
        takes a fifth of a call, and until the next look its modules run one by one, as they always may."""
        with self._lock:
            made = self._made
            if made is not None and made.trusted > 0 and not look:
                made.trusted -= 1
            elif made is None or not made.holds(model):
                made = _make(model, x)
                self._made = None if made.reason is not None and made.reason.startswith(_RAISED) else made
            elif made.plan is None and not made.by_values:
                made.looks = min(made.looks + 1, _MOST_LOOKS)
                made.trusted = 2**made.looks // 8
        return made


def _why_not_call(x: Any) -> str | None:
    if type(x) is not Tensor or x.device.type != "cpu" or x.dim() != 4 or x.numel() == 0:
        return "the input is not a plain batch of images on the CPU"
    if has_modes() or _fused.is_followed(x):
        return "a mode, a transform or a tracer is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses dtypes op by op"
    if dispatch.is_forced():
        return "a backend is forced"
    return None


def _why_unread(module: nn.Module) -> str | None:
    """Why a forward might have effects that a plan would lose."""
    base = original_class(module)
    if "forward" in module.__dict__:
        return "it has a forward of its own on the instance"
    if is_trusted(base.forward):
        return None
    try:
        read(module, base, False)
    except CannotTrace as error:
        return str(error)
    return None


def _kind(x: Tensor) -> tuple[int, ...]:
    return min(x.shape[0], 2), *x.shape[1:]


def _recorded(model: nn.Module, x: Tensor) -> Recording | None:
    """What the network does to such an input; None where it cannot be told."""
    try:
        return record(model, x.detach()[:2].clone())
    except Exception as error:  # the network's own, on this input: its modules raise it again
        if is_out_of_memory(error):
            raise
        return None


def _make(model: nn.Module, x: Tensor) -> _Made:
    reason, by_values = _why_not_model(model), False
    plan = None
    if reason is None:
        try:
            plan = freeze(model, x.detach()[:2].clone())
        except (ArgumentError, UnsupportedError) as error:
            reason, by_values = str(error).partition(": ")[2], isinstance(error, NotFinite)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            reason = f"{_RAISED} {type(error).__name__} on this input"
    made = _Made(model, plan, reason, by_values)
    made.serves[_kind(x)] = plan is not None
    return made


def _why_not_model(model: nn.Module) -> str | None:
    if _has_any_global_hook():
        return "a global module hook is registered, which must fire"
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"{name or 'the network'} has hooks, which must fire"
        if module._compiled_call_impl is not None:
            return f"{name or 'the network'} is compiled"
        if module.training:
            return f"{name or 'the network'} is in training mode"
        if (unread := _why_unread(module)) is not None:
            return f"{name or 'the network'} ({original_class(module).__name__}): {unread}"
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return "its parameters are inference tensors, whose changes cannot be seen"
    return None
