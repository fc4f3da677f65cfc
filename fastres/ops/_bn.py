"""What the batch-norm ops share: plain-PyTorch arithmetic, checks, fakes, samples and cost.

y = act((x - mean) / sqrt(var + eps) * weight + bias [+ residual]) with one mean and var per channel (Ioffe and Szegedy
2015; used after every convolution of He et al. 2016, section 3.4). mean and var are fp32 (fp64 for fp64 x).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.layout import memory_format, why_not_dense
from fastres.ops import _check
from fastres.ops._op import Sample
from fastres.ops._samples import Draw


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activate(y: Tensor, act: str) -> Tensor:
    return y.relu_() if act == "relu" else y


def match(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """Parameters in a dtype that torch's batch norm takes together with x: fp32 for a narrower x, else x's dtype."""
    dtype = statistics_dtype(x)
    return tuple(None if p is None else p.to(dtype) for p in parameters)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Batch norm with given statistics, in the memory format of the ops' rule."""
    weight, bias, mean, var = match(x, weight, bias, mean, var)
    x = x.contiguous(memory_format=memory_format(x))
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def normalize_train(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's statistics: y, mean and biased var.

    Mean and var come from the running buffers of torch's own pass, at momentum 1: the 1/sqrt(var + eps) that it saves does not
    give var back where eps dominates.
    """
    weight, bias = match(x, weight, bias)
    channels, values = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    mean = torch.zeros(channels, dtype=statistics_dtype(x), device=x.device)
    var = torch.zeros_like(mean)
    x = x.contiguous(memory_format=memory_format(x))
    if values == 0:
        return torch.empty_like(x), mean, var
    y = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)[0]
    return y, mean, var * ((values - 1) / values)  # not in place: the derivative has kept it


def differentiate(
    dz: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm's x, weight and bias for the gradient dz of its output."""
    weight, mean, var = match(x, weight, mean, var)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    invstd = torch.rsqrt(var + eps)
    layout = memory_format(x)
    x, dz = x.contiguous(memory_format=layout), dz.contiguous(memory_format=layout)
    if weight is None:
        weight = torch.ones_like(mean)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        dz, x, weight, mean, var, mean, invstd, training, eps, [True, True, True]
    )
    return grad_x.contiguous(memory_format=layout), grad_weight, grad_bias


def differentiate_twice(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: tuple[Tensor, Tensor],
    eps: float,
    training: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same gradients through autograd, so that they can be differentiated again (create_graph=True)."""
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    with torch.enable_grad():
        mean, var = (None, None) if training else match(x, *stats)
        scale, shift = match(x, weight, bias)
        y = F.batch_norm(x, mean, var, scale, shift, training, 0.0, eps)
        found = iter(torch.autograd.grad(y, inputs, dz, create_graph=True)) if inputs else iter(())
    grad_x, grad_weight, grad_bias = (
        next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)
    )
    return grad_x, grad_weight, grad_bias


def parameter_grads(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients in the dtypes the ops promise: weight's, else the statistics'; bias's, else grad_weight's."""
    grad_weight = grad_weight if weight is None else grad_weight.to(weight.dtype)
    return grad_weight, grad_bias.to(grad_weight.dtype if bias is None else bias.dtype)


def laid_as(x: Tensor, grad_y: Tensor) -> Tensor:
    """The gradient of y in y's memory format. It mostly has that already: then this only compares strides."""
    return grad_y if grad_y.stride() == x.stride() else grad_y.contiguous(memory_format=memory_format(x))


def laid_as_both(x: Tensor, grad_y: Tensor, grad_y2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same for a gradient that may come in two parts."""
    return laid_as(x, grad_y), None if grad_y2 is None else laid_as(x, grad_y2)


def whole(grad_y: Tensor, grad_y2: Tensor | None) -> Tensor:
    """The sum of a gradient's parts, differentiable with respect to both."""
    return grad_y if grad_y2 is None else grad_y + grad_y2


def two_parts(grad_y2: Tensor | None) -> dict[str, Tensor]:
    """The second part, where there is one, as an activation to be checked."""
    return {} if grad_y2 is None else {"grad_y2": grad_y2}


def refuse_statistics_gradient(mean: Tensor, var: Tensor) -> None:
    """Given statistics are constants, as in PyTorch."""
    if mean.requires_grad or var.requires_grad:
        raise RuntimeError(
            "fastres: mean and var must not require grad: batch norm is not differentiated with respect to given statistics"
        )


def constants(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of given statistics, to be saved: a training batch may change the running ones before backward."""
    refuse_statistics_gradient(mean, var)
    return mean.clone(), var.clone()


def check_forward(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: dict[str, Tensor],
    eps: float,
    act: str,
    **activations: Tensor,
) -> None:
    _check.images(op, x=x, **activations)
    if activations:
        _check.same_shape(op, x=x, **activations)
        _check.same_dtype(op, x=x, **{name: t for name, t in activations.items() if name.startswith("grad_y")})  # y has x's
    _check.tensors(op, x=x, **stats)  # statistics are required
    _check.per_channel(op, x.shape[1], x, weight=weight, bias=bias, **stats)
    _check.eps(op, eps)
    _check.act(op, act)


def fake_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    stats = x.new_empty(x.shape[1], dtype=statistics_dtype(x))
    return stats, torch.empty_like(stats)


def fake_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def fake_parameter_grads(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(x) if weight is None else weight.dtype
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype if bias is None else bias.dtype)


def why_not(*args: object) -> str | None:
    """What every kernel of these ops requires of the activations among its arguments."""
    activations = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4]
    dtypes = {tensor.dtype for tensor in activations}
    if len(dtypes) > 1:
        return f"the activations must have one dtype, got {sorted(map(str, dtypes))}"
    return why_not_dense(*activations)


def samples(device: torch.device, dtype: torch.dtype, build: Callable) -> list[Sample]:
    """Widths with and without a vector tail, optional parameters, gamma of any sign, tiny eps, a far-off mean.

    ``build(x, residual, weight, bias, mean, var, eps, act)`` picks an op's arguments.
    """
    draw = Draw(device, dtype)

    def case(
        label: str, shape: tuple, eps: float = 1e-5, act: str = "relu", shift: float = 0.3, affine: str = "wb"
    ) -> Sample:
        images = draw.images(*shape, scale=1.5, mean=shift), draw.images(*shape)
        weight, bias, *statistics = draw.norm(shape[1], mean=shift)
        if shape[1] > 2:
            weight[1] = 0.0
        parameters = weight if "w" in affine else None, bias if "b" in affine else None
        return Sample(label, build(*images, *parameters, *statistics, eps, act))

    return [
        case("stage 1", (2, 64, 8, 8)),
        case("stage 4", (3, 128, 7, 7)),
        case("odd channels", (2, 17, 5, 3)),
        case("three channels", (2, 3, 9, 1)),
        case("one channel", (4, 1, 3, 3), shift=1.0),  # a mean near zero has no relative accuracy
        case("no parameters", (2, 8, 4, 4), affine=""),
        case("weight only", (2, 8, 4, 4), affine="w"),
        case("no activation", (2, 8, 4, 4), act="none"),
        case("tiny eps", (2, 8, 4, 4), eps=1e-12),
        case("mean far from zero", (2, 8, 6, 6), shift=100.0),
    ]


def samples_of_two_parts(found: list[Sample]) -> list[Sample]:
    """The samples of a backward, and the same with a second part of the gradient, inserted after the first."""
    two = [
        Sample(f"{sample.label}, two parts", (sample.args[0], sample.args[0].flip(3).contiguous(), *sample.args[2:]))
        for sample in found
    ]
    return [found[0], *two, *found[1:]]


def cost(tensors: int, bits: int = 0) -> Callable[..., tuple[int, int]]:
    """Cost of an op that moves ``tensors`` activations of x's size and ``bits`` bits per element of a mask."""

    def bytes_and_flops(x: Tensor, *rest: object) -> tuple[int, int]:
        return tensors * x.numel() * x.element_size() + bits * x.numel() // 8, 8 * x.numel()

    return bytes_and_flops
