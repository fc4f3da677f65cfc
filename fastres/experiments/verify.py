"""Verifies one optimised model: it keeps the error budget, and is restored bit for bit."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastres
from fastres.experiments import parity
from fastres.experiments.subject import Subject, laid_out


def verify(
    subject: Subject, *, training: bool = False, step: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Optimise a copy of the subject's model, compare it with float64, restore it, and compare bits.

    ``ok`` in the result says that everything holds; the errors are next to it.
    """
    x = subject.x.contiguous(memory_format=torch.channels_last)
    step("PyTorch and float64")
    model = subject.model.train(training)
    reference = parity.Reference(model, subject.x)
    step("fastres")
    optimized = fastres.optimize(copy.deepcopy(model))
    verdict = reference.judge(parity.outputs(optimized, optimized, x))
    step("restore")
    restored = fastres.restore(fastres.optimize(copy.deepcopy(model)))
    plain = copy.deepcopy(model)
    if next(restored.parameters()).dim() == 4 and is_channels_last(restored):
        plain = laid_out(plain, torch.channels_last)
    step("restored network")
    with deterministic():
        same = same_bits(parity.outputs(restored, restored, x), parity.outputs(plain, plain, x))
    return {"model": subject.label, **verdict.to_dict(), "restored": same, "ok": verdict.ok and same}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Make cuDNN use algorithms that give the same bits in every run; its other settings stay."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def is_channels_last(model: torch.nn.Module) -> bool:
    """Whether the model's convolution weights are laid out in channels_last."""
    weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    return bool(weights)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
