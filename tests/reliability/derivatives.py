"""R3 and R6: derivatives against finite differences, and PyTorch's own checks of an op."""

import itertools

import torch

import fastres
from fastres.ops import REGISTRY
from reliability.board import Tally, scored
from reliability.calls import LAYOUTS, place

CPU = torch.device("cpu")
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def small(op, dtype: torch.dtype) -> list:
    """The op's samples, first those of some hundred values."""
    found = op.samples(CPU, dtype)
    return sorted(found, key=lambda s: abs(128 - sum(a.numel() for a in s.args if isinstance(a, torch.Tensor))))


def separated(args: list, generator: torch.Generator) -> list:
    """Activations whose values lie so far apart that a finite difference meets no kink of ReLU or max, and weights that are
    not 0, which without a bias would put a whole channel on it.
    """
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dim() == 4:
            order = torch.randperm(arg.numel(), generator=generator).view(arg.shape)
            arg = (order.double() - arg.numel() / 2 + 0.3) * (4.0 / arg.numel())
        elif isinstance(arg, torch.Tensor) and arg.dim() == 1:
            arg = torch.where(arg == 0, 0.5, arg)
        found.append(arg)
    return found


def differentiated(op, args: list):
    """The op as a function of the arguments that have a gradient, and those."""
    slots = [
        i for i, (name, a) in enumerate(zip(op.parameters, args, strict=True))
        if isinstance(a, torch.Tensor) and not name.endswith(("mean", "var"))
    ]  # fmt: skip

    def function(*inputs):
        given = list(args)
        for slot, value in zip(slots, inputs, strict=True):
            given[slot] = value
        result = op(*given)
        return tuple(y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad)

    return function, tuple(args[slot].detach().clone().requires_grad_() for slot in slots)


@scored("R3", "gradcheck and gradgradcheck in float64, every differentiable op", full=80, short=20)
def derivatives(tally: Tally, count: int) -> None:
    ops = [op for op in REGISTRY.values() if op.differentiable]
    generator = torch.Generator().manual_seed(0)
    each = -(-count // (2 * len(ops)))
    for op in ops:
        for sample in small(op, torch.float64)[:each]:
            function, inputs = differentiated(op, separated(sample.args, generator))
            for twice, check in ((False, torch.autograd.gradcheck), (True, torch.autograd.gradgradcheck)):
                with tally.case(f"{op.name} {sample.label}{' twice' if twice else ''}"):
                    assert check(function, inputs, fast_mode=True)


@scored("R6", "opcheck: every op × layout × with and without gradient", full=200, short=8)
def opchecks(tally: Tally, count: int) -> None:
    rows = [
        (op, layout, grad)
        for op in REGISTRY.values()
        for layout in LAYOUTS
        for grad in (False, True)[: 1 + op.differentiable]
    ]
    every = max(1, len(rows) // count)
    for op, layout, grad in itertools.islice(rows, 0, None, every):
        args = [
            place(a, layout) if isinstance(a, torch.Tensor) and a.dim() == 4 and a is not None else a
            for a in small(op, torch.float32)[0].args
        ]
        if grad:
            names = zip(op.parameters, args, strict=True)
            args = [
                a.detach().requires_grad_(not n.endswith(("mean", "var"))) if isinstance(a, torch.Tensor) else a
                for n, a in names
            ]
        with tally.case(f"{op.name} {layout} {'with' if grad else 'without'} gradient"), fastres.use():
            torch.library.opcheck(getattr(torch.ops.fastres, op.name).default, tuple(args), test_utils=UTILS)
