"""The ways to run one model that are compared: PyTorch eager and compiled, and fastres."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastres
from fastres.experiments.parity import autocast
from fastres.experiments.subject import laid_out

FASTRES = "fastres"
_numbers = itertools.count()


class Rival(NamedTuple):
    """One way: ``prepare(model, x)`` may change its own copy of the model, and gives what is called and its input."""

    name: str
    prepare: Callable[[nn.Module, Tensor], tuple[Callable[[Tensor], Tensor], Tensor]]
    layout: str
    options: dict[str, Any]  # of torch._inductor.config while it prepares and is first called
    compiles: bool = False
    patience: float = 0.0  # seconds that it may take to get ready
    graph: bool = False  # its training step by fastres.graph

    @contextlib.contextmanager
    def settings(self, cold: bool = True) -> Iterator[None]:
        """Settings while it prepares and is first called: every compilation is a cold one, unless ``cold`` is False, and none
        is abandoned.
        """
        if not self.compiles:
            yield
            return
        inductor, dynamo = torch._inductor.config, torch._dynamo.config
        options = {"force_disable_caches": cold, **self.options}
        patient = dynamo.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
        with all_cores(), inductor.patch(options), patient:
            yield


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let compilers use every core: where threads are pinned, this one, and so what it starts, is held to one."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _eager(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    return model, x


def _channels_last(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    return laid_out(model, torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def _compiled(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    network, x = _channels_last(model, x)

    def forward(x: Tensor) -> Tensor:
        return network(x)

    # torch.compile keeps its results per code object: with a code object of its own, no rival gets what another one compiled.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    return torch.compile(forward, dynamic=False), x


def _fastres(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    return fastres.optimize(model), x.contiguous(memory_format=torch.channels_last)


def _autocast(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    network, x = _channels_last(model.float(), x)
    return functools.partial(autocast, network, x.dtype), x


def _frozen(model: nn.Module, x: Tensor) -> tuple[Callable, Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    return fastres.freeze(model, x), x


EAGER = Rival("eager", _eager, "contiguous", {})
CHANNELS_LAST = Rival("eager channels_last", _channels_last, "channels_last", {})
AMP = Rival("eager channels_last + AMP", _autocast, "channels_last", {})
COMPILE = Rival("torch.compile", _compiled, "channels_last", {}, compiles=True, patience=40.0)
CUDA_GRAPHS = Rival(
    "torch.compile + CUDA graphs", _compiled, "channels_last", {"triton.cudagraphs": True}, compiles=True, patience=40.0
)
FREEZING = Rival("torch.compile + freezing", _compiled, "channels_last", {"freezing": True}, compiles=True)
MAX_AUTOTUNE = Rival(
    "torch.compile max-autotune", _compiled, "channels_last", {"max_autotune": True}, compiles=True, patience=150.0
)
OPTIMIZED = Rival(FASTRES, _fastres, "channels_last", {})
GRAPHED = Rival("fastres + graph", _fastres, "channels_last", {}, graph=True)  # in training; parity is judged uncaptured
FROZEN = Rival("fastres.freeze", _frozen, "channels_last", {}, patience=30.0)

INFERENCE = (OPTIMIZED, EAGER, CHANNELS_LAST, COMPILE, FREEZING)
TRAINING = (OPTIMIZED, EAGER, CHANNELS_LAST, COMPILE)


def forget_compiled() -> None:
    """Drop what torch.compile keeps of earlier models, so that all comparisons start alike."""
    torch._dynamo.reset()
