"""What the convolution ops share: plain-PyTorch arithmetic, checks, fake, samples, cost and the oneDNN backend.

Both are evaluation ops: statistics are given, batch norm is folded into a cached copy of the weights. Training composes
the convolution with ``bn_act``. Parameters may be wider than x (autocast): they are rounded to x's dtype once folded.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.errors import must, must_type
from fastres.kernels import inplace
from fastres.kernels.layout import memory_format, output_size, why_not_dense
from fastres.ops import _check, _conv_cpu, _conv_cuda, _conv_cudnn, _conv_wide, _fold
from fastres.ops._backends import triton_module, why_not_triton
from fastres.ops._bn import activate, normalize, refuse_statistics_gradient
from fastres.ops._op import Backend, Sample
from fastres.ops._samples import Draw

PARAMETERS = (
    "Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor var, float eps,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups, str act"
)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    """The convolution in x's dtype, by what autocast does not cast on a CPU, as it does ``conv2d``."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def reference(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    """Convolution, batch norm, addition and ReLU, one after the other, in the memory format of the ops' rule."""
    z = convolve(x, weight, bias, stride, padding, dilation, groups)
    y = normalize(z.contiguous(memory_format=memory_format(x)), bn_weight, bn_bias, mean, var, eps)
    return activate(y if residual is None else y.add_(residual), act)


def differentiable(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act
):
    """``reference`` without in-place steps, for autograd."""
    y = normalize(convolve(x, weight, bias, stride, padding, dilation, groups), bn_weight, bn_bias, mean, var, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def save(ctx, tensors: tuple[Any, ...]) -> None:
    """Keep all tensor arguments for backward; the last two are the statistics."""
    refuse_statistics_gradient(*tensors[-2:])
    ctx.save_for_backward(*tensors)


def recompute_gradients(ctx, grad_y: Tensor, run: Callable) -> tuple[Tensor | None, ...]:
    """Gradients of all tensor arguments, by running the plain composition again under autograd."""
    again = torch.is_grad_enabled()  # create_graph=True: stay connected to the saved tensors
    with torch.enable_grad():
        inputs = [t if again or t is None else t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(run(*inputs), wanted, grad_y, create_graph=again))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def output_shape(x: Tensor, weight: Tensor, stride: tuple, padding: tuple, dilation: tuple) -> tuple[int, ...]:
    return (x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))


def check(op, x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    _check.images(op, x=x, weight=weight)
    _check.per_channel(op, weight.shape[0], x, bias=bias, bn_weight=bn_weight, bn_bias=bn_bias, mean=mean, var=var)
    check_convolution(op, x, weight, bias, stride, padding, dilation, groups)
    shape = output_shape(x, weight, stride, padding, dilation)
    if residual is not None:
        _check.images(op, x=x, residual=residual)
        if tuple(residual.shape) != shape:
            raise must(op, "residual", f"of the output's shape {shape}", tuple(residual.shape))
    _check.eps(op, eps)
    _check.act(op, act)


def check_groups(op, out_channels, groups):
    if type(groups) is not int:
        raise must_type(op, "groups", "an int", groups)
    if groups < 1 or out_channels % groups:
        raise must(op, "groups", f"at least 1 and a divisor of the {out_channels} output channels", groups)


def check_convolution(op, x, weight, bias, stride, padding, dilation, groups):
    _check.images(op, x=x, weight=weight)
    out_channels, in_channels, *kernel = weight.shape
    _check.per_channel(op, out_channels, x, bias=bias)
    _check.pair(op, "stride", stride, 1)
    _check.pair(op, "padding", padding, 0)
    _check.pair(op, "dilation", dilation, 1)
    check_groups(op, out_channels, groups)
    if x.shape[1] != in_channels * groups:
        raise must(
            op, "x", f"of {in_channels * groups} channels (weight {tuple(weight.shape)}, groups {groups})", x.shape[1]
        )
    if 0 in x.shape[1:] or 0 in weight.shape:
        raise must(
            op, "x and weight", "without empty dimensions other than the batch", (tuple(x.shape), tuple(weight.shape))
        )
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape[2:]) < 1:
        padded = tuple(size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True))
        spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        raise must(op, "kernel", f"no larger than x's padded size {padded}", spans, "pad more")


def fake(x, weight, stride, padding, dilation):
    y = x.new_empty(output_shape(x, weight, stride, padding, dilation))
    return y.contiguous(memory_format=memory_format(x))


def why_not_folded(x, residual) -> str | None:
    if residual is not None and residual.dtype != x.dtype:
        return f"residual must have x's dtype, got {residual.dtype} beside {x.dtype}"
    if residual is not None and not residual.is_contiguous(memory_format=memory_format(x)):
        return f"residual must be dense in x's memory format, got strides {tuple(residual.stride())}"
    return why_not_dense(x)


def why_not_onednn(x, residual, weight, *rest) -> str | None:
    if x.device.type != "cpu":
        return f"oneDNN runs on the CPU, the tensors are on {x.device.type}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this PyTorch has no oneDNN, or torch.backends.mkldnn.enabled is off"
    if x.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 instructions that oneDNN uses"
    elif x.dtype != torch.float32:
        return f"oneDNN is used for float32 and bfloat16, got {x.dtype}"
    padding, dilation = rest[-4:-2]
    if any(p > d * (k - 1) for p, d, k in zip(padding, dilation, weight.shape[2:], strict=True)):
        return "a window may lie wholly in the padding, where oneDNN with packed weights can end the process"
    return why_not_folded(x, residual)


class _Packings:
    """Folded weights in oneDNN's own layouts: one for each input shape, since a layout that is best for one is slow for
    another (ResNet-50 packed for 224x224 ran 32x32 images 8 times slower than PyTorch; AMD EPYC, 2026-11-24).
    """

    MOST = 4  # shapes; further ones get the unpacked weights, which suit all

    def __init__(self, weight: Tensor, bias: Tensor, form: tuple) -> None:
        _, dtype, *self.geometry = form
        self.weight, self.bias = weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)
        self.by_shape: dict[torch.Size, Tensor] = {}

    def weight_for(self, shape: torch.Size) -> Tensor:
        packed = self.by_shape.get(shape)
        if packed is None:
            if len(self.by_shape) >= self.MOST:
                return self.weight
            stride, padding, dilation, groups = self.geometry
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.contiguous(), padding, stride, dilation, groups, shape
            )
            self.by_shape[shape] = packed
        return packed


def run_onednn(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    """Prepacked oneDNN convolution, then addition and ReLU in one pass in place.

    oneDNN could fuse the ReLU too, but its ReLU turns NaN into 0, and a network must not hide NaN. A contiguous x takes the
    unpacked weights: with packed ones y comes in channels_last, and to move it back takes longer than packing saves.
    """

    parameters = (weight, bias, bn_weight, bn_bias, mean, var)
    if memory_format(x) is torch.contiguous_format:
        form = ("onednn", x.dtype)
        w, b = _fold.folded(parameters, eps, form, lambda w, b: (w.to(x.dtype).contiguous(), b.to(x.dtype)))
        return inplace.add_act_(convolve(x, w, b, stride, padding, dilation, groups), residual, act)
    form = ("onednn", x.dtype, stride, padding, dilation, groups)
    packings = _fold.folded(parameters, eps, form, lambda w, b: _Packings(w, b, form))
    w = packings.weight_for(x.shape)
    y = _pointwise(x, w, packings.bias, padding, stride, dilation, groups, "none", [], "")
    return inplace.add_act_(y.contiguous(memory_format=torch.channels_last), residual, act)


_pointwise = torch.ops.mkldnn._convolution_pointwise.default if torch.backends.mkldnn.is_available() else None


def why_not_triton_conv(x, residual, weight, *rest) -> str | None:
    reason = why_not_triton(x) or why_not_tf32(x) or why_not_folded(x, residual)
    return reason or triton_module("conv_bn_act").why_not(x, weight, *rest)


def why_not_tf32(x) -> str | None:
    """Why the Triton convolutions leave float32 on a GPU to cuDNN: where TF32 is allowed, cuDNN uses it only if that is faster,
    so that PyTorch's error, and with it the budget, may be that of float32."""
    if x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "in float32 it would round to TF32 where cuDNN may not (torch.backends.cudnn.conv.fp32_precision is 'tf32')"
    return None


def triton_configs(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act
) -> list[tuple]:  # fmt: skip
    """The tiles that tuning may choose from."""
    kernels = triton_module("conv_bn_act")
    return kernels.candidates(x, weight, stride, padding, groups, kernels.is_tf32(x))


def load_triton(config: tuple | None = None) -> Callable:
    return run_triton if config is None else functools.partial(run_triton, config=config)


def run_triton(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act, config=None
):
    kernels = triton_module("conv_bn_act")
    config = None if config is None else kernels.configs.ConvConfig(*config)
    tf32 = kernels.is_tf32(x)
    form = ("triton", x.dtype, tf32)
    parameters = (weight, bias, bn_weight, bn_bias, mean, var)
    w, b = _fold.folded(parameters, eps, form, lambda w, b: (kernels.pack(w.to(x.dtype), tf32), b))
    kernel = tuple(weight.shape[2:])
    return kernels.conv_act(x, w, b, residual, kernel, stride, padding, dilation, act, tf32, config, groups)


def why_not_cpu(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    reason = why_not_folded(x, residual) or _conv_cpu.why_not(x, weight, dilation, groups)
    if reason is None and memory_format(x) is torch.contiguous_format and _conv_cpu.loses_by_moving(x, weight.shape, groups):
        return "x is contiguous: to move x and y, since the kernel works in channels_last, would take longer than it saves"
    return reason


def why_not_cudnn(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act
):  # fmt: skip
    return _conv_cudnn.why_not(x, residual, weight, groups, act) or why_not_folded(x, residual)


def why_not_cuda(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act
):  # fmt: skip
    own = _conv_cuda.why_not(x, weight, stride, padding, dilation, groups, residual is not None)
    return own or why_not_folded(x, residual)


def why_not_wide(
    x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act
):  # fmt: skip
    return _conv_wide.why_not(x, weight, stride, padding, dilation, groups) or why_not_folded(x, residual)


def run_cpu(x, residual, *rest):
    """The native kernel; the plain composition for weights that are not finite."""
    y = _conv_cpu.run(x, residual, *rest)
    return reference(x, residual, *rest) if y is None else y


def backends(with_residual: bool) -> list[Backend]:
    """Native CPU, oneDNN, two native CUDA kernels, cuDNN and Triton; for an op without residual, None takes its place."""

    def adapt(function: Callable) -> Callable:
        return function if with_residual else lambda x, *rest: function(x, None, *rest)

    return [
        Backend("cpu", adapt(why_not_cpu), lambda: adapt(run_cpu)),
        Backend("onednn", adapt(why_not_onednn), lambda: adapt(run_onednn)),
        Backend("cuda", adapt(why_not_cuda), lambda: adapt(_conv_cuda.run)),  # first on an H200: 2026-11-27
        Backend("cuda_wide", adapt(why_not_wide), lambda: adapt(_conv_wide.run)),
        Backend("cudnn", adapt(why_not_cudnn), lambda: adapt(_conv_cudnn.run)),
        Backend(
            "triton", adapt(why_not_triton_conv), lambda config=None: adapt(load_triton(config)), adapt(triton_configs)
        ),
    ]


def samples(device: torch.device, dtype: torch.dtype, with_residual: bool) -> list[Sample]:
    """Every convolution of a residual network, at a small size, and corner cases: groups, dilation, odd channels, bias."""
    draw = Draw(device, dtype)

    def case(label, n, c, size, k, kernel, stride=1, padding=0, dilation=1, groups=1, act="relu", bias=False, eps=1e-5):
        x, weight = draw.images(n, c, *size), draw.weight(k, c // groups, *kernel)
        geometry = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
        images = [x, draw.images(*output_shape(x, weight, *geometry))][: 2 if with_residual else 1]
        norm = draw.norm(k)
        return Sample(label, (*images, weight, draw.vector(k) if bias else None, *norm, eps, *geometry, groups, act))

    return [
        case("1x1", 2, 64, (8, 8), 64, (1, 1)),
        case("1x1 stride 2", 2, 64, (9, 9), 32, (1, 1), stride=2, act="none"),
        case("3x3", 2, 32, (8, 8), 64, (3, 3), padding=1),
        case("3x3 stride 2", 1, 32, (9, 7), 32, (3, 3), stride=2, padding=1),
        case("3x3 dilated", 1, 16, (9, 9), 16, (3, 3), padding=2, dilation=2),
        case("3x3 in 8 groups", 2, 32, (7, 7), 32, (3, 3), padding=1, groups=8),
        case("depthwise", 2, 16, (7, 7), 16, (3, 3), padding=1, groups=16),
        case("7x7 stem", 1, 3, (19, 19), 64, (7, 7), stride=2, padding=3),
        case("odd channels with bias", 2, 5, (6, 7), 7, (3, 3), padding=1, bias=True),
        case("uneven", 1, 4, (9, 8), 6, (3, 1), stride=(2, 1), padding=(1, 0), act="none", eps=1e-12),
    ]


def cost(x, weight, residual, stride, padding, dilation) -> tuple[int, int]:
    y = 1
    for size in output_shape(x, weight, stride, padding, dilation):
        y *= size
    moved = x.numel() + weight.numel() + y * (2 if residual is not None else 1)
    return moved * x.element_size(), 2 * y * weight[0].numel()
