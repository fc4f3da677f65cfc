"""Random calls of the ops: shapes, dtypes, layouts, flags, and memory with red zones around every tensor."""

# ruff: noqa: E501

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastres.ops import REGISTRY
from fastres.ops._conv import output_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded", "transposed", "offset", "negative")
OPS = tuple(name for name, op in REGISTRY.items() if op.differentiable)
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64)
_ZONE = 96  # elements of red zone at either end of a tensor's memory
_RED = 12345.0  # exact in every dtype


def place(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The values (4-D, float64 or narrower) laid out so, in memory that begins and ends with a red zone."""
    sizes, order, step, shift = list(values.shape), (0, 1, 2, 3), 1, 0
    if layout == "expanded":
        values = values[:, :1].expand(values.shape)
        sizes[1] = 1
    elif layout == "channels_last":
        order = (0, 2, 3, 1)
    elif layout == "permuted":
        order = (3, 1, 0, 2)
    elif layout == "transposed":
        order = (0, 1, 3, 2)
    elif layout == "sliced":
        step = 2
    elif layout == "offset":
        shift = 3
    strides, numel = [0] * 4, step
    for dim in reversed(order):
        strides[dim], numel = numel, numel * max(sizes[dim], 1)
    if layout == "expanded":
        strides[1] = 0
    red = _RED if values.is_floating_point() else 99
    memory = torch.full((2 * _ZONE + shift + numel,), red, dtype=values.dtype)
    tensor = memory.as_strided(values.shape, strides, _ZONE + shift)
    source = tensor[:, :1] if layout == "expanded" else tensor
    source.copy_(-values[:, : source.shape[1]] if layout == "negative" else values[:, : source.shape[1]])
    return torch._neg_view(tensor) if layout == "negative" else tensor


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's memory, red zones and gaps included."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


@dataclass(frozen=True)
class Call:
    """One call of an op; ``arguments()`` are the same for the same seed."""

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layouts: tuple[str, str]  # of x and of the residual
    act: str
    eps: float
    affine: tuple[bool, bool]
    window: tuple = ()  # of a pool or a convolution: kernel, stride, padding, dilation
    filters: tuple = ()  # of a convolution: output channels, groups, whether it has a bias
    far: bool = False  # whether the mean is far from zero
    seed: int = 0

    def arguments(self, draw: int = 0) -> list:
        """The op's arguments, in its order."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * draw)
        parameters = torch.float64 if self.dtype == torch.float64 else torch.float32
        channels = self.filters[0] if self.filters else self.shape[1]
        # Folding rounds the weights of a convolution once more, which twenty deviations would show: README's limits say so.
        shift = 0.25 if not self.far else 3.0 if self.filters else 30.0

        def draw_(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        kernel, stride, padding, dilation = (*self.window, None, None, None, None)[:4]
        groups = self.filters[1] if self.filters else 1
        conv = draw_(channels, self.shape[1] // groups, *kernel) if self.filters else None
        y_shape = (
            output_shape(torch.empty(self.shape, device="meta"), conv, stride, padding, dilation)
            if self.filters
            else self.shape
        )
        found = {
            "x": place((draw_(*self.shape) * 1.5 + shift).to(self.dtype), self.layouts[0]),
            "residual": place(draw_(*y_shape).to(self.dtype), self.layouts[1]),
            "act": self.act, "eps": self.eps, "residual_eps": self.eps, "kernel": kernel, "kernel_size": kernel, "stride": stride,
            "padding": padding, "dilation": dilation, "groups": groups,
        }  # fmt: skip
        if self.op == "conv_bn_act_maxpool":  # a pool that any output is large enough for
            three = self.seed % 2 == 0
            found |= {"kernel_size": (3, 3) if three else (2, 2), "pool_stride": (2, 1 + self.seed // 2 % 2), "pool_padding": (1, 1)}
        if self.op == "conv_bn_add_conv_bn_act":
            found |= self.projection(draw_, y_shape, shift)
        for prefix, scale in (("bn_", self.affine[0]), ("residual_", self.affine[1]), ("", self.affine[0])):
            own = {"weight": draw_(channels), "bias": draw_(channels)}
            found |= {f"{prefix}{k}": v.to(parameters) if scale else None for k, v in own.items()}
        for prefix in ("", "residual_"):
            found[f"{prefix}mean"] = (draw_(channels) * 0.2 + (0.0 if self.filters else shift)).to(parameters)
            found[f"{prefix}var"] = (draw_(channels).square() + 0.3).to(parameters)
        if self.filters:
            found["weight"] = (conv / math.sqrt(conv[0].numel())).to(parameters)
            found["bias"] = draw_(channels).to(parameters) if self.filters[2] else None
        if self.op in ("conv", "conv_statistics"):  # whose parameters have the dtype of its images
            found |= {name: None if found[name] is None else found[name].to(self.dtype) for name in ("weight", "bias")}
        return [found[name] for name in REGISTRY[self.op].parameters]

    def projection(self, draw_: Callable, y_shape: tuple, shift: float) -> dict:
        """A shortcut's input and the parameters of its convolution, of a stride of its own."""
        stride, channels, depth = (1 + self.seed % 2, 1 + self.seed // 2 % 2), y_shape[1], self.shape[1] // 2 + 1
        size = [(side - 1) * step + 1 + self.seed // 4 % step for side, step in zip(y_shape[2:], stride, strict=True)]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        values = {name: draw_(channels).to(wide) for name in ("bn_weight", "bn_bias", "bias", "mean")}
        if not self.affine[1]:
            values |= {"bn_weight": None, "bn_bias": None}
        values |= {"weight": (draw_(channels, depth, 1, 1) / math.sqrt(depth)).to(wide)}
        values |= {"var": (draw_(channels).square() + 0.3).to(wide), "eps": self.eps, "stride": stride}
        values["bias"] = values["bias"] if self.filters[2] else None
        image = place((draw_(y_shape[0], depth, *size) * 1.5 + shift).to(self.dtype), self.layouts[1])
        return {"shortcut": image} | {f"shortcut_{name}": value for name, value in values.items()}


def calls(ops: tuple[str, ...] = OPS, train_values: int = 1) -> st.SearchStrategy[Call]:
    """Calls that are right; a training op has at least ``train_values`` values a channel."""

    @st.composite
    def build(draw) -> Call:
        op = draw(st.sampled_from(ops))
        size = st.integers(1, 9)
        shape = (draw(st.integers(1, 3)), draw(st.sampled_from(CHANNELS)), draw(size), draw(size))
        window: tuple = ()
        filters: tuple = ()
        if "pool" in op or "conv" in op:
            kernel = (draw(st.sampled_from((1, 2, 3, 5, 7))), draw(st.sampled_from((1, 2, 3))))
            stride = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
            most = tuple(k // 2 for k in kernel) if "pool" in op else (3, 3)
            padding = (draw(st.integers(0, most[0])), draw(st.integers(0, most[1])))
            dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2))) if "conv" in op else (1, 1)
            spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
            assume(all(s + 2 * p >= span for s, p, span in zip(shape[2:], padding, spans, strict=True)))
            window = (kernel, stride, padding, dilation)
        if "conv" in op:
            # PyTorch's own can end the process over a window that lies wholly in the padding (2.13.0, channels_last).
            assume(all(p < span for p, span in zip(padding, spans, strict=True)))
            groups = draw(st.sampled_from([g for g in (1, 1, 2, 4, 8, 16) if shape[1] % g == 0]))
            filters = (groups * draw(st.sampled_from((1, 2, 3, 7, 8, 16, 17))), groups, draw(st.booleans()))
        dtype, far = draw(st.sampled_from(DTYPES)), draw(st.booleans())
        if dtype == torch.float64:  # whose truth has no more digits than PyTorch's own result: nothing may amplify rounding
            far, train_least = False, 16
        else:
            train_least = max(train_values, 2)
        if "train" in op:
            assume(shape[0] * shape[2] * shape[3] >= train_least)
        elif op == "conv_statistics":  # of y
            sides = zip(shape[2:], padding, spans, stride, strict=True)
            assume(shape[0] * math.prod((s + 2 * p - span) // t + 1 for s, p, span, t in sides) >= train_least)
        layout = st.sampled_from(LAYOUTS)
        same = draw(layout)
        return Call(
            op, shape, dtype, (same, draw(st.one_of(st.just(same), layout))),
            draw(st.sampled_from(("relu", "none"))), draw(st.sampled_from((1e-5, 1e-3, 1e-12))),
            (draw(st.booleans()), draw(st.booleans())), window, filters, far, draw(st.integers(0, 2**31)),
        )  # fmt: skip

    return build()
