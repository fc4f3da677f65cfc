"""The one judgement of numerical parity: error against float64 truth, scaled by PyTorch's own error at the same dtype.

Two errors are measured, over the entries that are finite in the truth: the largest, relative to the largest magnitude,
and the root mean square, relative to the root mean square. Each may be twice PyTorch's plus a floor of a few units in the
last place (more for float64, whose truth carries PyTorch's own rounding). NaN and infinity must stand where they stand in
PyTorch's result, with the same sign.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = {"max": 2.0, "rms": 1.0}
FLOAT64_FLOOR = 256.0  # times the floor above


class Verdict(NamedTuple):
    """Whether a result is within budget, with the error and the allowance of the measure that came closest to it."""

    ok: bool
    error: float
    allowed: float


def errors(actual: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest and root-mean-square error of actual against truth, relative to truth's largest and root mean square."""
    truth, actual = truth.detach().double().flatten(), actual.detach().double().flatten()
    finite = truth.isfinite() & actual.isfinite()
    truth, difference = truth[finite], (actual - truth)[finite] if not finite.all() else actual - truth
    if truth.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    tiny = torch.finfo(torch.float64).tiny
    return {
        "max": (difference.abs().max() / truth.abs().max().clamp(min=tiny)).item(),
        "rms": (difference.square().mean() / truth.square().mean().clamp(min=tiny)).sqrt().item(),
    }


def error(actual: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of actual against truth, relative to truth's root mean square."""
    return errors(actual, truth)["rms"]


def same_classes(actual: Tensor, expected: Tensor) -> bool:
    """Whether NaN and signed infinities stand in the same places."""
    actual, expected = actual.detach(), expected.detach()
    return bool(
        torch.equal(actual.isnan(), expected.isnan())
        and torch.equal(actual.isposinf(), expected.isposinf())
        and torch.equal(actual.isneginf(), expected.isneginf())
    )


def within_budget(actual: Tensor, torch_same_dtype: Tensor, truth: Tensor, dtype: torch.dtype) -> Verdict:
    """Judge a result.

    Args:
        actual: the result to be judged.
        torch_same_dtype: PyTorch's result of the same computation at the same dtype.
        truth: the same computation in float64 on the same (already rounded) inputs.
        dtype: the dtype the floor is taken from: that of the activations.
    """
    if actual.shape != truth.shape or not same_classes(actual, torch_same_dtype):
        return Verdict(False, float("inf"), 0.0)
    own, theirs = errors(actual, truth), errors(torch_same_dtype, truth)
    ulp = torch.finfo(dtype).eps * (FLOAT64_FLOOR if dtype == torch.float64 else 1.0)
    verdicts = []
    for measure, floor in FLOOR_ULPS.items():
        allowed = FACTOR * theirs[measure] + floor * ulp
        verdicts.append(Verdict(own[measure] <= allowed, own[measure], allowed))
    return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)
