"""The clocks of the GPU on a machine without one: what they ask of CUDA, in which order, with a recorder in its place."""

import contextlib

import pytest
import torch

from fastres import timing

pytestmark = pytest.mark.none
GPU = torch.device("cuda")
MILLISECONDS = 40.0  # between any two events


class Device:
    """Notes what is asked of CUDA. While a graph is captured calls are counted as captured, not as made."""

    def __init__(self, capturable=True):
        self.log, self.capturing, self.capturable = [], False, capturable
        self.made = self.captured = 0

    def call(self):
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += self.capturing
        self.made += not self.capturing
        self.log.append("captured call" if self.capturing else "call")

    @contextlib.contextmanager
    def capture(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    @contextlib.contextmanager
    def on(self, stream):
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")


@pytest.fixture
def device(monkeypatch):
    device = Device()
    log = device.log

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.recorded = self.waited = False

        def record(self):
            self.recorded = True
            log.append("record")

        def synchronize(self):
            assert self.recorded
            self.waited = True
            log.append("wait")

        def elapsed_time(self, end):
            assert self.recorded and end.recorded and end.waited, "read before the work was over"
            return MILLISECONDS

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    current = Stream("current")
    for name, fake in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": device.capture, "stream": device.on,
        "current_stream": lambda: current, "synchronize": lambda: log.append("synchronize"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


def test_a_call_that_can_be_captured_is_replayed(device):
    found = timing.interleaved({"it": device.call}, GPU, seconds=0.001, batches=(3, 3))["it"]
    calls = timing.GRAPH_CALLS
    assert found == timing.Timing(*[MILLISECONDS / 1e3 / calls] * 3, 3, calls, "graph")
    assert device.captured == calls and device.made == 3  # those that warm up, on the side stream
    warm_up = ["side waits for current", "enter side", *["call"] * 3, "leave side", "current waits for side"]
    a_batch = ["synchronize", "record", "replay", "record", "wait"]
    assert device.log == [*warm_up, *["captured call"] * calls, *a_batch * (2 + 3)]


def test_a_call_that_cannot_be_captured_is_made_between_events(device):
    device.capturable = False
    found = timing.interleaved({"it": device.call}, GPU, seconds=0.001, batches=(2, 2))["it"]
    assert found.method == "events" and found.calls == 1 and found.median == MILLISECONDS / 1e3
    assert "replay" not in device.log and device.captured == 0
    a_batch = ["synchronize", "record", "call", "record", "wait"]
    first = ["synchronize", "call", *a_batch]  # what failed is over; a call to warm up; a batch to size batches by
    assert device.log[-len(first) - 2 * len(a_batch) :] == [*first, *a_batch * 2]


def test_what_must_not_be_replayed_is_not_captured(device):
    found = timing.interleaved({"a": device.call, "b": device.call}, GPU, seconds=0.001, batches=(2, 2), graph=False)
    assert {timed.method for timed in found.values()} == {"events"}
    assert device.captured == 0 and not {"replay", "enter side"} & set(device.log)
    assert device.made == 2 * (1 + 1 + 2)


def test_short_calls_share_a_batch_until_it_is_long_enough(device, monkeypatch):
    monkeypatch.setattr("test_gpu_clock.MILLISECONDS", 4.0)
    clock = timing._clock(device.call, GPU, graph=False)
    clock.warm_up()
    assert clock.calls * clock.estimate >= 4e-3 and clock.calls > 1


def test_a_tick_follows_every_round(device):
    ticks = []
    timing.interleaved({"it": device.call}, GPU, seconds=0.001, batches=(4, 4), tick=lambda: ticks.append(len(device.log)))
    assert len(ticks) == 4 and ticks == sorted(set(ticks))
