"""Graphs of frozen networks where there is no GPU: a replay is the call itself."""

import contextlib

import torch

from fastres.frozen.graph import Graphs


class Uncaptured(Graphs):
    """Turns without streams, and replays that run the call again; ``capturing`` as a caller that captures."""

    capturing = False

    def is_capturing(self):
        return self.capturing

    @contextlib.contextmanager
    def turn(self):
        assert not self.capturing
        with self.lock:
            yield

    def captured(self, call):
        ys = call()

        def replay():
            with torch.autocast("cpu", enabled=False):  # no graph sees what surrounds its replay
                for y, again in zip(ys, call(), strict=True):
                    y.copy_(again)

        return replay, ys
