"""The public ops as a user calls them, with the PyTorch a user would write; every op of the registry is in a case."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.ops import REGISTRY, conv_int8

JOINED, CHAIN = "conv_bn_add_conv_bn_act", "conv_bn_act_conv_bn_add_act"
LONG_CHAIN = f"{CHAIN}_conv_bn_act"
STEM, GRADIENT = "conv_bn_act_maxpool", "conv_backward_bn_act"
INTEGERS = "conv_int8"
AROUND = {  # the ops around it, with what they take behind x: a stem's
    "quantize_int8": (50.0, 120, 4, (3, 3)), "pool_int8": ((3, 3), (2, 2), (1, 1), False, None, None),
}  # fmt: skip
SEVERAL = (JOINED, CHAIN, LONG_CHAIN)  # convolutions in one op


@dataclass(frozen=True)
class Case:
    """One op in one pass: ``fused(*tensors)`` and ``eager(*tensors)`` compute the same."""

    op: str
    backward: bool
    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    covers: tuple[str, ...]
    residual: bool = False
    convolution: int = 0  # kernel size

    @property
    def id(self) -> str:
        return f"{self.op}-{'forward+backward' if self.backward else 'forward'}"

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x (channels_last), then what the op takes: convolution weight, residual, statistics, weight, bias."""
        if self.op == INTEGERS:
            kernel, pad = self.convolution, self.convolution // 2
            weight, geometry = (shape[1], shape[1], kernel, kernel), ((1, 1), (pad, pad), (1, 1))
            return conv_int8.drawn(shape, weight, geometry, self.residual, True, device)[:6]
        generator = torch.Generator(device).manual_seed(0)  # on a GPU: there are hundreds of millions
        if self.op == "quantize_int8":
            return (torch.randn(shape[0], 3, *shape[2:], generator=generator, device=device),)
        if self.op in AROUND:
            return (conv_int8.whole(shape, generator),)

        def image(*size: int) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device).to(dtype)
            return drawn.contiguous(memory_format=torch.channels_last)

        if self.op in SEVERAL:
            return self.several_convolutions(shape, image, generator, device)
        channels, found = shape[1], [image(*shape)]
        depth = 3 if self.op == STEM else channels
        if self.op == STEM:  # shape is that of what is pooled, which comes from images of twice its size
            found = [image(shape[0], depth, 2 * shape[2], 2 * shape[3])]
        if self.residual:
            found.append(image(*shape))
        if self.convolution:
            kernel = self.convolution
            found.append(image(channels, depth, kernel, kernel) / (depth * kernel * kernel) ** 0.5)
        if self.op not in ("add_act", "conv"):
            vectors = torch.randn(4, channels, generator=generator, device=device)
            found += [vectors[0] * 0.1, vectors[1].abs() + 0.5, vectors[2].abs() + 0.3, vectors[3] * 0.1]
        return tuple(found)

    def several_convolutions(
        self, shape: tuple[int, ...], image: Callable[..., Tensor], generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, ...]:
        """x, the shortcut of twice its size and half its channels or the residual, then weight, mean, var, weight and bias of
        each convolution."""
        n, channels, height, width = shape
        found = [image(*shape), image(n, channels // 2, 2 * height, 2 * width) if self.op == JOINED else image(*shape)]
        kernels = [(channels, self.convolution), (found[1].shape[1], 1)] + [(channels, 1)] * (self.op == LONG_CHAIN)
        for depth, kernel in kernels:
            found.append(image(channels, depth, kernel, kernel) / (depth * kernel * kernel) ** 0.5)
            mean, var, weight, bias = torch.randn(4, channels, generator=generator, device=device)
            found += [mean * 0.1, var.abs() + 0.5, weight.abs() + 0.3, bias * 0.1]
        return tuple(found)

    def cost(self, tensors: tuple[Tensor, ...]) -> tuple[int, int]:
        """Bytes and flops of all ops of this case, as their pages give them."""
        forward, y = self.op_args(tensors), self.eager(*tensors)
        backward = (y, y, "relu") if self.op == "add_act" else (y, *forward)
        args = {name: backward if name.endswith("_backward") else forward for name in self.covers}
        if self.op == "conv":
            x, weight, _, *geometry = forward
            args["conv_backward_input"] = (y, weight, x.shape[2:], *geometry)
            args["conv_backward_weight"] = (y, x, weight.shape[2:], *geometry)
        if self.op == "conv_statistics":
            args["bn_act"] = (y,)
        totals = [REGISTRY[name].cost(*args[name]) for name in self.covers]
        return sum(t[0] for t in totals), sum(t[1] for t in totals)

    def op_args(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        if self.op == "add_act":
            return (*tensors, "relu")
        if self.op == "conv":
            return (*tensors, None, (1, 1), (1, 1), (1, 1), 1)
        if self.op == "conv_statistics":
            return (*tensors[:2], (1, 1), (1, 1), (1, 1), 1)
        if self.op == GRADIENT:
            return _of_gradient(*tensors)
        if self.op == INTEGERS:
            return _of_integers(self.convolution, tensors)
        if self.op in AROUND:
            return (*tensors, *AROUND[self.op])
        if self.op in SEVERAL:
            return _of_several(self.op, self.convolution, tensors)
        images, (mean, var, weight, bias) = tensors[:-4], tensors[-4:]
        if self.convolution:
            pad = self.convolution // 2
            *images, kernel = images
            stride, pool = ((2, 2), ((3, 3), (2, 2), (1, 1))) if self.op == STEM else ((1, 1), ())
            return (*images, kernel, None, weight, bias, mean, var, 1e-5, stride, (pad, pad), (1, 1), 1, "relu", *pool)
        norm = (weight, bias, mean, var, 1e-5)
        return (*images, *norm, *(norm if self.op == "bn_add_bn_act" else ()), "relu")


def _convolution(kernel: int, residual: bool) -> tuple[Callable, Callable]:
    pad = kernel // 2

    def fused(x: Tensor, *rest: Tensor) -> Tensor:
        *shortcut, w, mean, var, weight, bias = rest
        run = functional.conv_bn_add_act if residual else functional.conv_bn_act
        return run(x, *shortcut, w, None, mean, var, weight, bias, padding=pad)

    def eager(x: Tensor, *rest: Tensor) -> Tensor:
        *shortcut, w, mean, var, weight, bias = rest
        y = F.batch_norm(F.conv2d(x, w, padding=pad), mean, var, weight, bias)
        return F.relu(y + shortcut[0] if residual else y)

    return fused, eager


def _stem(kernel: int) -> tuple[Callable, Callable]:
    pad = kernel // 2

    def fused(x: Tensor, w: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv_bn_act_maxpool(x, w, None, mean, var, weight, bias, stride=2, padding=pad)

    def eager(x: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, w, stride=2, padding=pad), *norm)), 3, 2, 1)

    return fused, eager


def _of_several(op: str, kernel: int, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The arguments of an op of several convolutions."""
    x, other, *parameters = tensors
    groups = [parameters[i : i + 5] for i in range(0, len(parameters), 5)]
    first, *others = ((w, None, weight, bias, mean, var, 1e-5) for w, mean, var, weight, bias in groups)
    geometry = (1, 1), (kernel // 2,) * 2, (1, 1), 1
    if op == JOINED:
        return (x, other, *first, *geometry, *others[0], (2, 2), "relu")
    return (x, other, *first, *geometry, "relu", *(argument for one in others for argument in (*one, "relu")))


def _chain(op: str, kernel: int) -> tuple[Callable, Callable]:
    """The last output of a chain of convolutions."""

    def fused(*tensors: Tensor) -> Tensor:
        found = REGISTRY[op](*_of_several(op, kernel, tensors))
        return found[-1] if isinstance(found, tuple) else found

    def eager(x: Tensor, residual: Tensor, *rest: Tensor) -> Tensor:
        y = F.relu(F.batch_norm(F.conv2d(x, rest[0], padding=kernel // 2), *rest[1:5]))
        y = F.relu(F.batch_norm(F.conv2d(y, rest[5]), *rest[6:10]) + residual)
        return F.relu(F.batch_norm(F.conv2d(y, rest[10]), *rest[11:])) if op == LONG_CHAIN else y

    return fused, eager


def _statistics() -> tuple[Callable, Callable]:
    """A convolution in training and the batch norm that takes the statistics it found."""

    def fused(x: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        y, mean, var = REGISTRY["conv_statistics"](x, w, (1, 1), (1, 1), (1, 1), 1)
        return functional.bn_act(y, mean, var, *norm[2:])

    def eager(x: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        return F.relu(F.batch_norm(F.conv2d(x, w, padding=1), None, None, *norm[2:], training=True))

    return fused, eager


def _of_gradient(x: Tensor, grad_y: Tensor, w: Tensor, *norm: Tensor) -> tuple[Any, ...]:
    """The arguments of a backward; the statistics are x's."""
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return (grad_y, w, x, *norm[2:], mean, var, 1e-5, "relu", (1, 1), (1, 1), (1, 1), 1)


def _gradient() -> tuple[Callable, Callable]:
    """Through a convolution in training to the input of the batch norm before it."""

    def fused(*tensors: Tensor) -> Tensor:
        return REGISTRY[GRADIENT](*_of_gradient(*tensors))[0]

    def eager(x: Tensor, grad_y: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = F.conv2d(F.relu(F.batch_norm(leaf, None, None, *norm[2:], training=True)), w, padding=1)
            return torch.autograd.grad(y, leaf, grad_y)[0]

    return fused, eager


def _of_integers(kernel: int, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (*tensors, 0.5, -128, (1, 1), (kernel // 2,) * 2, (1, 1), True)


def _integers(kernel: int) -> tuple[Callable, Callable]:
    """A convolution of 8-bit integers, with its definition, since PyTorch has none."""
    op = REGISTRY[INTEGERS]
    return lambda *t: op(*_of_integers(kernel, t)), lambda *t: op.reference(*_of_integers(kernel, t))


def _around(name: str) -> tuple[Callable, Callable]:
    """A step of bytes, beside its definition."""

    def first(run: Callable, x: Tensor) -> Tensor:
        found = run(x, *AROUND[name])
        return found[0] if isinstance(found, tuple) else found

    op = REGISTRY[name]
    return lambda x: first(op, x), lambda x: first(op.reference, x)


def _joined(kernel: int) -> tuple[Callable, Callable]:
    pad = kernel // 2

    def fused(x: Tensor, shortcut: Tensor, w: Tensor, mean: Tensor, var: Tensor, *rest: Tensor) -> Tensor:
        weight, bias, own, own_mean, own_var, *own_norm = rest
        convolutions = w, None, mean, var, own, None, own_mean, own_var
        options = {"padding": pad, "shortcut_stride": 2}
        return functional.conv_bn_add_conv_bn_act(x, shortcut, *convolutions, weight, bias, *own_norm, **options)

    def eager(x: Tensor, shortcut: Tensor, w: Tensor, mean: Tensor, var: Tensor, *rest: Tensor) -> Tensor:
        weight, bias, own, *own_norm = rest
        projected = F.batch_norm(F.conv2d(shortcut, own, stride=2), *own_norm)
        return F.relu(F.batch_norm(F.conv2d(x, w, padding=pad), mean, var, weight, bias) + projected)

    return fused, eager


def _norm(training: bool) -> dict[str, tuple[Callable, Callable]]:
    """The batch-norm ops in one mode, by name."""

    def eager(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training))

    def eager_add(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training) + residual)

    def eager_add_bn(x: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, *norm, training) + F.batch_norm(residual, *norm, training))

    def eager_pool(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, training)), 3, 2, 1)

    return {
        "bn_act": (lambda *t: functional.bn_act(*t, training=training), eager),
        "bn_add_act": (lambda *t: functional.bn_add_act(*t, training=training), eager_add),
        "bn_add_bn_act": (lambda x, r, *norm: functional.bn_add_bn_act(x, r, *norm, *norm, training), eager_add_bn),
        "bn_act_maxpool": (lambda *t: functional.bn_act_maxpool(*t, training=training), eager_pool),
    }


def _all() -> list[Case]:
    add = (lambda x, r: functional.add_act(x, r), lambda x, r: F.relu(x + r))
    found = [
        Case("add_act", False, *add, ("add_act",), residual=True),
        Case("add_act", True, *add, ("add_act", "add_act_backward"), residual=True),
    ]
    conv = (lambda x, w: functional.conv2d(x, w, padding=1), lambda x, w: F.conv2d(x, w, padding=1))
    found.append(Case("conv", True, *conv, ("conv", "conv_backward_input", "conv_backward_weight"), convolution=3))
    found.append(Case("conv_statistics", False, *_statistics(), ("conv_statistics", "bn_act"), convolution=3))
    found.append(Case(GRADIENT, False, *_gradient(), (GRADIENT,), residual=True, convolution=3))
    evaluation, training = _norm(False), _norm(True)
    for name in evaluation:
        residual = "add" in name
        found.append(Case(name, False, *evaluation[name], (name,), residual))
        found.append(Case(name, True, *training[name], (f"{name}_train", f"{name}_backward"), residual))
    for residual, kernel in itertools.product((False, True), (1, 3)):
        name = "conv_bn_add_act" if residual else "conv_bn_act"
        found.append(Case(name, False, *_convolution(kernel, residual), (name,), residual, kernel))
    found.append(Case(INTEGERS, False, *_integers(3), (INTEGERS,), residual=True, convolution=3))
    found += [Case(name, False, *_around(name), (name,)) for name in AROUND]
    found.append(Case(STEM, False, *_stem(7), (STEM,), convolution=7))
    found += [Case(JOINED, False, *_joined(kernel), (JOINED,), convolution=kernel) for kernel in (1, 3)]
    found += [Case(name, False, *_chain(name, 3), (name,), convolution=3) for name in (CHAIN, LONG_CHAIN)]
    return found


CASES = _all()
