"""CUDA graphs on the CPU: a capture records ATen's calls and leaves no trace, a replay makes them again in the same tensors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class RecordedGraph(TorchDispatchMode):
    """What ``torch.cuda.CUDAGraph`` is there, and the mode that records."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore text")
        for t in tensors((args, kwargs)):
            if id(t) not in self.made and id(t) not in self.before:
                self.before[id(t)] = t, t.detach().clone()
        found = function(*args, **(kwargs or {}))
        self.made.update(map(id, tensors(found)))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def leave_no_trace(self):
        with torch.no_grad():
            for t, value in self.before.values():
                t.detach().copy_(value)

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, found in self.calls:
                for old, new in zip(tensors(found), tensors(function(*args, **kwargs)), strict=True):
                    if old is not new and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


@contextlib.contextmanager
def record(graph, stream, capture_error_mode):
    try:
        with graph:
            yield
    finally:
        graph.leave_no_trace()


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


def install(monkeypatch, module):
    """Let ``fastres.graph`` take the CPU for a GPU."""
    monkeypatch.setattr(module, "DEVICES", {"cpu"})
    stand_ins = {
        "CUDAGraph": RecordedGraph, "graph": record, "Stream": Stream, "current_stream": Stream,
        "stream": contextlib.nullcontext, "device": contextlib.nullcontext,
    }  # fmt: skip
    for name, instead in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, instead)
