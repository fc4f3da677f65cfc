"""The one judgement of numerical parity: error against float64 truth, scaled by PyTorch's own error at the same dtype.

Two errors are measured, over the entries that are finite in the truth: the largest, relative to the largest magnitude,
and the root mean square, relative to the root mean square. Each may be twice PyTorch's plus a floor of a few units in the
last place (more for float64, whose truth carries PyTorch's own rounding). NaN and infinity must stand where they stand in
PyTorch's result, with the same sign.

A sum over a channel may cancel to any size, and PyTorch's own error to nothing. Its error is therefore relative to at least
its spread: the size it would have if its terms had random signs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


def spread_of_sums(sums: Tensor, terms: Tensor) -> float:
    """Spread of ``sums.numel()`` sums over terms of these magnitudes and any sign, NaN and infinity left out."""
    size = terms.detach().double().square().flatten()
    return (size[size.isfinite()].mean() * terms.numel() / sums.numel()).sqrt().nan_to_num().item()


def spreads(op: str, args: Sequence[Any], truth: Sequence[Tensor]) -> list[float]:
    """Spread of each output of a call of an op: of means and parameters' gradients; 0 for outputs that are no such sums."""
    found = [0.0] * len(truth)
    for index, out in enumerate(truth):
        if out.dim() != 1 or not out.is_floating_point():
            continue
        if op == "conv_backward_bn_act":  # of products of the gradient of y and a weight
            grad_y, weight = args[:2]
            found[index] = spread_of_sums(out, grad_y) * (weight.double().square().sum() / weight.shape[0]).sqrt().item()
        elif op.endswith("_backward"):  # args[0] is the gradient of y; what it is multiplied by is normalised
            found[index] = spread_of_sums(out, args[0])
        elif op.endswith(("_train", "_statistics")) and index % 2:  # a mean, its variance behind it
            values = (truth[0] if op.startswith("conv") else args[0]).numel() / out.numel()  # a convolution's are of y
            found[index] = spread_of_sums(out, truth[index + 1].sqrt()) / values**0.5
    return found


def errors(actual: Tensor, truth: Tensor, spread: float = 0.0) -> dict[str, float]:
    """Largest and root-mean-square error of actual against truth, relative to truth's largest and root mean square, or to the
    spread where that is larger.
    """
    truth, actual = truth.detach().double().flatten(), actual.detach().double().flatten()
    finite = truth.isfinite() & actual.isfinite()
    truth, difference = truth[finite], (actual - truth)[finite] if not finite.all() else actual - truth
    if truth.numel() == 0:
        return {"max": 0.0, "rms": 0.0}
    least = max(spread, torch.finfo(torch.float64).tiny ** 0.5)
    return {
        "max": (difference.abs().max() / truth.abs().max().clamp(min=least)).item(),
        "rms": (difference.square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=least)).item(),
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


def within_budget(
    actual: Tensor, torch_same_dtype: Tensor, truth: Tensor, dtype: torch.dtype, spread: float = 0.0
) -> Verdict:
    """Judge a result.

    Args:
        actual: the result to be judged.
        torch_same_dtype: PyTorch's result of the same computation at the same dtype.
        truth: the same computation in float64 on the same (already rounded) inputs.
        dtype: the dtype the floor is taken from: that of the activations.
        spread: of a sum, see ``spreads``.
    """
    if actual.shape != truth.shape or not same_classes(actual, torch_same_dtype):
        return Verdict(False, float("inf"), 0.0)
    own, theirs = errors(actual, truth, spread), errors(torch_same_dtype, truth, spread)
    ulp = torch.finfo(dtype).eps * (FLOAT64_FLOOR if dtype == torch.float64 else 1.0)
    verdicts = []
    for measure, floor in FLOOR_ULPS.items():
        allowed = FACTOR * theirs[measure] + floor * ulp
        verdicts.append(Verdict(own[measure] <= allowed, own[measure], allowed))
    return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)
