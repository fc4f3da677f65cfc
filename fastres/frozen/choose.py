"""The kernel of a call: the fastest of the backends that are validated on the device's architecture and keep the error budget
on its shape."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import dispatch, timing, tuner
from fastres.frozen.calls import TORCH, Call, Run
from fastres.ops._op import Op
from fastres.tuner import Candidate

SECONDS = 0.05  # of one call's timing
_JUDGED = 4  # images from each end of a batch that are compared with float64: each is computed by itself


class Choice(NamedTuple):
    """The kernel of a call, the function that runs it, and all candidates that were tried."""

    kernel: str
    run: Run
    candidates: tuple[Candidate, ...] = ()

    @property
    def gain(self) -> float:
        """Seconds that it saves over PyTorch's way; 0 where that is not known."""
        seconds = {c.backend: c.seconds or 0.0 for c in self.candidates}
        return seconds.get(TORCH, 0.0) - seconds.get(self.kernel, 0.0)


def drawn(shapes: list[tuple[int, ...]], rest: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a call: activations, one with a NaN, and weights instead of its own, which may be zeros."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last)

    images = [draw(shape, dtype) for shape in shapes]
    images[0][0, 0, 0, 0] = torch.nan
    weights = [
        draw(a.shape, a.dtype) / a[0].numel() ** 0.5 if isinstance(a, Tensor) and a.dim() == 4 else a for a in rest
    ]
    return *images, *weights


def choose(call: Call, op: Op, args: tuple[Any, ...], device: torch.device) -> Choice:
    """The fastest of a call's backends and PyTorch's ways on these arguments, or the one that is forced.

    Raises:
        UnsupportedError: a backend is forced that cannot run the call.
    """
    ways, unproven = _ways(call, op, args, device)
    if len(ways) == 1:
        kernel, run = next(iter(ways.items()))
        return Choice(kernel, run, unproven)
    count = len(call.inputs)
    truth = tuner.Truth(op, (*map(_some, args[:count]), *args[count:]))
    found = [
        Candidate(kernel, failure=None if kernel == TORCH else truth.judge(lambda *_, run=run: _some(run(*args))))
        for kernel, run in ways.items()
    ]
    del truth  # float64 takes memory
    calls = {c.backend: (lambda run=ways[c.backend]: run(*args)) for c in found if c.failure is None}
    with torch.no_grad():
        times = timing.interleaved(calls, device, seconds=SECONDS, batches=(5, 50))
    tried = tuple(replace(c, seconds=times[c.backend].p20) if c.backend in times else c for c in found)
    kernel = tuner.fastest(tried).backend
    return Choice(kernel, ways[kernel], (*tried, *unproven))


def _ways(call: Call, op: Op, args: tuple[Any, ...], device: torch.device) -> tuple[dict[str, Run], tuple[Candidate, ...]]:
    """Functions that compute a call, by name, in order of preference; and kernels that could, but are not validated here."""
    if dispatch.wished(op.name, op.backends) is not None:
        forced = dispatch.choose(op.name, op.backends, args)
        return call.plain if forced.backend.name == TORCH else {forced.backend.name: forced.load()}, ()
    able = [b for b in op.backends if b.name != TORCH and b.why_not(*args) is None]
    doubts = {b.name: dispatch.why_not_proven(op.name, b, device) for b in able}
    unproven = tuple(Candidate(name, failure=doubt) for name, doubt in doubts.items() if doubt)
    return {b.name: b.load() for b in able if doubts[b.name] is None} | call.plain, unproven


def _some(found: Any) -> Any:
    """The images at both ends of a batch; of each where there are several."""
    if isinstance(found, tuple):
        return tuple(map(_some, found))
    return found if len(found) <= 2 * _JUDGED else torch.cat([found[:_JUDGED], found[-_JUDGED:]])
