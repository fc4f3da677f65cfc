"""``graph``: a training step as one replay of a CUDA graph, for when the host cannot launch kernels as fast as a GPU runs them.

The first calls are ordinary steps that serve as warm-up: kernels are chosen and compiled, the optimizer makes its state. Then
the step is captured, which computes nothing, and replayed. So only the caller's own calls change what is trained.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fastres.errors import UnsupportedError, must, must_type

WARM_UPS = 3
DEVICES = {"cuda"}
_HOW_TO = (
    "It must not wait for the GPU (.item(), printing a value, GradScaler with an optimizer that is not fused) nor copy from "
    "the host, and no loss of an earlier step may be alive"
)


def graph(step: Callable[..., Any], model: nn.Module, optimizer: Optimizer) -> "GraphedStep":
    """A training step that runs as one CUDA graph from its fourth call on, with the same results.

    ``loss = fastres.graph(step, model, optimizer)(x, y)`` is equivalent to ``loss = step(x, y)``; outputs are detached copies.
    ``step`` sets the gradients to None and runs forward, backward and ``optimizer.step()``. Autocast and a GradScaler belong
    inside it, a learning rate scheduler outside. On the CPU every call runs ``step``; ``captured`` and ``why`` say so.

    Inputs are tensors on the model's device, with the shapes and dtypes of the first call. A batch that is smaller in the first
    dimension, such as the last one of an epoch, runs uncaptured. ``group["lr"]`` may change between calls; on a GPU it is
    used in float32. Everything else stays as captured: the mode, hooks, chosen kernels, what Python does in ``step``.

    Args:
        step: ``step(*inputs)`` returns a tensor, or tuples, lists and dicts of tensors.
        model: owns the parameters and buffers that a step changes; put several into an ``nn.ModuleList``.
        optimizer: on a GPU, one that reads its learning rate there: ``SGD(..., fused=True)``, ``Adam(..., capturable=True)``.

    Raises:
        ArgumentTypeError, ArgumentError: an argument, or an input of a call, is not what it must be.
        UnsupportedError: the optimizer, or at a call the step, cannot be captured; or what was captured has changed since: the
            mode, options of the optimizer, where parameters lie (``optimizer.load_state_dict``). Nothing was computed then.
    """
    if not callable(step):
        raise must_type("graph", "step", "a function", step)
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if not isinstance(value, kind):
            raise must_type("graph", name, f"a torch {kind.__name__}", value)
    return GraphedStep(step, model, optimizer)


class GraphedStep:
    """What ``graph`` returns; called as the step itself."""

    def __init__(self, step: Callable[..., Any], model: nn.Module, optimizer: Optimizer) -> None:
        self._step, self._model, self._optimizer = step, model, optimizer
        self._device = _device(optimizer)
        self._on_gpu = self._device.type in DEVICES
        self._expected: list[tuple[torch.dtype, torch.Size]] | None = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._on_gpu:
            _check_capturable(optimizer)
            self._stream = torch.cuda.Stream(self._device)
            self._rates = [torch.zeros((), device=self._device) for _ in optimizer.param_groups]
            self._filled: list[Any] = [None] * len(self._rates)

    @property
    def captured(self) -> bool:
        """Whether full batches are replayed."""
        return self._graph is not None

    @property
    def why(self) -> str | None:
        """Why they are not yet, or never; None where they are."""
        if not self._on_gpu:
            return f"the parameters are on {self._device}: only a GPU has CUDA graphs"
        return None if self.captured else f"{self._calls} of {WARM_UPS} warm-up calls before the capture were made"

    def __call__(self, *inputs: Tensor) -> Any:
        full = self._check(inputs)
        if not self._on_gpu:
            found = self._step(*inputs)
            torch.autograd.graph.increment_version(self._owned())
            return _copies(found)
        with torch.cuda.device(self._device):
            self._set_rates()
            if full and self._graph is None and self._calls == WARM_UPS:
                self._capture(inputs)
            if full and self._graph is not None:
                return self._replay(inputs)
            self._calls += full
            return self._uncaptured(inputs)

    def _check(self, inputs: tuple[Any, ...]) -> bool:
        """Whether the inputs are as large as those of the first call; raises where they differ in more than a smaller batch."""
        for index, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise must_type("graph", f"input {index}", "a torch.Tensor", x)
            if x.device != self._device:
                raise must(
                    "graph", f"input {index}", f"on {self._device}, like the parameters", x.device, "move it first"
                )
            if x.requires_grad:
                raise must("graph", f"input {index}", "without gradient", "one that requires it", "detach it")
        if self._expected is None:
            self._expected = [(x.dtype, x.shape) for x in inputs]
        if len(inputs) != len(self._expected):
            raise must("graph", "inputs", f"{len(self._expected)} tensors, as in the first call", len(inputs))
        for index, (x, (dtype, shape)) in enumerate(zip(inputs, self._expected, strict=True)):
            if x.dtype != dtype or x.dim() != len(shape) or x.shape[1:] != shape[1:] or x.shape[:1] > shape[:1]:
                what = f"{dtype} of shape {tuple(shape)} as in the first call, or fewer in the first dimension"
                got = f"{x.dtype} of shape {tuple(x.shape)}"
                raise must("graph", f"input {index}", what, got, "make another graph for another shape")
        return all(x.shape == shape for x, (_, shape) in zip(inputs, self._expected, strict=True))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _owned(self) -> list[Tensor]:
        """What a step may change. The versions of these tensors, by which stale folded weights are noticed, are advanced after
        each step, since a replay, fused optimizers and PyTorch's batch norm do not advance them."""
        found = (*self._parameters(), *self._model.parameters(), *self._model.buffers())
        return list({id(t): t for t in found}.values())

    def _set_rates(self) -> None:
        """Copy the groups' learning rates, which schedulers write, to where the GPU reads them."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._rates):
            raise UnsupportedError(
                "fastres.graph: the optimizer has more or fewer parameter groups than at first: make another graph"
            )
        for index, (group, rate) in enumerate(zip(groups, self._rates, strict=True)):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                rate.copy_(lr.detach().reshape(()))
                self._filled[index] = None
            elif lr != self._filled[index]:
                rate.fill_(lr)
                self._filled[index] = lr

    def _once(self, inputs: Any) -> Any:
        """Run the step with the rates on the device; refuses what a replay would not repeat."""
        if torch.is_autocast_enabled(self._device.type):
            raise UnsupportedError(
                "fastres.graph: called under autocast, which would cache the weights that it casts: move it into step"
            )
        parameters, groups = self._parameters(), self._optimizer.param_groups
        before, given = [p.grad for p in parameters], [group["lr"] for group in groups]
        versions = [rate._version for rate in self._rates]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            outputs = self._step(*inputs)
            same = [group["lr"] is rate for group, rate in zip(groups, self._rates, strict=True)]
        finally:
            for group, lr in zip(groups, given, strict=True):
                group["lr"] = lr
        torch.autograd.graph.increment_version(self._owned())
        if not all(same) or versions != [rate._version for rate in self._rates]:
            raise UnsupportedError(
                "fastres.graph: step changes the learning rate: call the scheduler after it, outside"
            )
        if any(old is not None and p.grad is old for p, old in zip(parameters, before, strict=True)):
            raise UnsupportedError(
                "fastres.graph: step adds to earlier gradients, or leaves some unchanged: it must begin with "
                "optimizer.zero_grad(set_to_none=True)"
            )
        return tree_map_only(Tensor, Tensor.detach, outputs)  # which lets autograd's graph go

    def _uncaptured(self, inputs: tuple[Tensor, ...]) -> Any:
        """An ordinary call, on the stream of the capture: autograd uses one stream per parameter."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            outputs = _copies(self._once(inputs))
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._modules = list(self._model.modules())
        self._owners = [(d, name) for m in self._modules for d in (m._parameters, m._buffers) for name in d]
        self._inputs = [x.clone() for x in inputs]
        before = self._fixed()
        captured = torch.cuda.CUDAGraph()
        gc.collect()  # an earlier step's autograd graph that lives on in a cycle would tie parameters to another stream
        try:
            # The outer stream context restores the current stream, which a failed capture does not. Only this thread's calls
            # are captured: threads that load and pin the next batch may go on.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(captured, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._outputs = self._once(self._inputs)
        except UnsupportedError:
            raise
        except RuntimeError as error:
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            raise UnsupportedError(f"fastres.graph: the step cannot be captured: {reason}. {_HOW_TO}") from error
        if self._fixed() != before:
            raise UnsupportedError(
                "fastres.graph: step makes new tensors for its state at every call, which cannot be captured"
            )
        self._written = self._owned()
        self._gradients = [(p, p.grad) for p in self._parameters()]
        self._as_captured, self._graph = before, captured

    def _replay(self, inputs: tuple[Tensor, ...]) -> Any:
        assert self._graph is not None
        if self._fixed() != self._as_captured:
            raise UnsupportedError(
                "fastres.graph: since the capture the model's mode, an option of the optimizer other than lr, requires_grad or "
                "the place of a parameter, a buffer or the optimizer's state has changed: change it back, or make another graph"
            )
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        self._graph.replay()
        for p, gradient in self._gradients:
            p.grad = gradient
        torch.autograd.graph.increment_version(self._written)
        return _copies(self._outputs)

    def _fixed(self) -> tuple[Any, ...]:
        """Everything that a replay uses as it was captured: options, modes, and where tensors lie."""
        optimizer = self._optimizer
        names = [name for name in optimizer.defaults if name != "lr"]
        values = [group[name] for group in optimizer.param_groups for name in names]
        options = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
        owned = [(t.data_ptr(), t.requires_grad) for owner, name in self._owners if (t := owner[name]) is not None]
        parameters = self._parameters()
        state = [v.data_ptr() for p in parameters for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
        return options, owned, [p.data_ptr() for p in parameters], state, [module.training for module in self._modules]


def _copies(outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), outputs)


def _device(optimizer: Optimizer) -> torch.device:
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1:
        raise UnsupportedError(
            f"fastres.graph: the parameters must be on one device, got {sorted(map(str, devices))}"
        )
    return devices.pop()


def _check_capturable(optimizer: Optimizer) -> None:
    """Refuse optimizers that read the learning rate on the host, and training with other processes."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise UnsupportedError(
            "fastres.graph: several processes train together, and their exchange of gradients cannot be captured"
        )
    for group in optimizer.param_groups:
        if not group.get("capturable") and (not group.get("fused") or "capturable" in group):
            do = (
                "capturable=True"
                if "capturable" in group
                else "fused=True"
                if "fused" in group
                else "another optimizer"
            )
            raise UnsupportedError(
                f"fastres.graph: this {type(optimizer).__name__} reads its learning rate or its count of steps on the host, "
                f"where a graph would freeze the current value: build it with {do}"
            )
