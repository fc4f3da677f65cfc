"""The only place of the tests that judges numbers; the numbers themselves are fastres.budget's."""

import torch
from torch import Tensor

from fastres.budget import within_budget


def assert_close_to_truth(
    actual: Tensor,
    torch_same_dtype: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    what: str = "result",
    spread: float = 0.0,
) -> None:
    """Fail unless actual's error against the float64 truth is within twice torch's own plus the floor."""
    verdict = within_budget(actual, torch_same_dtype, truth, dtype, spread)
    assert verdict.ok, f"{what} ({dtype}): error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
