"""class Op: the one place that knows torch.library, autograd and the cost of a Python call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastres import dispatch
from fastres.dispatch import Backend, Choice
from fastres.errors import UnsupportedError

_LIBRARY = torch.library.Library("fastres", "DEF")
_MAX_CHOICES = 4096  # per op, then dropped, so that ever-changing shapes cannot grow memory without bound

_SCALARS = frozenset((str, int, float, bool, tuple, type(None)))

REGISTRY: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, for tests, benchmarks and tuning; ``label`` says what is special about it."""

    label: str
    args: tuple


class Op:
    """One public op ``torch.ops.fastres.<name>``: schema, checks, fake, autograd, samples, cost and backends.

    Called directly it takes an eager shortcut past PyTorch's dispatcher, where nothing could tell the difference: no
    compilation, no mode, no transform, plain tensors. The backend is looked up by the arguments' dtypes, devices,
    shapes, strides and flags; ``dispatch`` chooses it the first time a combination is seen.

    Args:
        name, schema: the op and its TorchScript schema without the name, ``"(Tensor x) -> Tensor"``.
        reference: plain PyTorch; the last backend, which accepts everything.
        check: raises on wrong arguments before any memory is touched; runs once per combination and in the fake.
        fake: shapes, dtypes and strides of the outputs.
        samples: ``samples(device, dtype) -> list[Sample]``.
        cost: ``cost(*args) -> (bytes, flops)``.
        backends: in order of preference, without the reference.
        setup_context, backward: as for ``torch.library.register_autograd``; None for an op without gradient.
        fallback: other ops that callers run where ``falls_back`` says so; tuning times the kernels against it.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable,
        check: Callable,
        fake: Callable,
        samples: Callable[[torch.device, torch.dtype], list[Sample]],
        cost: Callable[..., tuple[int, int]],
        backends: Sequence[Backend] = (),
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        fallback: Callable | None = None,
    ) -> None:
        self.name, self.schema, self.reference, self.check = name, schema, reference, check
        self.samples, self.cost, self.fallback = samples, cost, fallback
        self.backends = (*backends, Backend("torch", lambda *args: None, lambda: reference))
        self.differentiable = backward is not None
        self.setup_context, self.backward = setup_context, backward
        self._choices: dict[tuple, Callable] = {}
        self._names: dict[tuple, str] = {}
        dispatch.register(name, self.backends, self._choices, self._names)
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._from_dispatcher, "CompositeExplicitAutograd")

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        torch.library.register_fake(f"fastres::{name}", checked_fake, lib=_LIBRARY)
        self._function = None
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(f"fastres::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
            self._function = _eager_function(name, setup_context, backward)
        self._packet = getattr(torch.ops.fastres, name).default
        REGISTRY[name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._packet(*args)
        key, plain, needs_grad = signature(args)
        if not plain or is_interposed():
            if not any(isinstance(arg, torch.fx.Proxy) for arg in args):
                self.check(*args)
                if is_differentiated():
                    return self.reference(*args)
            return self._packet(*args)
        run = self._choices.get(key) or self._choose(key, args)
        if needs_grad and torch.is_grad_enabled():
            return self._packet(*args) if self._function is None else self._function.apply(*args, run)
        return run(*args)

    def by(self, run: Callable | None, *args: Any, then: Callable[..., None] | None = None) -> Any:
        """The call with ``run`` in place of the chosen backend's function: for callers who know part of the outputs. The chosen
        one runs where ``run`` is None, and where something other than autograd must see the op.

        ``then`` gets the outputs before autograd keeps anything: a checkpoint ends a forward that it repeats there, once it has
        all that it needs, and PyTorch's batch norm has updated its buffers by then.
        """
        compiling = torch.compiler.is_compiling()
        key, plain, needs_grad = ((), False, False) if compiling else signature(args)
        if not plain or _is_transformed():
            return _followed_by(then, self)(*args)
        chosen = self if has_modes() else run or self._choices.get(key) or self._choose(key, args)
        run = _followed_by(then, chosen)
        if needs_grad and self._function is not None and torch.is_grad_enabled():
            return self._function.apply(*args, run)
        return run(*args)

    def call_split(self, *args: Any, run: Callable | None = None, then: Callable[..., None] | None = None) -> Any:
        """The outputs, with the first one as two tensors that share memory: their gradients reach ``backward`` separately, as
        ``grad_y`` and ``grad_y2``, and a kernel adds them as it reads them, instead of autograd in a pass of its own.

        Each of the two gets only its part of the gradient, so the caller must not let others see them. None where there is no
        gradient, or something other than autograd follows the call. ``run`` and ``then`` as in ``by``.
        """
        if torch.compiler.is_compiling() or is_interposed() or not torch.is_grad_enabled():
            return None
        key, plain, needs_grad = signature(args)
        if not plain or not needs_grad:
            return None
        run = _followed_by(then, run or self._choices.get(key) or self._choose(key, args))
        return self._function_split.apply(*args, run)

    @functools.cached_property
    def _function_split(self) -> Any:
        assert self.setup_context is not None and self.backward is not None
        return _function_split(self.name, self.setup_context, self.backward)

    def _from_dispatcher(self, *args: Any) -> Any:
        args = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args)
        if forward_ad._current_level >= 0:  # torch.library has no such derivatives, and says nothing
            raise UnsupportedError(
                f"torch.ops.fastres.{self.name} has no forward-mode derivative (call fastres.functional, which gives PyTorch's)"
            )
        return self.chosen(*args)(*args)

    def chosen(self, *args: Any) -> Callable:
        """The function that runs these arguments."""
        key, _, _ = signature(args)
        return self._choices.get(key) or self._choose(key, args)

    @property
    def parameters(self) -> list[str]:
        """Names of the arguments, in order."""
        return [argument.name for argument in self._packet._schema.arguments]

    def _choose(self, key: tuple, args: tuple) -> Callable:
        run = self.explain(*args).load()
        if len(self._choices) >= _MAX_CHOICES:
            self._choices.clear()
        self._choices[key] = run
        return run

    def backend(self, *args: Any) -> str:
        """The name of the backend that these arguments get."""
        key, plain, _ = signature(args)
        name = self._names.get(key) if plain else None
        if name is None:
            name = self.explain(*args).backend.name
            if plain:
                if len(self._names) >= _MAX_CHOICES:
                    self._names.clear()
                self._names[key] = name
        return name

    def falls_back(self, *args: Any) -> bool:
        """Whether no kernel is chosen for these arguments; raises what the op's check does."""
        key, plain, _ = signature(args)
        if not plain:
            self.check(*args)
        return not plain or (self._choices.get(key) or self._choose(key, args)) is self.reference

    def explain(self, *args: Any) -> Choice:
        """The backend these arguments get, what decided, and why the others were passed over."""
        self.check(*args)
        return dispatch.choose(self.name, self.backends, args)


def signature(args: tuple) -> tuple[tuple, bool, bool]:
    """Everything in a call that a choice may depend on; whether its tensors are plain; whether one requires grad."""
    key: list[Any] = []
    plain, needs_grad = True, False
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter or (kind not in _SCALARS and isinstance(arg, Tensor)):
            if kind is not Tensor and kind is not Parameter:
                plain = False
            if arg.layout is not torch.strided or arg.is_nested:
                plain = False
                key.append(arg.layout)  # the check refuses it: no choice is ever kept for such a key
                continue
            key.append((arg.dtype, arg.device, arg.shape, arg.stride()))
            if arg.requires_grad:
                needs_grad = True
        elif kind is tuple:
            key += (arg, len(arg) == 2 and type(arg[0]) is type(arg[1]) is int)
        elif kind in _SCALARS:
            key += (kind, arg)  # True and 1.0 equal 1, which an argument, or an item of a pair above, may not be
        else:
            plain = False
    return tuple(key), plain, needs_grad


class Once:
    """A check that a combination of arguments (dtypes, devices, shapes, strides, flags) need pass only once."""

    def __init__(self, check: Callable[..., None]) -> None:
        self.check = check
        self._passed: set[tuple] = set()

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():  # else the graph would be guarded by the set of what passed, which grows
            self.check(*args)
            return
        key, plain, _ = signature(args)
        if plain and key in self._passed:
            return
        self.check(*args)
        if plain:
            if len(self._passed) >= _MAX_CHOICES:
                self._passed.clear()
            self._passed.add(key)


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def has_modes() -> bool:
    """Whether a mode must see the call; that of ``torch.set_default_device`` only concerns new tensors."""
    if _dispatch_modes():
        return True
    return bool(_function_modes()) and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def is_interposed() -> bool:
    """Whether a mode, a functorch transform or forward-mode differentiation must see the call."""
    return has_modes() or _is_transformed()


def _is_transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation must see the call: the ops' own Functions refuse both."""
    return bool(_transforms()) or forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """Whether derivatives are taken that only PyTorch's own operations have: forward-mode ones, which an op would drop without
    a word, and those of torch.func."""
    if forward_ad._current_level >= 0:
        return True
    return bool(_transforms()) and any(level.key() in _DERIVATIVES for level in get_interpreter_stack() or ())


def _followed_by(then: Callable[..., None] | None, run: Callable) -> Callable:
    """``run``, whose outputs go to ``then`` as well."""
    if then is None:
        return run

    def both(*args: Any) -> Any:
        outputs = run(*args)
        then(*outputs)
        return outputs

    return both


def _eager_function(name: str, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The op's autograd formula as a Function, whose call costs a third of the registered one's.

    Its last argument is the backend's function, already chosen.
    """

    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, run = args
            ctx.set_materialize_grads(False)  # statistics have none: zeros would be allocated for them
            outputs = run(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple:
            if grads[0] is None:  # y's: nothing flows back
                return (None,) * len(ctx.needs_input_grad)
            return *backward(ctx, *grads), None

    EagerFunction.__name__ = EagerFunction.__qualname__ = f"fastres_{name}"
    return EagerFunction


def _function_split(name: str, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The same with the first output twice, whose gradients ``backward`` gets separately."""
    whole: Any = _eager_function(name, setup_context, backward)

    class FunctionInTwo(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            y, *others = whole.forward(ctx, *args)
            return y, y.detach(), *others

        @staticmethod
        def backward(ctx: Any, grad_y: Any, grad_y2: Any, *others: Any) -> Any:
            if grad_y is None:
                grad_y, grad_y2 = grad_y2, None
            if grad_y is None:
                return (None,) * len(ctx.needs_input_grad)
            return *backward(ctx, grad_y, *others, grad_y2=grad_y2), None

    FunctionInTwo.__name__ = FunctionInTwo.__qualname__ = f"fastres_{name}_in_two"
    return FunctionInTwo
