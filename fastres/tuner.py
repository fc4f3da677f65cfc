"""Explicit tuning: validates every backend that can run a call, times those that pass, and keeps the fastest.

A candidate is first compared with float64 on the op's samples and on the call's own arguments; one that misses the error budget
is discarded, reported, and never chosen on this device. PyTorch is always a candidate, so a tuned choice is never slower than
PyTorch. Results go to the user's cache (``fastres.tune``) and are used from the next call on.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import dispatch, timing, tune
from fastres.budget import spreads, within_budget
from fastres.dispatch import Backend
from fastres.errors import UnsupportedError, must
from fastres.ops import REGISTRY, _mask
from fastres.ops._op import Op
from fastres.ops._patterns import ConvNormPairs, ProjectedEnds
from fastres.ops.conv_bn_add_conv_bn_act import CONV_BN_ADD_CONV_BN_ACT, may_join

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
TIE = 1.02  # times the fastest time: among candidates within it, the order on the op's page decides


@dataclass(frozen=True)
class Candidate:
    """One backend, in one configuration, for one call: refused, failed or timed."""

    backend: str
    config: tuple | None = None
    refusal: str | None = None
    failure: str | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one call."""

    op: str
    key: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def speedup(self) -> float:
        """Time of PyTorch over the time of the choice."""
        torch_seconds = next(c.seconds for c in self.candidates if c.backend == "torch")
        assert torch_seconds is not None and self.chosen.seconds is not None
        return torch_seconds / self.chosen.seconds

    def to_dict(self) -> dict[str, Any]:
        found = [candidate.to_dict() for candidate in self.candidates]
        return {
            "op": self.op,
            "key": self.key,
            "chosen": self.chosen.backend,
            "speedup": self.speedup,
            "candidates": found,
        }


@dataclass
class Session:
    """One run of the tuner: its verdicts on backends, which hold for all calls, and its results."""

    device: torch.device
    seconds: float = 0.5
    configurations: bool = True  # False: only each backend's default
    results: list[Tuned] = field(default_factory=list)
    _verdicts: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def tune(self, op: Op, args: tuple) -> Tuned:
        """Validate and time every candidate for one call."""
        found, runs = [], {}
        for backend in op.backends:
            refusal = backend.why_not(*args)
            if refusal is not None:
                found.append(Candidate(backend.name, refusal=refusal))
                continue
            for config, run in ways(op, backend, args, self.configurations):
                failure = self._failure(op, backend, config, run, args)
                if failure is None:
                    runs[len(found)] = run
                found.append(Candidate(backend.name, config, failure=failure))
        calls = {str(i): (lambda run=run: run(*args)) for i, run in runs.items()}
        with torch.no_grad():
            times = timing.interleaved(calls, self.device, seconds=self.seconds, batches=(5, 100))
        for name, measured in times.items():
            # The quiet batches: on a shared machine a stalled thread can spoil half of all batches.
            found[int(name)] = replace(found[int(name)], seconds=measured.p20)
        result = Tuned(op.name, tune.key(op.name, args), fastest(found), tuple(found))
        self.results.append(result)
        return result

    def _failure(self, op: Op, backend: Backend, config: tuple | None, run: Callable, args: tuple) -> str | None:
        """Why a candidate is discarded, or None."""
        if backend.name == "torch":
            return None
        verdict = self.verdict(op, backend)
        if verdict is None and (reason := judge(op, run, args)):
            verdict = f"on this call: {reason}"
            if config is None:
                self._verdicts[op.name, backend.name] = verdict
        return verdict

    def verdict(self, op: Op, backend: Backend) -> str | None:
        """Why a backend of an op is discarded on this device, or None; kept, for ``store``."""
        name = (op.name, backend.name)
        if name not in self._verdicts:
            self._verdicts[name] = self.on_samples(op, backend)
        return self._verdicts[name]

    def on_samples(self, op: Op, backend: Backend, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
        """Why a backend misses the budget on the op's samples, or loses the NaN that PyTorch keeps; None where neither."""
        for dtype in dtypes:
            args = _with_nan(op.samples(self.device, dtype)[0].args)
            if backend.why_not(*args) is None and (reason := judge(op, backend.load(), args)):
                return f"on a NaN in {str(dtype).removeprefix('torch.')}: {reason}"
            for label, args in laid_out_samples(op, self.device, dtype):
                if backend.why_not(*args) is None and (reason := judge(op, backend.load(), args)):
                    return f"on sample {label!r} in {str(dtype).removeprefix('torch.')}: {reason}"
        return None

    def failures(self) -> dict[str, dict[str, str]]:
        """Discarded backends by op, with the reason."""
        found: dict[str, dict[str, str]] = {}
        for (op, backend), reason in self._verdicts.items():
            if reason is not None:
                found.setdefault(op, {})[backend] = reason
        for result in self.results:
            for candidate in result.candidates:
                if candidate.config is not None and candidate.failure is not None:
                    found.setdefault(result.op, {})[f"{candidate.backend} {candidate.config}"] = candidate.failure
        return found

    def store(self) -> str:
        """Write the results to the user's cache, where the next call of each op finds them. Returns the file's path."""
        verdicts: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
        for (op, backend), reason in self._verdicts.items():
            verdicts[reason is None].setdefault(backend, []).append(op)
        choices = {result.key: _entry(result) for result in self.results}
        path = tune.store(self.device, verdicts[True], choices, verdicts[False])
        dispatch.forget()
        return str(path)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": tune.device_name(self.device), "discarded": self.failures(),
            "calls": [result.to_dict() for result in self.results],
        }  # fmt: skip


def tune_call(op: str, *args: Any, seconds: float = 0.5, store: bool = True) -> Tuned:
    """Tune one call of an op, given its positional arguments as in ``torch.ops.fastres.<op>``.

    Raises:
        ArgumentError: no such op, or arguments it does not take.
        UnsupportedError: the user's cache is corrupt; it is left as it is.
    """
    if op not in REGISTRY:
        raise must("tuner.tune_call", "op", f"one of {sorted(REGISTRY)}", repr(op))
    REGISTRY[op].check(*args)
    if store:
        tune.check_writable(_device(args))
    session = Session(_device(args), seconds)
    result = session.tune(REGISTRY[op], args)
    if store:
        session.store()
    return result


def tune_model(
    model: nn.Module,
    x: Tensor,
    *,
    seconds: float = 0.5,
    configurations: bool = True,
    store: bool = True,
    step: Callable[[str, int], object] | None = None,
) -> Session:
    """Tune every distinct call of an op that the model makes on x, in its present mode; the model is not changed.

    In training mode a copy of the model runs forward and backward, so that gradients are tuned too.

    Args:
        configurations: False times only each backend's default, in a fraction of the time.
        step: called before each call with its key and the number of calls.

    Raises:
        UnsupportedError: no fastres op runs in the model, or the user's cache is corrupt and was left as it is.
    """
    if store:
        tune.check_writable(x.device)  # or fail now, not after minutes of work
    calls = record(model, x)
    if not calls:
        raise UnsupportedError(f"fastres.tuner: no fastres op runs in this model ({_what_to_do(model)})")
    session = Session(x.device, seconds, configurations)
    for key, (op, args) in calls.items():
        if step is not None:
            step(key, len(calls))
        if op.fallback is not None and store:
            session.store()  # so that the ops it is timed against run as tuned
        session.tune(op, args)
    if store:
        session.store()
    return session


def _what_to_do(model: nn.Module) -> str:
    """About a model that runs no op."""
    from fastres.optimize.swap import state_of  # which imports most of fastres; tuning rarely asks for it

    if any(state_of(module) is not None for module in model.modules()):
        return "fastres.optimize found nothing to fuse, so there is nothing to tune; fastres.explain(model) says why"
    return "call fastres.optimize(model) first"


def record(model: nn.Module, x: Tensor) -> dict[str, tuple[Op, tuple]]:
    """The distinct op calls, by tuning key, that the model makes on x; in training mode those of backward too."""
    if model.training:
        twin = copy.deepcopy(model)
        return recorded(lambda: twin(x.detach().clone()).float().square().mean().backward())
    with torch.no_grad():
        return recorded(lambda: model(x))


def recorded(call: Callable[[], object]) -> dict[str, tuple[Op, tuple]]:
    """The distinct op calls, by tuning key, that one call makes."""
    recorder = _Recorder()
    with recorder:
        call()
    return recorder.calls


class _Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of every distinct fastres call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Op, tuple]] = {}
        self.ends, self.norms = ProjectedEnds(), ConvNormPairs()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        y = func(*args, **(kwargs or {}))
        self.norms.made(func, args, y)
        if func.namespace == "fastres":
            args = tuple(tuple(a) if isinstance(a, list) else a for a in args)
            self.keep(REGISTRY[func._opname], args)
            self.ends.made(func._opname, args, y)
            end = self.ends.joined(func._opname, args) if may_join(_device(args)) else None
            if end is not None:  # not chosen so far: tuning finds out whether it should be
                self.keep(CONV_BN_ADD_CONV_BN_ACT, end)
            for op, call in self.norms.missed(func._opname, args):  # as above
                self.keep(op, call)
        return y

    def keep(self, op: Op, args: tuple) -> None:
        key = tune.key(op.name, args)
        if key not in self.calls:
            self.calls[key] = (op, tuple(_copy(a) for a in args))


def _copy(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value


def _device(args: tuple) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def ways(op: Op, backend: Backend, args: tuple, configurations: bool) -> Iterator[tuple[tuple | None, Callable]]:
    """A backend's function as it is by default and, where wanted, in each of its configurations."""
    instead = op.fallback if backend.name == "torch" else None
    yield None, instead or backend.load()
    for config in backend.configs(*args) if configurations and backend.configs is not None else ():
        yield tuple(config), backend.load(config)


def laid_out_samples(op: Op, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """The op's samples in both memory formats, with their labels."""
    for sample, layout in itertools.product(op.samples(device, dtype), LAYOUTS):
        images = (isinstance(a, Tensor) and a.dim() == 4 for a in sample.args)
        pairs = zip(sample.args, images, strict=True)
        yield sample.label, tuple(a.contiguous(memory_format=layout) if image else a for a, image in pairs)


def _with_nan(args: tuple) -> tuple:
    """The arguments with one NaN in the first activation, in channels_last, which fused convolutions on GPUs need."""
    first, *rest = (
        a.clone(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args
    )
    if first.is_floating_point():
        first[(0,) * first.dim()] = torch.nan
    return first, *rest


def judge(op: Op, run: Callable, args: tuple) -> str | None:
    """Compare one backend's function with float64 on one call: why it fails, or None."""
    return Truth(op, args).judge(run)


class Truth:
    """What an op gives for one call in float64, and PyTorch's result at the call's dtype."""

    def __init__(self, op: Op, args: tuple) -> None:
        self.op, self.args = op.name, args
        real = (arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        self.dtype = next(real, torch.float32)  # of integers alone: never asked for
        wide = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        with torch.no_grad():
            self.exact, self.same = _outputs(op.reference(*wide)), _outputs(op.reference(*args))

    def judge(self, run: Callable) -> str | None:
        """Why a function's result for this call fails, or None."""
        try:
            with torch.no_grad():
                actual = _outputs(run(*self.args))
        except Exception as error:  # whatever a kernel raises on this device rules it out, with the reason
            return f"it raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        outputs = zip(actual, self.same, self.exact, spreads(self.op, self.args, self.exact), strict=True)
        for index, (found, expected, exact, spread) in enumerate(outputs):
            if found.dtype == torch.uint8:  # a mask: of this backend's own output, which may round differently
                if not torch.equal(found, _mask.pack(actual[0], self.args[-1])):
                    return f"output {index} is not the mask of output 0"
                continue
            if not expected.is_floating_point():  # integers must be equal
                if not torch.equal(found, expected):
                    return f"output {index} has other integers"
                continue
            verdict = within_budget(found, expected, exact, self.dtype, spread)
            if not verdict.ok:
                return f"output {index} has error {verdict.error:.2g}, allowed is {verdict.allowed:.2g}"
        return None


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest; among ties the first on the op's page, but never one slower than PyTorch."""
    timed = [c for c in candidates if c.seconds is not None]
    limit = min(c.seconds for c in timed if c.seconds is not None) * TIE
    torch_seconds = next(c.seconds for c in timed if c.backend == "torch")
    assert torch_seconds is not None
    return next(c for c in timed if c.seconds is not None and c.seconds <= min(limit, torch_seconds))


def _entry(result: Tuned) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "backend": result.chosen.backend,
        "seconds": result.chosen.seconds,
        "speedup": result.speedup,
    }
    if result.chosen.config is not None:
        entry["config"] = list(result.chosen.config)
    return entry
