"""One network, batch and dtype: every way made ready in its own process, then timed in turns."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers.process import Died, Process
from benchmarks.peers.ways import DTYPES, OWN, Way
from fastres import timing
from fastres.experiments.subject import load

Row = dict[str, Any]
ROUNDS = (5, 40)  # least and most batches of a way
REST_S = 0.05  # before each turn: ONNX Runtime's threads spin for 37 ms after their last call, OpenMP's for 10 (EPYC, 2 cores)


class Cell(NamedTuple):
    model: str
    batch: int
    dtype: str  # of DTYPES
    size: int = 224

    @property
    def label(self) -> str:
        return f"{self.model} batch {self.batch} {self.dtype}"

    @property
    def common(self) -> Row:
        """What all rows of the cell share."""
        dtype = str(DTYPES[self.dtype]).removeprefix("torch.")
        return {"name": self.model, "pass": "inference", "shape": self.shape, "dtype": dtype}

    @property
    def shape(self) -> list[int]:
        return [self.batch, 3, self.size, self.size]


def write_truth(cell: Cell, path: str, threads: int) -> None:
    """Compute, in a process, the truth for this network and batch."""
    order = {"model": cell.model, "batch": cell.batch, "size": cell.size, "truth": path}
    with contextlib.closing(Process("benchmarks.peers.truth", order, threads=threads, pinned=True)) as process:
        process.answer()


def run(
    cell: Cell,
    ways: Sequence[Way],
    truth: str,
    *,
    threads: int,
    seconds: Callable[[float], float],
    step: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """A row for every way.

    Args:
        truth: file that ``write_truth`` wrote for this network and batch.
        seconds: told how long preparation took; gives what taking turns should last, within the bounds of ``ROUNDS``.
        step: called with what begins.
    """
    rows: dict[str, Row] = {way.name: {**cell.common, "rival": way.name} for way in ways}
    processes: dict[str, Process] = {}
    start = time.monotonic()
    try:
        for way in ways:
            step(way.name)
            row = rows[way.name]
            if cell.dtype in way.refuses:
                row["missing"] = way.refuses[cell.dtype]
                continue
            processes[way.name] = _start(cell, way, truth, threads)
            _make_ready(way, row, processes)
        step("timing, all in turns")
        found = _take_turns(processes, rows, seconds(time.monotonic() - start))
    finally:
        for process in processes.values():
            process.close()
    base = next((name for name in OWN if name in found), None)
    for name, turns in found.items():
        samples = [turn["seconds"] for turn in turns]
        middle = statistics.median(samples)
        spread = timing.percentile(samples, 0.2), timing.percentile(samples, 0.8)
        calls = rows[name].pop("calls")
        rows[name] |= timing.Timing(middle, *spread, len(samples), calls, "wall, own process").to_dict()
        others = statistics.fmean(turn["others"] for turn in turns)
        rows[name] |= {"images_per_s": cell.batch / middle, "others": others if math.isfinite(others) else None}
    for name in found:
        rows[name] |= {"base": base, "ratio": rows[name]["median_s"] / rows[base]["median_s"] if base else None}
    return list(rows.values())


def _start(cell: Cell, way: Way, truth: str, threads: int) -> Process:
    order = {"model": cell.model, "batch": cell.batch, "size": cell.size, "dtype": cell.dtype, "truth": truth}
    order |= {"way": way.name, "maker": way.maker, "packages": way.packages}
    return Process("benchmarks.peers.worker", order, threads=threads, pinned=way.pinned)


def _make_ready(way: Way, row: Row, processes: dict[str, Process]) -> None:
    """Wait for a process to be ready; end it if it will not be timed: it failed, or it is our own and wrong."""
    try:
        row |= processes[way.name].answer()
    except Died as reason:
        row["missing"] = str(reason)
    if "missing" in row or (way.name in OWN and not row["ok"]):
        processes.pop(way.name).close()


def _take_turns(processes: dict[str, Process], rows: dict[str, Row], seconds: float) -> dict[str, list[dict[str, float]]]:
    """What each batch took, by way; a process that dies meanwhile is dropped, and its row says so."""
    a_round = sum(rows[name].pop("estimate_s") * rows[name]["calls"] + REST_S for name in processes)
    rounds = min(max(math.ceil(seconds / max(a_round, 1e-9)), ROUNDS[0]), ROUNDS[1])
    names = list(processes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            if name not in found:
                continue
            time.sleep(REST_S)
            try:
                found[name].append(processes[name].ask())
            except Died as reason:
                rows[name]["missing"] = str(reason)
                del found[name]
    return found


def work(cell: Cell) -> tuple[float, float]:
    """Operations of the convolutions and linear layers (a multiply-add is two), and the elements that must move: input,
    weight and output of each once.
    """
    model = load(cell.model, batch=cell.batch, size=cell.size, device="meta")
    counted = [0.0, 0.0]

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        per_output = weight[0].numel()
        counted[0] += 2.0 * output.numel() * per_output
        counted[1] += args[0].numel() + weight.numel() + output.numel()

    for module in model.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.model(model.x)
    return counted[0], counted[1]


def add_shares(cell: Cell, rows: list[Row], peaks: list[Row]) -> None:
    """Add to each timed row the share of the machine's peaks that it reaches."""
    operations, elements = work(cell)
    dtype = cell.common["dtype"]
    peak = next((row.get("gop_per_s") for row in peaks if row["dtype"] == dtype), None)
    copied = next((row["gb_per_s"] for row in peaks if "gb_per_s" in row), None)
    for row in rows:
        if "median_s" not in row:
            continue
        row["gop_per_s"] = operations / row["median_s"] / 1e9
        row["gb_per_s"] = elements * DTYPES[cell.dtype].itemsize / row["median_s"] / 1e9
        row |= {"of_peak": row["gop_per_s"] / peak} if peak else {}
        row |= {"of_copy_peak": row["gb_per_s"] / copied} if copied else {}


def share(deadline: float, preparation: float, cells_left: int) -> float:
    """Seconds of taking turns for this cell: an equal share of what is left for it and those after it, which need as long
    to prepare as it did.
    """
    left = deadline - time.monotonic() - preparation * (cells_left - 1)
    return max(left, 0.0) / cells_left
