"""Measures calls side by side: candidates take turns in one run, and the median of many short batches is reported.

Taking turns makes slow drifts of a machine (clock, neighbours, temperature) hit all candidates alike, so that ratios hold where
absolute times do not. A batch is a number of calls between two readings of the clock: wall time on the CPU; on CUDA, events
around the replay of a graph that holds the calls, or around the calls themselves where they cannot be captured.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

# A batch lasts at least this long: far above the clock's resolution, and long enough that most of its calls find the caches as
# the same candidate left them. After a rival's turn they hold what the rival wrote, which must be written to memory first.
BATCH_SECONDS = 1e-2
MAX_CALLS = 1000
GRAPH_CALLS = 20


class Timing(NamedTuple):
    """Seconds per call: median, 20th and 80th percentile over the batches; how the clock was read."""

    median: float
    p20: float
    p80: float
    batches: int
    calls: int
    method: str

    def to_dict(self) -> dict[str, float | int | str]:
        return {
            "median_s": self.median, "p20_s": self.p20, "p80_s": self.p80,
            "batches": self.batches, "calls": self.calls, "method": self.method,
        }  # fmt: skip


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    batches: tuple[int, int] = (5, 200),
    graph: bool = True,
    tick: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turns.

    Args:
        candidates: calls by name; each is called a few times first, to warm up.
        seconds: what all of it should take; the least number of batches is run even where that takes longer.
        batches: least and most batches of each candidate.
        graph: replay CUDA graphs; False for calls that are timed as a user makes them, such as training steps.
        tick: called after every round.
    """
    if not candidates:
        return {}
    clocks = {name: _clock(call, device, graph) for name, call in candidates.items()}
    for clock in clocks.values():
        clock.warm_up()
    a_round = sum(clock.estimate * clock.calls for clock in clocks.values())
    rounds = min(max(math.ceil(seconds / a_round), batches[0]), batches[1])
    names = list(clocks)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            found[name].append(clocks[name].batch())
        if tick is not None:
            tick()
    return {name: _summary(found[name], clocks[name]) for name in names}


@functools.cache
def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy, read and written, and flop/s of a large matrix product: the peaks that kernels are held
    against. Measured once per process.
    """
    size, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 24, 512)
    return copy_peak(device, size, 0.3), matmul_peak(device, dtype, side, 0.3)


def copy_peak(device: torch.device, size: int, seconds: float) -> float:
    """Bytes/s of a copy of ``size`` bytes, counted read and written: the faster of ``copy_``, which in a CUDA graph is a copy
    by the driver, and a pointwise kernel.
    """
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "pointwise": lambda: torch.neg(source, out=target)}
    return 2 * size / min(times.p20 for times in interleaved(calls, device, seconds=seconds).values())


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    """Flop/s of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / interleaved({"": lambda: a @ b}, device, seconds=seconds)[""].p20


def percentile(values: list[float], share: float) -> float:
    """Value below which this share of the values lies, interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _summary(values: list[float], clock: "_Clock") -> Timing:
    median = statistics.median(values)
    return Timing(median, percentile(values, 0.2), percentile(values, 0.8), len(values), clock.calls, clock.method)


class _Clock:
    """Wall time of batches of one call."""

    method = "wall"

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.calls, self.estimate = call, 1, 0.0

    def warm_up(self) -> None:
        """Call twice, then find how many calls make a batch long enough."""
        self.call()
        self.calls = 1
        self.estimate = self.batch()
        while self.estimate * self.calls < BATCH_SECONDS and self.calls < MAX_CALLS:
            wanted = math.ceil(BATCH_SECONDS / max(self.estimate, 1e-9))
            self.calls = min(max(wanted, 2 * self.calls), MAX_CALLS)
            self.estimate = self.batch()

    def batch(self) -> float:
        """Seconds per call of one batch."""
        call = self.call
        start = time.perf_counter()
        for _ in range(self.calls):
            call()
        return (time.perf_counter() - start) / self.calls


class _EventClock(_Clock):
    """CUDA events around a batch, the whole of it queued before anything waits."""

    method = "events"

    def batch(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def run(self) -> None:
        for _ in range(self.calls):
            self.call()


class _GraphClock(_EventClock):
    """Events around the replay of a CUDA graph of several calls: the GPU's time, without the host's."""

    method, captured = "graph", True

    def warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.call()
        torch.cuda.current_stream().wait_stream(side)
        self.calls, self.graph = GRAPH_CALLS, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(self.calls):
                self.call()
        self.batch()
        self.estimate = self.batch()

    def run(self) -> None:
        if self.captured:
            self.graph.replay()
        else:
            super().run()


class _AnyClock(_GraphClock):
    """A graph's replay where the call can be captured, else events around the calls."""

    def warm_up(self) -> None:
        try:
            super().warm_up()
        except RuntimeError:  # not capturable: it synchronises, or allocates outside the graph's pool
            torch.cuda.synchronize()
            self.method, self.captured = _EventClock.method, False
            _EventClock.warm_up(self)


def _clock(call: Callable[[], object], device: torch.device, graph: bool) -> _Clock:
    if device.type != "cuda":
        return _Clock(call)
    return _AnyClock(call) if graph else _EventClock(call)
