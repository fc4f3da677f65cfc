"""Parity first, then speed: every way to run a model judged against float64, and those that pass timed in turns."""

import copy
import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres import timing
from fastres.errors import UnsupportedError
from fastres.experiments import parity, rivals
from fastres.experiments.rivals import FASTRES, Rival
from fastres.experiments.subject import Subject
from fastres.graph import WARM_UPS

Row = dict[str, Any]
JUDGED = 32  # images of an inference batch that are compared with float64: each is computed by itself


def compare(
    subject: Subject,
    ways: Sequence[Rival],
    *,
    training: bool = False,
    lower: torch.dtype | None = None,
    seconds: float = 10.0,
    batches: tuple[int, int] = (5, 100),
    replay: bool = True,
    warm: Collection[str] = (),
    step: Callable[[str], object] = lambda text: None,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> list[Row]:
    """Compare the ways to run one model.

    Every row names its rival and says what became of it: ``missing`` (it cannot run here, with the reason), or its parity and,
    unless that failed, its times and ``ratio``: how many times as long as fastres it takes.

    Args:
        training: time a training step (forward, backward, SGD with momentum) instead of evaluation.
        lower: dtype of autocast, under which all of them run; None for no autocast.
        seconds, batches: as for ``timing.interleaved``.
        replay: on a GPU, inference is replayed from CUDA graphs where it can be, without the host's share; False times
            calls as they are made.
        warm: rivals whose compilations may come out of torch.compile's caches.
        step: called with the name of each stage as it begins.
        seconds_left: time until all of it must be over; a rival that needs longer to get ready is missing.
    """
    rivals.forget_compiled()
    step("float64 truth")
    model = subject.model.train(training)
    reference = parity.Reference(model, subject.x if training else subject.x[:JUDGED], lower)
    rows: list[Row] = []
    calls: dict[str, Callable[[], object]] = {}
    for rival in ways:
        step(rival.name)
        cold = rival.name not in warm
        patience = (rival.patience if cold else rival.patience / 2) + seconds
        enough = seconds_left() >= patience
        row, call = _prepare(rival, subject, reference, lower, cold) if enough else (_row(rival, subject, lower), None)
        if not enough:
            row["missing"] = f"out of time: it may take {patience:.0f} s"
        rows.append(row)
        if call is not None:
            calls[rival.name] = call
    step("timing, all in turns")
    with torch.set_grad_enabled(training):
        device = subject.x.device
        times = timing.interleaved(calls, device, seconds=seconds, batches=batches, graph=replay and not training)
    for row in rows:
        row["pass"] += "" if replay else ", as called"
        if row["rival"] in times:
            measured = times[row["rival"]]
            row.update(measured.to_dict(), images_per_s=subject.x.shape[0] / measured.median)
            row["ratio"] = measured.median / times[FASTRES].median if FASTRES in times else None
    return rows


def _row(rival: Rival, subject: Subject, lower: torch.dtype | None) -> Row:
    """What a row says about its case."""
    dtype = str(lower or subject.dtype).removeprefix("torch.")
    return {
        "name": subject.name, "pass": "training" if subject.model.training else "inference",
        "shape": list(subject.x.shape), "dtype": f"{dtype} autocast" if lower else dtype, "layout": rival.layout,
        "rival": rival.name,
    }  # fmt: skip


def prepared(
    rival: Rival, model: nn.Module, x: Tensor, lower: torch.dtype | None, cold: bool = True
) -> tuple[Callable[[Tensor], Tensor], Tensor, dict[str, Tensor]]:
    """What is called, its input, and the outputs of its first call, see ``parity.outputs``."""
    with rival.settings(cold):
        run, x = rival.prepare(model, x.clone())
        run = run if lower is None else functools.partial(parity.autocast, run, lower)
        return run, x, parity.outputs(run, model, x)


def _prepare(
    rival: Rival, subject: Subject, reference: parity.Reference, lower: torch.dtype | None, cold: bool
) -> tuple[Row, Callable[[], object] | None]:
    """Prepare one rival: its row so far, and its call if it runs and passes."""
    row = _row(rival, subject, lower)
    model = copy.deepcopy(subject.model)
    start = time.perf_counter()
    try:
        run, x, found = prepared(rival, model, subject.x, lower, cold)
        found = found if model.training else {name: y[:JUDGED] for name, y in found.items()}
    except Exception as error:  # a rival's own failure, of whatever type, is a row of the result
        row["missing"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return row, None
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    row["wait_s"] = time.perf_counter() - start
    row.update(reference.judge(found).to_dict())
    if not row["ok"]:
        return row, None
    if not model.training:
        return row, lambda: run(x)
    if not rival.graph:
        return row, training_step(run, model, x)
    try:
        step = captured_step(run, model, x)
    except Exception as error:  # as above
        row["missing"] = f"{type(error).__name__}: {error}"
        return row, None
    row["wait_s"] = time.perf_counter() - start
    return row, step


def training_step(
    run: Callable[[Tensor], Tensor], model: torch.nn.Module, x: Tensor, graph: bool = False
) -> Callable[[], object]:
    """Forward, backward and an SGD step with momentum; the learning rate is 0, so that the work never changes.

    Args:
        graph: by ``fastres.graph``, which on a GPU needs the fused SGD; there all take it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=x.device.type == "cuda" or None)

    def step(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = run(x)
        torch.nn.functional.cross_entropy(logits.float(), parity.targets(x, logits.shape[1])).backward()
        optimizer.step()

    return functools.partial(fastres.graph(step, model, optimizer) if graph else step, x)


def captured_step(run: Callable[[Tensor], Tensor], model: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    """The same as a graph that has been captured.

    Raises:
        UnsupportedError: it cannot be.
    """
    step: Any = training_step(run, model, x, graph=True)
    for _ in range(WARM_UPS + 1):
        step()
    if not step.func.captured:
        raise UnsupportedError(step.func.why)
    return step


def outcome(row: Row) -> str:
    """One word on a row that was not timed, for tables."""
    return "missing" if "missing" in row else "timed" if "median_s" in row else "wrong"
