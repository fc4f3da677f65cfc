"""Convolutions and batch norms in a row as one node of autograd, y = act(bn(conv(...act(bn(conv(x)))))[+ residual]).

The ops and their gradients are those of the pages; what is saved is what they save. One node instead of two a layer spares
the host about a third of its time, which decides where layers are small. The gradient of a residual that is x itself is
added in place. With create_graph the chain is run again, op by op, and differentiated. Where it is known how x was made, for
a convolution x is not kept but made again (``_made``). A convolution tells the batch norm behind it the statistics where a
kernel is chosen that finds them (``_given``), and its backward takes that of the batch norm before it along where one is chosen
for that (``conv_backward_bn_act``).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import dispatch
from fastres.kernels.layout import memory_format
from fastres.ops._given import Known, runner
from fastres.ops._made import Made
from fastres.ops.bn_act import BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT_TRAIN
from fastres.ops.conv import CONV, why_not_fast
from fastres.ops.conv_backward_bn_act import CONV_BACKWARD_BN_ACT, may_run
from fastres.ops.conv_statistics import CONV_STATISTICS, may_find


class Convolution(NamedTuple):
    """What a convolution does beside its tensors: stride, padding, dilation and groups."""

    geometry: tuple


class Norm(NamedTuple):
    """What a batch norm and the activation behind it do beside their tensors."""

    eps: float
    act: str


class Chain(NamedTuple):
    """The links, the last of which adds the residual; whether that is x; the dtype that autocast asks of convolutions, None
    where it is off; how x was made, None where it is kept; x's statistics, None where they are not known."""

    links: Sequence[Convolution | Norm]
    adds_x: bool
    dtype: torch.dtype | None
    made: Made | None = None
    known: Known = None


Statistics = list[tuple[Tensor, Tensor, Tensor]]  # of each batch norm: its input, mean and var
TENSORS = 2  # of a link: weight and bias


class _Step:
    """An op's context, as its formula knows it from autograd, and where its saved tensors lie among the node's."""

    saved_tensors: tuple

    def __init__(self, formula: Callable, needs: tuple[bool, ...], others: int) -> None:
        self.formula, self.needs_input_grad, self.others = formula, needs, others

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def backward(self, saved: Sequence, grad_y: Tensor) -> tuple:
        self.saved_tensors = tuple(saved[self.first : self.last])
        grads = self.formula(self, grad_y, *(None,) * self.others)  # outputs that have no gradient
        self.saved_tensors = ()
        return grads

    def backward_of_parameters(self, saved: Sequence, grad_y: Tensor) -> tuple:
        """``backward`` where the gradient of x is known."""
        step = copy.copy(self)
        step.needs_input_grad = needs = False, *self.needs_input_grad[1:]
        return step.backward(saved, grad_y) if any(needs) else (None,) * len(needs)

    def part_of(self, saved: list) -> None:
        """Leave to the node what is saved: autograd sees to it that an output does not keep itself alive."""
        self.first, self.last = len(saved), len(saved) + len(self.saved_tensors)
        saved += self.saved_tensors
        self.saved_tensors = ()


def _cast(chain: Chain, tensor: Any) -> Any:
    """As autocast casts what goes into a convolution."""
    if tensor is None or chain.dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(chain.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, before_norm: bool) -> tuple:
    """The op that did the convolution, None where PyTorch's is the faster; its arguments and outputs. ``before_norm``: the
    statistics of y are of use."""
    if before_norm and bias is None and may_find(x, weight, *geometry):
        args = x, weight, *geometry
        if not CONV_STATISTICS.falls_back(*args):
            return CONV_STATISTICS, args, CONV_STATISTICS(*args)
    if why_not_fast(x, weight.shape, *geometry) is None:
        return CONV, (x, weight, bias, *geometry), (CONV(x, weight, bias, *geometry),)
    return None, (x, weight, bias, *geometry), (torch.conv2d(x, weight, bias, *geometry),)


def _asks(x: Tensor) -> bool:
    """Whether kernels may be there that do more than one layer's work; asked once for all layers."""
    return x.is_cuda or dispatch.is_forced()


def _torch_gradients(step: Any, grad_y: Tensor) -> tuple:
    """Of PyTorch's convolution."""
    x, weight = step.saved_tensors
    stride, padding, dilation, groups = step.geometry
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, step.needs_input_grad
    )


def compose(chain: Chain, tensors: Sequence[Any], told: Callable | None = None) -> tuple[Tensor, Statistics, Known]:
    """Run the layers on ``(x, residual, *parameters)``; ``told`` hears of every op that ran, as ``_record`` does. Gives y, the
    statistics of the batch norms' inputs, and y's own where they are known."""
    x, residual, *parameters = tensors
    value, known, statistics = x, chain.known, []
    before_norms = len(chain.links) > 1 and _asks(x)  # of a convolution alone, none takes its statistics
    for index, link in enumerate(chain.links):
        weight, bias = parameters[TENSORS * index : TENSORS * index + TENSORS]
        if isinstance(link, Convolution):
            inputs = _cast(chain, value), _cast(chain, weight), _cast(chain, bias)
            op, args, outputs = _convolve(*inputs, link.geometry, before_norms)
            if told is not None:
                told(op, args, outputs)
            value, *found = outputs
            known = (found[0], found[1]) if found else None
            continue
        last = index == len(chain.links) - 1
        added = (x if chain.adds_x else residual) if last else None
        op = BN_ACT_TRAIN if added is None else BN_ADD_ACT_TRAIN
        args = (value, *(() if added is None else (added,)), weight, bias, *link)
        outputs = op(*args) if known is None else op.by(runner(op, args, (known,)), *args)
        if told is not None:
            told(op, args, outputs)
        statistics.append((value, *outputs[1:3]))
        value, known = outputs[0], None
    return value, statistics, known


class _Recorder:
    """Makes the steps of the gradient while the links run; ``needed`` says of each tensor whether its own is asked for."""

    def __init__(self, needed: Sequence[bool]) -> None:
        self.flows, self.needs_residual, *self.needed = needed  # flows: whether a gradient is asked for before this step
        self.steps: list[_Step] = []

    def __call__(self, op: Any, args: tuple, outputs: Any) -> None:
        one, other = self.needed[TENSORS * len(self.steps) :][:TENSORS]
        residual = (self.needs_residual,) if op is BN_ADD_ACT_TRAIN else ()
        needs = self.flows, *residual, one, other
        self.flows = any(needs)
        step: Any = _Step(_torch_gradients if op is None else op.backward, needs, len(outputs) - 1)
        if op is None:
            step.geometry = args[3:]
            step.save_for_backward(*args[:2])
        else:
            op.setup_context(step, args, outputs)
        self.steps.append(step)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, found: list, *tensors: Any) -> Any:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        x, residual, *parameters = ctx.needs_input_grad[2:]
        recorder = _Recorder((x, x if chain.adds_x else residual, *parameters))
        y, *others = compose(chain, tensors, recorder)
        found += others
        saved = [*tensors]
        for step in recorder.steps:
            step.part_of(saved)
        made = chain.made
        if made is not None:
            saved[0] = saved[recorder.steps[0].first] = None
            saved += made.tensors()
            chain = chain._replace(made=made.with_tensors((None,) * len(made.tensors())))
        ctx.save_for_backward(*saved)
        ctx.chain, ctx.steps = chain, recorder.steps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, chain = ctx.saved_tensors, ctx.chain
        if chain.made is not None:
            saved = _with_x(saved, chain, ctx.steps)
        tensors = saved[: 2 + TENSORS * len(chain.links)]
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, *_differentiate_twice(chain, tensors, ctx.needs_input_grad[2:], grad)
        found: list[Any] = [None] * len(tensors)
        for index, grads in _gradients(ctx.steps, saved, grad):
            grad, *others = grads
            if len(ctx.steps[index].needs_input_grad) == 2 + TENSORS:  # x, the residual and its own
                found[1], *others = others
            at = 2 + TENSORS * index
            found[at : at + 2] = (_of_dtype(tensors[at], others[0]), _of_dtype(tensors[at + 1], others[1]))
        found[0] = _of_dtype(tensors[0], grad)  # None where the steps ended before x
        if chain.adds_x and found[0] is not None:
            found[0] = found[0].add_(found[1])
            found[1] = None
        return None, None, *found


def _gradients(steps: list[_Step], saved: Sequence, grad: Any) -> Iterator[tuple[int, tuple]]:
    """The gradients of each step's inputs, from the last step on, as far as any are asked for. Where those of a batch norm come
    with the convolution's behind it, that one has None of its own x."""
    index, asks = len(steps), _asks(grad)
    while index and any(steps[index - 1].needs_input_grad):
        index -= 1
        joined = _joined(steps[index - 1], steps[index], saved, grad) if index and asks else None
        if joined is None:
            grads = steps[index].backward(saved, grad)
        else:
            yield index, steps[index].backward_of_parameters(saved, grad)
            index -= 1
            found = zip(CONV_BACKWARD_BN_ACT(*joined), steps[index].needs_input_grad, strict=True)
            grads = tuple(gradient if need else None for gradient, need in found)
        grad = grads[0]
        yield index, grads


def _joined(norm: Any, step: Any, saved: Sequence, grad_y: Tensor) -> tuple | None:
    """The arguments of the op that does a batch norm's backward with that of the convolution behind it, where a kernel of it
    is chosen."""
    geometry = getattr(step, "geometry", None)
    if geometry is None or not step.needs_input_grad[0]:  # it is no convolution
        return None
    x, *norms = saved[norm.first : norm.last]
    _, weight = saved[step.first : step.last]
    if not may_run(x, geometry[0]) or {x.dtype, weight.dtype} != {grad_y.dtype}:
        return None
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    args = grad_y, weight, x, *norms, norm.eps, norm.act, *geometry
    return None if CONV_BACKWARD_BN_ACT.falls_back(*args) else args


def _with_x(saved: Sequence, chain: Chain, steps: list[_Step]) -> list:
    """What was saved, and x made again from the last of it."""
    made: Any = chain.made
    x = made.with_tensors(saved[-len(made.tensors()) :]).again()
    found = [x, *saved[1:]]
    found[steps[0].first] = _cast(chain, x)
    return found


def _of_dtype(tensor: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The gradient in its tensor's dtype, from which autocast may have cast it."""
    if tensor is None or grad is None:
        return None
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


def _differentiate_twice(chain: Chain, tensors: Sequence, needs: tuple, grad_y: Tensor) -> list[Tensor | None]:
    # One may be made of another, as a residual of x: each by a name of its own, through which nothing else leads.
    tensors = tuple(t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True))
    inputs = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    with torch.enable_grad():
        y, *_ = compose(chain, tensors)
        found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def run(chain: Chain, tensors: Sequence[Any]) -> tuple[Tensor, Statistics, Known]:
    """``compose`` as one node."""
    found: list[Any] = []
    y = _Node.apply(chain, found, *tensors)
    return y, *found
