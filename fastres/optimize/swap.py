"""The class swap: a module becomes an instance of a subclass of its own class, whose forward runs the plan.

Parameters, buffers, hooks, keys, identity and ``isinstance`` stay; so do pickling, deepcopy and ``repr``. All that the
swap adds is one entry of the instance's ``__dict__``, which ``unswap`` removes.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn import _stage
from fastres.nn._plain import ORIGINAL, has_hooks, original_class, why_not
from fastres.ops import _fold
from fastres.optimize.convert import Conversion
from fastres.optimize.plan import Plan, plan
from fastres.optimize.trace import Mappings
from fastres.optimize.whole import STATE, Whole

_transforms = torch._C._are_functorch_transforms_active


class State:
    """What a swapped module carries: its options, and its plans, which copies and pickles do not take along."""

    def __init__(self, channels_last: bool = False, whole: Whole | None = None) -> None:
        self.channels_last = channels_last
        self.whole = whole  # of the network itself, and of parts that might have a plan
        self.children: tuple[nn.Module | None, ...] | None = None  # the plans hold for these children
        self.mappings: Mappings = []  # and while these dicts equal what they held
        self.training = self.evaluation = Plan()
        self.conversions: list[Conversion] = []
        self.skip: tuple[str, ...] = ()
        self.verified: dict[str, float] | None = None

    def __deepcopy__(self, memo: dict[str, Any]) -> "State":
        return self.fresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_state, (self.channels_last, self.whole is not None)

    def fresh(self) -> "State":
        """The same options, with nothing planned yet."""
        return State(self.channels_last, None if self.whole is None else Whole())

    def prepare(self, module: nn.Module) -> None:
        """Plan both modes anew; fastres's own modules run fused steps without a plan."""
        base = original_class(module)
        if not base.__module__.startswith("fastres."):
            self.training, self.evaluation = plan(module, base, True), plan(module, base, False)
        self.children = tuple(module._modules.values())
        self.mappings = [*self.training.mappings, *self.evaluation.mappings]

    def current(self, module: nn.Module) -> Plan:
        """The plan of the module's mode, if it can run now: its children are those it was made for, and no identity that it
        skips has a hook."""
        if not torch.compiler.is_compiling() and (
            self.children != tuple(module._modules.values())
            or (self.mappings and any(now != then for now, then in self.mappings))
        ):
            self.prepare(module)
        now = self.training if module.training else self.evaluation
        if now.identities and (why_not() is not None or any(map(has_hooks, now.identities))):
            return Plan(reason="an Identity has hooks, which must fire")
        return now


def state_of(module: nn.Module) -> State | None:
    """What a swapped module carries; None for any other."""
    return module.__dict__.get(STATE)


@functools.cache
def swapped_class(base: Any) -> Any:
    """The subclass of base that runs plans."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return base.forward(self, *args, **kwargs)  # for torch.fx too, which then sees the layers it knows
        (x,) = args
        if state.whole is not None and not self.training:
            y = state.whole.run(self, x, state.channels_last)
            if y is not None:
                return y
        if state.channels_last and _has_layout(x):
            x = x.contiguous(memory_format=torch.channels_last)
        run = state.current(self).run
        if run is not None:
            return run(None, self, x)
        return _stage.run(self, x) if isinstance(self, nn.Sequential) and is_stage(self) else base.forward(self, x)

    def parts(self: nn.Module) -> Any:
        state = self.__dict__.get(STATE)
        block = None if state is None else state.current(self).block
        return None if block is None else block.parts(self)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode != self.training:
            forget(self)
        return base.train(self, mode)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name != "training":
            _forget_plan(self)
        base.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        _forget_plan(self)
        base.__delattr__(self, name)

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        reduced: Any = base.__reduce_ex__(self, protocol)
        if reduced[1][:1] != (type(self),):
            return reduced  # the class has its own way to be copied
        return (rebuild, (base,), *reduced[2:])

    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        own = self.__dict__[STATE].fresh()
        own.prepare(self)
        self.__dict__[STATE] = own

    functools.update_wrapper(forward, base.forward)
    members = {f.__name__: f for f in (train, __setattr__, __delattr__, __reduce_ex__, __setstate__)}
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, _stage.PARTS: parts, ORIGINAL: base}
    return type(base)(base.__name__, (base,), {**names, **members, **own})


def is_stage(module: nn.Module) -> bool:
    """Whether a plain ``nn.Sequential`` holds consecutive swapped blocks."""
    if original_class(module) is not nn.Sequential:
        return False
    states = [child is not None and state_of(child) is not None for child in module._modules.values()]
    return any(map(operator.and_, states, states[1:]))


def _has_layout(x: Tensor) -> bool:
    """Whether an input can be brought to channels_last: strided images, not batched by torch.func."""
    if x.layout is not torch.strided or x.dim() != 4:
        return False
    return torch.compiler.is_compiling() or not _transforms()


def _rebuild_state(channels_last: bool, is_whole: bool) -> State:
    return State(channels_last, Whole() if is_whole else None)


def forget(module: nn.Module) -> None:
    """Drop what was computed from a module's parameters: they may have been written to unseen."""
    _fold.forget(module.parameters())
    for state in map(state_of, module.modules()):
        if state is not None and state.whole is not None:
            state.whole.forget()


def _forget_plan(module: nn.Module) -> None:
    state = module.__dict__.get(STATE)
    if state is not None:
        state.children = None


def rebuild(base: type) -> Any:
    """An empty swapped instance, for pickle and deepcopy to fill."""
    cls = swapped_class(base)
    return cls.__new__(cls)


def swap(module: nn.Module, state: State) -> None:
    """Make a module run its plan; an already swapped one gets the new state."""
    cls = swapped_class(original_class(module))
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)
    module.__dict__[STATE] = state


def unswap(module: nn.Module) -> None:
    """Give a module its class back and take away what the swap added."""
    if module.__dict__.pop(STATE, None) is not None:
        base = original_class(module)
        if type(module) is swapped_class(base):  # else another tool put its class on top, which runs base's forward now
            object.__setattr__(module, "__class__", base)
