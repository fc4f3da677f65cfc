"""cuDNN's graphs of several operations of a training step, by its Python frontend (nvidia-cudnn-frontend): which it takes,
whether they keep the budget, and their time against what fastres runs for the same work.

A layer here is the batch norm and ReLU before a convolution, by given scale and bias, and the convolution, of whose output the
next batch norm asks statistics. fastres does not use these graphs: what is measured here decides whether it should.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from fastres import budget
from fastres.experiments.compare import Row
from fastres.experiments.rivals import FASTRES
from fastres.experiments.subject import DTYPES
from fastres.frozen.calls import EPS, identity_norm
from fastres.ops import REGISTRY

GRAPH, AGAIN = "cudnn graph", "fastres, made again"
# Channels in and out, kernel, stride and side of ResNet-50's convolutions whose time memory bounds, and the 3x3 ones.
SIZES = [
    [64, 256, 1, 1, 56], [256, 64, 1, 1, 56], [64, 64, 3, 1, 56], [128, 128, 3, 1, 28], [512, 128, 1, 1, 28],
    [256, 256, 3, 1, 14], [512, 512, 3, 1, 7],
]  # fmt: skip
TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}  # by cuDNN's names
STAGES = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
SECONDS = 0.3  # of one graph's rows together
MOST_TEXT = 600  # characters of a refusal, which tells of every engine


class Refused(Exception):
    """cuDNN does not take a graph; the text is the stage at which it said so, and why."""


class Layer(NamedTuple):
    """x, which batch norm takes, its scale and bias (1, C, 1, 1) in x's dtype, the weight, the gradient of the output."""

    x: Tensor
    scale: Tensor
    bias: Tensor
    weight: Tensor
    grad_y: Tensor
    stride: int
    padding: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        return (self.stride, self.stride), (self.padding, self.padding), (1, 1), 1

    def double(self) -> "Layer":
        return Layer(*(value.double() if isinstance(value, Tensor) else value for value in self))


def layer(batch: int, convolution: list[int], dtype: torch.dtype, place: torch.device) -> Layer:
    """Channels in and out, kernel, stride and side of the input, as in the tasks of kernels."""
    channels, out, kernel, stride, side = convolution
    padding, generator = kernel // 2, torch.Generator(place).manual_seed(0)
    out_side = (side + 2 * padding - kernel) // stride + 1

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=place)
        return drawn.to(dtype).contiguous(memory_format=torch.channels_last)

    scale, bias = draw(1, channels, 1, 1).abs() + 0.5, draw(1, channels, 1, 1) / 4
    weight = draw(out, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5
    x, grad_y = draw(batch, channels, side, side), draw(batch, out, out_side, out_side)
    return Layer(x, scale, bias, weight, grad_y, stride, padding)


# ---- what PyTorch computes, in a layer's dtype -------------------------------------------------------------------------


def _normed(layer: Layer) -> Tensor:
    wide = torch.float64 if layer.x.dtype == torch.float64 else torch.float32
    return layer.x.to(wide) * layer.scale + layer.bias


def _activated(layer: Layer) -> Tensor:
    return _normed(layer).relu().to(layer.x.dtype)


def _with_statistics(layer: Layer, x: Tensor) -> list[Tensor]:
    return list(REGISTRY["conv_statistics"].reference(x, layer.weight, *layer.geometry))


def _gradient(layer: Layer, x: Tensor, which: int) -> Tensor:
    """Of x (0) or of the weight (1)."""
    stride, padding, dilation, groups = layer.geometry
    wanted = [which == 0, which == 1, False]
    found = torch.ops.aten.convolution_backward(
        layer.grad_y, x, layer.weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return found[which]


def _masked_with_sums(layer: Layer) -> list[Tensor]:
    """The gradient of batch norm's output, and its sums alone and times x, which batch norm's backward asks for."""
    normed = _normed(layer)
    dz = torch.where(normed > 0, _gradient(layer, layer.x, 0), 0)
    wide = dz.to(normed.dtype)
    return [dz, wide.sum((0, 2, 3)), (wide * layer.x).sum((0, 2, 3))]


# ---- what fastres runs -------------------------------------------------------------------------------------------------


def _apply(layer: Layer) -> Callable[[], Tensor]:
    """Batch norm and ReLU by known statistics."""
    scale, bias = (t.flatten().float() for t in (layer.scale, layer.bias))
    mean, var = identity_norm(len(scale), scale.device)
    return lambda: REGISTRY["bn_act"](layer.x, scale, bias, mean, var, EPS, "relu")


def _convolve(layer: Layer, x: Callable[[], Tensor]) -> Callable[[], Any]:
    """The convolution and its statistics, as training runs them: in one kernel where one is chosen."""
    op, weight, geometry = REGISTRY["conv_statistics"], layer.weight, layer.geometry
    run: Any = op.fallback if op.falls_back(x(), weight, *geometry) else op
    return lambda: run(x(), weight, *geometry)


def _backward_of_norm(layer: Layer) -> Callable[[], Any]:
    """The gradient of the convolution's input, then all of batch norm's backward, the ReLU's mask in it."""
    scale, bias = (t.flatten().float() for t in (layer.scale, layer.bias))
    mean, var = identity_norm(len(scale), scale.device)
    op = REGISTRY["bn_act_backward"]
    return lambda: op(_gradient(layer, layer.x, 0), layer.x, scale, bias, mean, var, EPS, "relu", True)


def _wgrad_again(layer: Layer) -> Callable[[], Any]:
    """The gradient of the weight where the output of batch norm and ReLU is not kept but made again."""
    apply = _apply(layer)
    return lambda: _gradient(layer, apply(), 1)


def _rest_of_norm(layer: Layer, dz: Tensor) -> Callable[[], Any]:
    """What batch norm's backward has left to do once it knows its sums: a sum of two tensors, each times a number a channel."""
    scale = layer.scale.flatten().float()
    given = None, None, torch.zeros_like(scale), torch.ones_like(scale), EPS
    return lambda: REGISTRY["bn_add_bn_act"](layer.x, dz, *given, *given, "none")


# ---- graphs ------------------------------------------------------------------------------------------------------------


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of channels_last, also where a size of 1 leaves others open."""
    _, c, h, w = shape
    return [c * h * w, 1, c * w, c]


class Graph:
    """A graph while it is drawn, and its plan. ``options``: cuDNN's handle, or what stands for a device."""

    def __init__(self, cudnn: Any, dtype: torch.dtype, place: torch.device, **options: Any) -> None:
        self.cudnn, self.place, self.options = cudnn, place, options
        kinds = {"io_data_type": self._type(dtype), "intermediate_data_type": self._type(torch.float32)}
        self.ops = cudnn.pygraph(**kinds, compute_data_type=self._type(torch.float32), **options)
        self.buffers: dict[Any, Tensor] = {}
        self.outputs: list[Tensor] = []

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self.cudnn.data_type, TYPES[dtype])

    def put(self, name: str, tensor: Tensor) -> Any:
        shape = tuple(tensor.shape)
        node = self.ops.tensor(name=name, dim=list(shape), stride=_strides(shape), data_type=self._type(tensor.dtype))
        self.buffers[node] = tensor
        return node

    def out(self, node: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        node.set_output(True).set_data_type(self._type(dtype)).set_dim(list(shape)).set_stride(_strides(shape))
        buffer = torch.empty(shape, dtype=dtype, device=self.place, memory_format=torch.channels_last)
        self.buffers[node] = buffer
        self.outputs.append(buffer)

    def total(self, node: Any, channels: int) -> None:
        """The sum of each channel goes out."""
        mode = self.cudnn.reduction_mode.ADD
        self.out(self.ops.reduction(input=node, mode=mode), (1, channels, 1, 1), torch.float32)

    def normed(self, layer: Layer) -> Any:
        x = self.ops.scale(input=self.put("x", layer.x), scale=self.put("scale", layer.scale))
        return self.ops.bias(input=x, bias=self.put("bias", layer.bias))

    def convolution(self, layer: Layer, x: Any) -> Any:
        y = self.ops.conv_fprop(image=x, weight=self.put("weight", layer.weight), **_window(layer))
        self.out(y, tuple(layer.grad_y.shape), layer.x.dtype)
        return y

    def plan(self) -> None:
        """Ask for a plan that runs it."""
        modes = [self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK]
        for stage in STAGES:
            try:
                getattr(self.ops, stage)(*([modes] if stage == "create_execution_plans" else []))
            except Exception as error:  # of whatever type: it is the answer
                raise Refused(f"{stage}: {_reasons(error)}") from error
        self.workspace = torch.empty(max(self.ops.get_workspace_size(), 1), dtype=torch.uint8, device=self.place)

    def run(self) -> None:
        handle = self.options["handle"]
        if self.place.type == "cuda":  # which another one is while calls are captured
            self.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        self.ops.execute(self.buffers, self.workspace, handle=handle)


def _window(layer: Layer) -> dict[str, list[int]]:
    (stride, padding, dilation, _) = layer.geometry
    return {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}


def _reasons(error: Exception) -> str:
    """A refusal's first line, and the different reasons that the engines gave."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reasons = dict.fromkeys(line.partition("Reason: ")[2] for line in lines if "Reason: " in line)
    return "; ".join([lines[0], *reasons])[:MOST_TEXT]


def _draw_genstats(graph: Graph, layer: Layer, x: Any) -> None:
    channels = layer.weight.shape[0]
    for total in graph.ops.genstats(input=graph.convolution(layer, x)):
        graph.out(total, (1, channels, 1, 1), torch.float32)


def _draw_prologue_genstats(graph: Graph, layer: Layer) -> None:
    _draw_genstats(graph, layer, graph.ops.relu(input=graph.normed(layer)))


def _draw_sums(graph: Graph, layer: Layer) -> None:
    y = graph.convolution(layer, graph.put("x", layer.x))
    for node in (y, graph.ops.mul(a=y, b=y)):
        graph.total(node, layer.weight.shape[0])


def _draw_dgrad(graph: Graph, layer: Layer) -> None:
    loss, weight = graph.put("grad_y", layer.grad_y), graph.put("weight", layer.weight)
    grad = graph.ops.conv_dgrad(loss=loss, filter=weight, **_window(layer))
    grad.set_dim(list(layer.x.shape)).set_stride(_strides(tuple(layer.x.shape)))
    x = graph.put("x", layer.x)
    normed = graph.ops.scale(input=x, scale=graph.put("scale", layer.scale))
    normed = graph.ops.bias(input=normed, bias=graph.put("bias", layer.bias))
    dz = graph.ops.relu_backward(loss=grad, input=normed)
    graph.out(dz, tuple(layer.x.shape), layer.x.dtype)
    for node in (dz, graph.ops.mul(a=dz, b=x)):
        graph.total(node, layer.x.shape[1])


def _draw_wgrad(graph: Graph, layer: Layer) -> None:
    image, loss = graph.ops.relu(input=graph.normed(layer)), graph.put("grad_y", layer.grad_y)
    grad = graph.ops.conv_wgrad(image=image, loss=loss, **_window(layer))
    graph.out(grad, tuple(layer.weight.shape), layer.weight.dtype)


def _statistics(outputs: list[Tensor]) -> list[Tensor]:
    """y, then mean and variance of two sums."""
    y, total, squares = outputs
    mean, square = (t.flatten().double() * (t.numel() / y.numel()) for t in (total, squares))
    return [y, mean.float(), (square - mean * mean).float()]


def _flat(outputs: list[Tensor]) -> list[Tensor]:
    return [t.flatten() if t.shape[0] == 1 and t.shape[2:] == (1, 1) else t for t in outputs]


class Pattern(NamedTuple):
    """A graph: how it is drawn; what PyTorch computes, what the graph's outputs are beside that, by whose spreads they are
    judged; what fastres runs, and another way of its own; what has to run behind the graph."""

    draw: Callable[[Graph, Layer], None]
    exact: Callable[[Layer], list[Tensor]]
    outputs: Callable[[list[Tensor]], list[Tensor]]
    judged_as: str
    ours: Callable[[Layer], Callable[[], Any]]
    again: Callable[[Layer], Callable[[], Any]] | None = None
    behind: Callable[[Layer, Tensor], Callable[[], Any]] | None = None


STATISTICS = "conv_statistics"
PATTERNS = {
    "scale-bias-relu-conv-genstats": Pattern(
        _draw_prologue_genstats, lambda layer: _with_statistics(layer, _activated(layer)), _statistics, STATISTICS,
        lambda layer: _convolve(layer, _apply(layer)),
    ),
    "conv-genstats": Pattern(
        lambda graph, layer: _draw_genstats(graph, layer, graph.put("x", layer.x)),
        lambda layer: _with_statistics(layer, layer.x), _statistics, STATISTICS,
        lambda layer: _convolve(layer, lambda: layer.x),
    ),
    "conv-sums": Pattern(
        _draw_sums, lambda layer: _with_statistics(layer, layer.x), _statistics, STATISTICS,
        lambda layer: _convolve(layer, lambda: layer.x),
    ),
    "dgrad-drelu-sums": Pattern(
        _draw_dgrad, _masked_with_sums, _flat, "bn_act_backward", _backward_of_norm, behind=_rest_of_norm,
    ),
    "scale-bias-relu-wgrad": Pattern(
        _draw_wgrad, lambda layer: [_gradient(layer, _activated(layer), 1)], _flat, "conv_backward",
        lambda layer: functools.partial(_gradient, layer, _activated(layer), 1),
        again=_wgrad_again,
    ),
}  # fmt: skip


# ---- the rows ----------------------------------------------------------------------------------------------------------


@functools.cache
def handle(cudnn: Any) -> Any:
    return cudnn.create_handle()


def judge(pattern: Pattern, layer: Layer, outputs: list[Tensor]) -> str | None:
    """Why a graph's outputs miss the budget, or None."""
    exact, same = pattern.exact(layer.double()), pattern.exact(layer)
    spreads = budget.spreads(pattern.judged_as, (exact[0],), exact)
    for index, found in enumerate(zip(pattern.outputs(outputs), same, exact, strict=True)):
        verdict = budget.within_budget(*found, layer.x.dtype, spreads[index])
        if not verdict.ok:
            return f"output {index} has error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
    return None


def rows(cudnn: Any, task: dict[str, Any], place: torch.device) -> list[Row]:
    """Of one graph: why cuDNN refuses it; else whether it keeps the budget, and then its time beside that of fastres."""
    pattern, dtype, (channels, out, kernel, stride, _) = PATTERNS[task["name"]], DTYPES[task["dtype"]], task["convolution"]
    common: Row = {"name": f"{task['name']} {kernel}x{kernel}/{stride} {channels}→{out}", "shape": task["shape"]}
    common |= {"dtype": task["dtype"], "frontend": cudnn.__version__, "cudnn": cudnn.backend_version_string()}
    refused = {**common, "rival": GRAPH}
    arguments = layer(task["shape"][0], task["convolution"], dtype, place)
    try:
        graph = Graph(cudnn, dtype, place, handle=handle(cudnn))
        pattern.draw(graph, arguments)
        graph.plan()
    except Refused as reason:
        return [{**refused, "missing": str(reason)}]
    graph.run()
    failure = judge(pattern, arguments, graph.outputs)
    if failure is not None:
        return [{**refused, "ok": False, "failure": failure}]
    rest = None if pattern.behind is None else pattern.behind(arguments, graph.outputs[0])
    calls = {FASTRES: pattern.ours(arguments), GRAPH: graph.run if rest is None else lambda: (graph.run(), rest())}
    calls |= {} if pattern.again is None else {AGAIN: pattern.again(arguments)}
    with torch.no_grad():
        return harness.rows_of(common, calls, {GRAPH: {"ok": True}}, place, seconds=SECONDS)
