"""CUDA graphs of one frozen network: captured once, replayed in turns. The only part of it that needs a GPU."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 2  # calls before a capture: kernels compile, weights are packed, cuDNN chooses


class Graphs:
    """The graphs of one network on one device. They share memory, so they run one after another, on whatever stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.RLock()
        self._done: Any = None  # after what ran last
        self._stream: Any = None  # that captures: cuBLAS keeps a workspace for each, which graphs go on using
        self._pool: Any = None

    def is_capturing(self) -> bool:
        """Whether the caller captures a graph of its own, in which none can be replayed."""
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What is queued inside runs on the device after all that was queued in earlier turns."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def captured(self, call: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
        """A function that replays the call, and the tensors that it writes each time."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            ys = call()
        return graph.replay, ys
