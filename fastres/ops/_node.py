"""A chain of layers as one autograd node, which after its first call repeats the recorded calls of its kernels.

The gradients are the formulas of the ops' pages, and the node saves what they save. One node instead of two per layer saves the
host a third of its time, and recordings most of the rest, which matters where layers are small. The gradient of a shortcut that
is x itself is added in place. With create_graph the chain is run again, op by op, and differentiated. Where it is known how x
was made, the node of a convolution recomputes x instead of keeping it (``_recompute``). A convolution's backward includes that
of the batch norm before it where a kernel for both is chosen (``conv_backward_bn_act``).
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import dispatch
from fastres.kernels.layout import memory_format
from fastres.ops._chain import FIRST, TENSORS, Chain, Statistics, cast, compose, may_join_layers
from fastres.ops._op import signature
from fastres.ops._replay import Recorder, Recording, Unrecorded
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT_TRAIN
from fastres.ops.conv_backward_bn_act import CONV_BACKWARD_BN_ACT, may_run

_FLOWS, _SHORTCUT = -1, -2  # whose gradient a step gives: the value before it, or the shortcut before its batch norm
_MOST_FORMS = 4096  # kept at once, then dropped, so that ever-changing shapes cannot grow memory without bound


class _Step:
    """An op's context, as its formula expects it from autograd, and which of the node's tensors it saved."""

    saved_tensors: tuple

    def __init__(self, formula: Callable, needs: tuple[bool, ...], gives: tuple, others: int) -> None:
        self.formula, self.needs_input_grad, self.gives, self.others = formula, needs, gives, others

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def leaves(self, kept: list, places: dict[int, int]) -> None:
        """Hand what is saved over to the node: autograd makes sure that a saved output does not keep itself alive."""
        for tensor in self.saved_tensors:
            if tensor is not None and id(tensor) not in places:
                places[id(tensor)] = len(kept)
                kept.append(tensor)
        self.places = tuple(None if tensor is None else places[id(tensor)] for tensor in self.saved_tensors)
        self.saved_tensors = ()

    def saved(self, kept: Sequence) -> tuple:
        return tuple(None if place is None else kept[place] for place in self.places)

    def backward(self, kept: Sequence, grad_y: Tensor, **parts: Tensor) -> tuple:
        step = copy.copy(self)  # two threads may use one
        step.saved_tensors = self.saved(kept)
        return self.formula(step, grad_y, *(None,) * self.others, **parts)  # outputs that have no gradient

    def backward_of_parameters(self, kept: Sequence, grad_y: Tensor) -> tuple:
        """``backward`` where the gradient of x is known."""
        step = copy.copy(self)
        step.needs_input_grad = needs = False, *self.needs_input_grad[1:]
        return step.backward(kept, grad_y) if any(needs) else (None,) * len(needs)


def _torch_gradients(step: Any, grad_y: Tensor) -> tuple:
    """The gradients of PyTorch's convolution."""
    x, weight = step.saved_tensors
    stride, padding, dilation, groups = step.geometry
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, step.needs_input_grad
    )


class _Gradients(NamedTuple):
    """The recorded calls of a backward, and whose gradients they give."""

    calls: Recording
    places: list[int]


class _Form:
    """What a chain does with tensors of one kind: the steps of its backward, where its statistics are in what it keeps, and the
    calls of its kernels if they were recorded."""

    def __init__(self, chain: Chain, needs: Sequence[bool]) -> None:
        self.chain, self.needs, self.generation = chain, needs, dispatch.generation
        self.steps: list[_Step] = []
        self.projection: Any = None  # the step of the shortcut's convolution
        x, residual = needs[:FIRST]
        self._flows, self._shortcut = x, x if chain.adds_x else residual  # whether gradients are needed there
        self.statistics: list[tuple[int, int, int]] = []
        self.laid: list[tuple[int, torch.dtype, tuple]] = []  # images and weights as they are kept: dtypes and strides
        self.forward: Recording | None = None
        self.why_not: str | None = None  # its calls are recorded
        self.backward: dict[tuple, _Gradients | None] = {}  # by the kind of y's gradient; None where they cannot be recorded

    def __call__(self, index: int, op: Any, args: tuple, outputs: Any) -> None:
        """Note an op that ran, see ``compose``."""
        own = FIRST + TENSORS * index
        first, shortcut = (self._flows, _FLOWS), (self._shortcut, FIRST - 1)
        asked = [first, *((self.needs[at], at) for at in (own, own + 1))]
        if index == len(self.chain.links):
            asked[0] = shortcut
        elif op is BN_ADD_ACT_TRAIN:
            asked.insert(1, shortcut)
        elif op is BN_ADD_BN_ACT_TRAIN:
            others = own + 2 * TENSORS
            asked.insert(1, (self._shortcut, _SHORTCUT))
            asked += [(False, None), *((self.needs[at], at) for at in (others, others + 1))]  # type: ignore[list-item]
        needs, gives = zip(*asked, strict=True)
        step: Any = _Step(_torch_gradients if op is None else op.backward, needs, gives, len(outputs) - 1)
        if op is None:
            step.geometry = args[3:]
            step.save_for_backward(*args[:2])
        else:
            op.setup_context(step, args, outputs)
        if index == len(self.chain.links):
            self.projection, self._shortcut = step, any(needs)
        else:
            self.steps.append(step)
            self._flows = any(needs)


_FORMS: dict[tuple, _Form] = dispatch.forgets({})


def why_not_recorded() -> list[str]:
    """Why the calls of some chains that ran in this process are not recorded; empty where all are."""
    return sorted({form.why_not for form in _FORMS.values() if form.why_not is not None})


class _Call:
    """One call of a chain, and what it keeps."""

    def __init__(self, chain: Chain, then: Callable[[Statistics], None]) -> None:
        self.chain, self.then = chain, then
        self.kept: Sequence[Any] = ()
        self.form: Any = None

    def run(self, tensors: tuple, needs: tuple[bool, ...]) -> Tensor:
        """y; afterwards ``form`` and what is ``kept``."""
        key = self.name(tensors, needs)
        form = self.form = _FORMS.get(key) if key is not None else None
        if form is not None and form.forward is not None:
            y, *others = form.forward(tensors)
            self.kept = [*tensors, *others]
            return y
        recorder = Recorder(tensors) if key is not None and form is None else None
        form = self.form = _Form(self.chain, needs)
        try:
            with recorder or nullcontext():
                y, statistics = compose(self.chain, tensors, form)
        except Unrecorded as reason:
            recorder.why_not = str(reason)  # type: ignore[union-attr]
            form = self.form = _Form(self.chain, needs)
            y, statistics = compose(self.chain, tensors, form)
        kept = [*tensors]
        places = {id(tensor): place for place, tensor in enumerate(kept)}
        for step in [*form.steps, form.projection]:
            if step is not None:
                step.leaves(kept, places)
        form.statistics = [tuple(places[id(tensor)] for tensor in each) for each in statistics]  # type: ignore[misc]
        form.laid = [(at, t.dtype, t.stride()) for at, t in enumerate(kept) if t is not None and t.dim() == 4]
        self.kept = kept
        if key is not None and recorder is not None:  # its first call
            form.forward = recorder.recording([y, *kept[len(tensors) :]])
            form.why_not = recorder.why_not
            if len(_FORMS) >= _MOST_FORMS:
                _FORMS.clear()
            _FORMS[key] = form
        return y

    def name(self, tensors: tuple, needs: tuple[bool, ...]) -> tuple | None:
        """The key under which the form is kept; None where it is not kept."""
        key, plain, _ = signature(tensors)
        return (self.chain, key, needs) if plain and self.chain.made is None else None

    def statistics(self) -> Statistics:
        return [(self.kept[x], self.kept[mean], self.kept[var]) for x, mean, var in self.form.statistics]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        y = call.run(tensors, ctx.needs_input_grad[1:])
        call.then(call.statistics())
        ctx.form, ctx.made, kept = call.form, call.chain.made, call.kept
        if ctx.made is not None:  # keep what x is made from, not x
            call.form.chain = call.chain._replace(made=None)
            kept = [None if place in (0, call.form.steps[0].places[0]) else tensor for place, tensor in enumerate(kept)]
            kept += ctx.made.tensors()
            ctx.made = ctx.made.with_tensors((None,) * len(ctx.made.tensors()))
        ctx.save_for_backward(*kept)
        return (y, y.detach()) if call.chain.split_output else y

    @staticmethod
    def backward(ctx: Any, grad: Any, grad2: Any = None) -> Any:  # type: ignore[override]
        if grad is None:
            grad, grad2 = grad2, None
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, form = ctx.saved_tensors, ctx.form
        if ctx.made is not None:
            kept = _with_x(kept, form, ctx.made)
        if torch.is_grad_enabled():  # create_graph=True
            grad = grad if grad2 is None else grad + grad2
            return None, *_differentiate_twice(form.chain, kept[: len(form.needs)], form.needs, grad)
        return None, *_gradients(form, kept, grad, grad2)


def _with_x(kept: Sequence, form: _Form, made: Any) -> list:
    """What was kept, with x recomputed from the last of it."""
    x = made.with_tensors(kept[-len(made.tensors()) :]).recompute()
    found = [x, *kept[1:]]
    as_cast: Any = form.steps[0].places[0]
    found[as_cast] = cast(form.chain, x)
    return found


def _gradients(form: _Form, kept: Sequence, grad: Tensor, grad2: Tensor | None) -> list[Tensor | None]:
    """The gradients of the node's tensors: from a recording for gradients of this kind, else by the formulas."""
    inputs = (grad, grad2, *kept)
    key, plain, _ = signature(inputs[:2])
    may_record = plain and form.forward is not None and form.generation == dispatch.generation and _are_laid(form, kept)
    recording = form.backward.get(key) if may_record else None
    if recording is not None:
        found: list[Any] = [None] * len(form.needs)
        for place, gradient in zip(recording.places, recording.calls(inputs), strict=True):
            found[place] = gradient
    else:
        recorder = Recorder(inputs) if may_record and key not in form.backward else None
        with recorder or nullcontext():
            found = _by_formulas(form, kept, grad, grad2)
        if recorder is not None:
            places = [place for place, gradient in enumerate(found) if gradient is not None]
            calls = recorder.recording([found[place] for place in places])
            form.why_not = form.why_not or recorder.why_not
            form.backward[key] = None if calls is None else _Gradients(calls, places)
    if form.chain.adds_x and found[0] is not None:
        found[0] = found[0].add_(found[1])
        found[1] = None
    return found


def _are_laid(form: _Form, kept: Sequence) -> bool:
    """Whether what was kept came back unchanged: hooks on saved tensors may change its layout, as ``save_on_cpu`` does."""
    for place, dtype, stride in form.laid:
        tensor = kept[place]
        if tensor.stride() != stride or tensor.dtype != dtype:
            return False
    return True


def _by_formulas(form: _Form, kept: Sequence, grad: Any, grad2: Tensor | None) -> list[Any]:
    """The gradients of x, the residual and the parameters, from the last step backwards, as far as any are needed."""
    found: list[Any] = [None] * len(form.needs)
    shortcut: Any = None

    def sort(step: _Step, grads: Sequence) -> None:
        nonlocal grad, shortcut
        grad = None
        for whose, gradient in zip(step.gives, grads, strict=False):
            if whose == _FLOWS:
                grad = gradient
            elif whose == _SHORTCUT:
                shortcut = gradient
            elif whose is not None:
                is_x = whose == FIRST - 1 and form.chain.adds_x
                found[whose] = _of_dtype(kept[0 if is_x else whose], gradient)

    index, may_join = len(form.steps), may_join_layers(grad)
    parts = {} if grad2 is None else {"grad_y2": grad2}
    while index and any(form.steps[index - 1].needs_input_grad):
        index -= 1
        step = form.steps[index]
        joined = _joined(form.steps[index - 1], step, kept, grad) if index and may_join else None
        if joined is None:
            sort(step, step.backward(kept, grad, **parts))
        else:
            sort(step, step.backward_of_parameters(kept, grad))
            index -= 1
            step = form.steps[index]
            both = zip(CONV_BACKWARD_BN_ACT(*joined), step.needs_input_grad, strict=True)
            sort(step, [gradient if need else None for gradient, need in both])
        if shortcut is not None:
            own, flowing = grad, shortcut
            shortcut = None
            sort(form.projection, form.projection.backward(kept, flowing))
            grad = own
        parts = {}
    found[0] = _of_dtype(kept[0], grad) if form.needs[0] else None
    return found


def _joined(norm: Any, step: Any, kept: Sequence, grad_y: Tensor) -> tuple | None:
    """The arguments of the op that does a batch norm's backward together with that of the convolution behind it, where a kernel
    for that op is chosen."""
    geometry = getattr(step, "geometry", None)
    if geometry is None or not step.needs_input_grad[0]:  # it is no convolution
        return None
    x, *norms = norm.saved(kept)
    _, weight = step.saved(kept)
    if not may_run(x, geometry[0]) or {x.dtype, weight.dtype} != {grad_y.dtype}:
        return None
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    args = grad_y, weight, x, *norms, norm.eps, norm.act, *geometry
    return None if CONV_BACKWARD_BN_ACT.falls_back(*args) else args


def _of_dtype(tensor: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The gradient in its tensor's dtype, from which autocast may have cast the tensor."""
    if tensor is None or grad is None:
        return None
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


def _differentiate_twice(chain: Chain, tensors: Sequence, needs: Sequence, grad_y: Tensor) -> list[Tensor | None]:
    # One tensor may depend on another, as a residual on x: views keep their gradients apart.
    tensors = tuple(t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True))
    inputs = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    with torch.enable_grad():
        y, _ = compose(chain, tensors)
        found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def run(chain: Chain, tensors: Sequence[Any], then: Callable[[Statistics], None]) -> Any:
    """``compose`` as one node; y twice, as two tensors that share memory, where the chain wants a ``split_output``. ``then``
    gets the statistics before autograd keeps anything, see ``Op.by``."""
    return _Node.apply(_Call(chain, then), *tensors)
