"""How a batch norm in training made a tensor, so that backward can recompute it instead of keeping it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.ops._op import Op
from fastres.ops.bn_act import BN_ACT, BN_ACT_TRAIN
from fastres.ops.bn_add_act import BN_ADD_ACT, BN_ADD_ACT_TRAIN
from fastres.ops.bn_add_bn_act import BN_ADD_BN_ACT, BN_ADD_BN_ACT_TRAIN

_GIVEN = {BN_ACT_TRAIN: BN_ACT, BN_ADD_ACT_TRAIN: BN_ADD_ACT, BN_ADD_BN_ACT_TRAIN: BN_ADD_BN_ACT}


class Producer(NamedTuple):
    """A call: the op, its arguments, the mean and var of each batch norm in it; the version of what it made."""

    op: Op
    args: tuple[Any, ...]
    statistics: tuple[Tensor | None, ...]
    version: int

    def tensors(self) -> list[Tensor | None]:
        return [value if isinstance(value, Tensor) else None for value in (*self.args, *self.statistics)]

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> "Producer":
        """The same call with these in place of ``tensors()``; with none of them, only its numbers are left."""
        pairs = zip(self.args, tensors, strict=False)
        args = [tensor if arg is None or isinstance(arg, Tensor) else arg for arg, tensor in pairs]
        return self._replace(args=tuple(args), statistics=tensors[len(args) :])

    def recompute(self) -> Tensor:
        """What it made, to the bit; differentiable where gradients are recorded.

        Using the known statistics saves a pass, but not every call may: PyTorch rounds differently with given statistics, and
        on a GPU kernels that write a mask are compiled separately from those that do not. Such calls are repeated as they were.
        """
        if not torch.is_grad_enabled():
            given, args = _GIVEN[self.op], self._args_of_given()
            chosen = self.op.backend(*self.args)
            if chosen == given.backend(*args) and (chosen == "cpu" or (chosen != "torch" and given is BN_ACT)):
                return given(*args)
        return self.op(*self.args)[0]

    def _args_of_given(self) -> list[Any]:
        """Statistics stand before the eps of their batch norm."""
        found: list[Any] = []
        statistics = iter(self.statistics)
        for name, arg in zip(self.op.parameters, self.args, strict=True):
            found += (next(statistics), next(statistics), arg) if name.endswith("eps") else (arg,)
        return found
