"""Judges a whole model's results: error against the same model in float64, beside PyTorch's own at the same dtype."""

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import budget
from fastres.experiments.subject import laid_out

NEGLIGIBLE = 1e-9  # times the largest gradient: zero up to rounding, such as that of a bias before batch norm


class Verdict(NamedTuple):
    """A model's error, PyTorch's own, and what is allowed."""

    ok: bool
    error: float
    torch_error: float
    allowed: float

    def to_dict(self) -> dict[str, float | bool]:
        return {"ok": self.ok, "error": self.error, "torch_error": self.torch_error, "allowed": self.allowed}


def targets(x: Tensor, classes: int) -> Tensor:
    """A class for every image."""
    return torch.arange(x.shape[0], device=x.device) * 7919 % classes


def autocast(run: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    """``run(x)`` under autocast."""
    with torch.autocast(x.device.type, dtype):
        return run(x)


def outputs(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What one call leaves: the logits; in training mode the loss, every gradient and every running statistic.

    Args:
        run: the model, or what stands for it (compiled).
        model: owns the parameters and buffers.
    """
    if not model.training:
        with torch.no_grad():
            return {"logits": run(x).clone()}
    model.zero_grad(set_to_none=True)
    logits = run(x).double()
    loss = F.cross_entropy(logits, targets(x, logits.shape[1]))
    loss.backward()
    found = {"loss": loss.detach().reshape(1)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


class Reference:
    """The float64 truth of a model on an input, in the mode it is in, with PyTorch's results in both memory formats.

    Args:
        lower: the dtype of autocast, under which PyTorch's results are computed; None without it.
    """

    def __init__(self, model: nn.Module, x: Tensor, lower: torch.dtype | None = None) -> None:
        self.dtype = lower or x.dtype
        twin = copy.deepcopy(model).double()
        self.truth = outputs(twin, twin, x.double())
        self.torch = []
        for layout in (torch.contiguous_format, torch.channels_last):
            twin = laid_out(copy.deepcopy(model), layout)
            run = twin if lower is None else functools.partial(autocast, twin, lower)
            self.torch.append(outputs(run, twin, x.contiguous(memory_format=layout)))

    def judge(self, actual: dict[str, Tensor]) -> Verdict:
        """Compare results with the truth; PyTorch's own error is the larger one of its two memory formats.

        Several tensors, as in training, are judged together, by the root mean square of their relative errors: one wrong tensor
        fails it, lucky or unlucky rounding does not.
        """
        theirs = max(self.torch, key=self._error)
        if set(actual) != set(self.truth):
            return Verdict(False, math.inf, self._error(theirs), 0.0)
        if len(actual) == 1:
            ((name, found),) = actual.items()
            verdict = budget.within_budget(found, theirs[name], self.truth[name], self.dtype)
            beside = self._same_measure(found, theirs[name], name, verdict)
            return Verdict(verdict.ok, verdict.error, beside, verdict.allowed)
        allowed = budget.FACTOR * self._error(theirs) + budget.FLOOR_ULPS["rms"] * torch.finfo(self.dtype).eps
        error = self._error(actual)
        return Verdict(error <= allowed, error, self._error(theirs), allowed)

    def _same_measure(self, found: Tensor, theirs: Tensor, name: str, verdict: budget.Verdict) -> float:
        """PyTorch's error by the measure that decided the verdict."""
        ours, beside = budget.errors(found, self.truth[name]), budget.errors(theirs, self.truth[name])
        return next((beside[measure] for measure, error in ours.items() if error == verdict.error), math.nan)

    def _error(self, found: dict[str, Tensor]) -> float:
        sizes = {name: t.double().square().mean().sqrt().item() for name, t in self.truth.items()}
        largest = max((size for name, size in sizes.items() if name.startswith("gradient")), default=0.0)
        total = 0.0
        for name, truth in self.truth.items():
            difference = (found[name].double() - truth).square().mean().sqrt().item()
            size = sizes[name] if sizes[name] > NEGLIGIBLE * largest else largest
            size = max(size, torch.finfo(torch.float64).tiny)
            total += (difference / size) ** 2
        error = math.sqrt(total / len(self.truth))
        return error if math.isfinite(error) else math.inf
