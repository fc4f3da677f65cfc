"""Is an optimised model as right as the one it came from? Both run on copies, beside a float64 one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastres import budget
from fastres.errors import UnsupportedError, VerificationError, must, must_type
from fastres.optimize.swap import unswap


class Reference:
    """What plain PyTorch answers on an input: in float64, and in the model's dtype for either memory format, because
    the rounding of one run is a matter of luck."""

    def __init__(self, model: nn.Module, inputs: Tensor | tuple[Any, ...], dtype: torch.dtype | None) -> None:
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(value, Tensor) for value in self.inputs) or not self.inputs:
            raise must_type("optimize", "verify", "a tensor or a tuple of tensors", inputs)
        if dtype is not None:
            self.inputs = _cast(self.inputs, dtype)
        original = copied(model, "optimize", "leave out verify")
        for module in original.modules():
            unswap(module)
        plain = original if dtype is None else original.to(dtype)
        self.plain = [_outputs(plain, self.inputs)]
        with suppress(RuntimeError):  # a network that views memory as contiguous has no such run
            self.plain.append(_outputs(plain, _channels_last(self.inputs)))
        self.truth = _outputs(original.double(), _cast(self.inputs, torch.float64))
        if not any(value.numel() for value in self.truth):
            raise must("optimize", "verify", "an input for which the model returns floating values", "none")

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Errors of the optimised model and of PyTorch's.

        Raises:
            VerificationError: an output misses the budget.
        """
        own = _outputs(model, self.inputs)
        worst = {"error": 0.0, "torch_error": 0.0}
        for index, (actual, truth, *plain) in enumerate(zip(own, self.truth, *self.plain, strict=True)):
            verdicts = [budget.within_budget(actual, theirs, truth, theirs.dtype) for theirs in plain]
            verdict = max(verdicts, key=lambda one: (one.ok, one.allowed))
            errors = {
                "error": budget.error(actual, truth),
                "torch_error": max(budget.error(theirs, truth) for theirs in plain),
            }
            if not verdict.ok:
                raise VerificationError(
                    f"fastres.optimize: output {index} must be within the error budget on verify's input, got "
                    f"{verdict.error:.3g} against {verdict.allowed:.3g} allowed (RMS error against float64: "
                    f"{errors['error']:.3g}, PyTorch's own {errors['torch_error']:.3g}); the model is restored"
                )
            worst = max(worst, errors, key=lambda pair: pair["error"])
        return worst


class _Values(TorchFunctionMode):
    """Copies computed tensors too, by value, which ``copy.deepcopy`` refuses: pruning and weight norm keep such ones."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        computed, memo = args
        return memo.setdefault(id(computed), computed.detach().clone().requires_grad_(computed.requires_grad))


def copied(model: nn.Module, function: str, do: str) -> nn.Module:
    """A copy to run once.

    Raises:
        UnsupportedError: the model holds what cannot be copied; ``do`` says what works without.
    """
    try:
        with _Values():
            return copy.deepcopy(model)
    except TypeError as error:  # of pickle, about a lock, a file, a generator
        raise UnsupportedError(f"fastres.{function}: the model cannot be copied to be run ({error}); {do}") from error


def _channels_last(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    last = torch.channels_last
    return tuple(value.contiguous(memory_format=last) if value.dim() == 4 else value for value in inputs)


def _cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


@contextmanager
def unseen_randomness() -> Iterator[None]:
    """The same random numbers at every entry, and the caller's generators as they were after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All floating tensors a copy of the model returns, and in training its buffers after the step."""
    model = copied(model, "optimize", "leave out verify")
    with unseen_randomness(), torch.no_grad():
        result = model(*(value.clone() for value in inputs))
    found = pytree.tree_leaves(result)
    if model.training:
        found += [buffer for _, buffer in model.named_buffers()]
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
