"""conv: y = conv2d(x, weight, bias), the convolution of a training step, with a backward of its own (He et al. 2016).

x: (N, C, H, W); weight: (K, C / groups, R, S) of x's dtype; y is (N, K, OH, OW) in x's memory format. Its gradients are two
ops, ``conv_backward_input`` and ``conv_backward_weight``. On the CPU all three have native kernels by Winograd's F(2x2, 3x3),
for 3x3 kernels with stride 1. Weights change at every step, so they are transformed at every call; nothing is kept. For few
pixels all three have kernels of their own, for any geometry: what takes time is to read or write the weights. With AMX, in
bfloat16, the weight gradient is a product in tile registers, for any geometry, and so are the other two where weights are many.
``_conv_choice`` says which kernel is taken.
Accumulates in float, 16 to 256 products at a time; in tile registers all of an output's, in order. By Winograd in bfloat16 the
transformed values are rounded to it too: more error than PyTorch's single rounding, but within the budget. Saved for backward:
x and weight. Bytes moved: x, weight and y.
"""


import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.dispatch import Backend
from fastres.errors import must
from fastres.kernels import native
from fastres.kernels.layout import full_padding, memory_format, why_not_channels_last
from fastres.ops import _check, _conv, _conv_cpu, _conv_rows
from fastres.ops._conv_choice import WINOGRAD, kernel
from fastres.ops._op import Op, Sample

GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
SCHEMA = f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor"
SCHEMA_INPUT = f"(Tensor grad_y, Tensor weight, int[2] size, {GEOMETRY}) -> Tensor"
SCHEMA_WEIGHT = f"(Tensor grad_y, Tensor x, int[2] kernel, {GEOMETRY}) -> Tensor"


def reference(x, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous(memory_format=memory_format(x))


def _backward(grad_y, x, weight, stride, padding, dilation, groups, wanted):
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
    )


def _layout(like: Tensor) -> torch.memory_format:
    """Of a gradient: channels_last wherever x, or grad_y, can be said to be, as images of one pixel can."""
    return torch.channels_last if like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised: PyTorch's backward takes tensors of which it only uses the shape."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def reference_input(grad_y, weight, size, stride, padding, dilation, groups):
    x = _empty(grad_y, grad_y.shape[0], weight.shape[1] * groups, *size)
    grad_x, _, _ = _backward(grad_y, x, weight, stride, padding, dilation, groups, [True, False, False])
    return grad_x.contiguous(memory_format=_layout(grad_y))


def reference_weight(grad_y, x, kernel, stride, padding, dilation, groups):
    weight = fake_weight(grad_y, x, kernel, stride, padding, dilation, groups)
    _, grad_weight, _ = _backward(grad_y, x, weight, stride, padding, dilation, groups, [False, True, False])
    return grad_weight.contiguous(memory_format=_layout(x))


def check(x, weight, bias, stride, padding, dilation, groups):
    _conv.check_convolution("conv", x, weight, bias, stride, padding, dilation, groups)
    _check.same_dtype("conv", x=x, weight=weight, bias=bias)


def check_backward(op, grad_y, x_shape, weight_shape, like, stride, padding, dilation, groups):
    """What both gradients require: a convolution of these shapes, whose output has the shape of grad_y."""
    _check.images(op, grad_y=grad_y, **like)
    x, weight = (grad_y.new_empty(1).expand(shape) for shape in (x_shape, weight_shape))
    _conv.check_convolution(op, x, weight, None, stride, padding, dilation, groups)
    shape = _conv.output_shape(x, weight, stride, padding, dilation)
    if tuple(grad_y.shape) != shape:
        raise must(op, "grad_y", f"of the output's shape {shape}", tuple(grad_y.shape))
    _check.same_dtype(op, grad_y=grad_y, **like)


def check_input(grad_y, weight, size, stride, padding, dilation, groups):
    op = "conv_backward_input"
    _check.images(op, grad_y=grad_y, weight=weight)
    _check.size(op, "size", size)
    _conv.check_groups(op, weight.shape[0], groups)
    x_shape = (grad_y.shape[0], weight.shape[1] * groups, *size)
    check_backward(op, grad_y, x_shape, weight.shape, {"weight": weight}, stride, padding, dilation, groups)


def check_weight(grad_y, x, kernel, stride, padding, dilation, groups):
    op = "conv_backward_weight"
    _check.images(op, grad_y=grad_y, x=x)
    _check.size(op, "kernel", kernel)
    _conv.check_groups(op, grad_y.shape[1], groups)
    weight_shape = (grad_y.shape[1], x.shape[1] // groups, *kernel)
    check_backward(op, grad_y, x.shape, weight_shape, {"x": x}, stride, padding, dilation, groups)


def fake(x, weight, bias, stride, padding, dilation, groups):
    return _conv.fake(x, weight, stride, padding, dilation)


def fake_input(grad_y, weight, size, stride, padding, dilation, groups):
    return _empty(grad_y, grad_y.shape[0], weight.shape[1] * groups, *size)


def fake_weight(grad_y, x, kernel, stride, padding, dilation, groups):
    return _empty(x, grad_y.shape[1], x.shape[1] // groups, *kernel)


def setup_context(ctx, inputs, output):
    x, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def gradients(grad_y, x, weight, geometry, wanted):
    """Those of x, weight and bias, None for those not wanted: by ops of their own, or in a differentiable form."""
    if torch.is_grad_enabled():  # create_graph=True: PyTorch's formula, which is differentiable
        grads = _backward(grad_y, x, weight, *geometry, list(wanted))
        return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    grad_x = CONV_BACKWARD_INPUT(grad_y, weight, tuple(x.shape[2:]), *geometry) if wanted[0] else None
    grad_weight = CONV_BACKWARD_WEIGHT(grad_y, x, tuple(weight.shape[2:]), *geometry) if wanted[1] else None
    return grad_x, grad_weight, grad_y.sum((0, 2, 3)) if wanted[2] else None


def backward(ctx, grad_y):
    return *gradients(grad_y, *ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3]), None, None, None, None


# ---- native: on the CPU; few input channels on CUDA --------------------------------------------------------------------


def _forward(x, weight, *geometry):
    return kernel("y", x, x.shape[2:], weight.shape, *geometry, weight=weight)


def _input(grad_y, weight, size, *geometry):
    return kernel("x", grad_y, size, weight.shape, *geometry, weight=weight)


def _weight(grad_y, x, size, *geometry):
    return kernel("weight", x, x.shape[2:], (grad_y.shape[1], x.shape[1], *size), *geometry)


def _why_not(dtype, op, reason):
    """Why the chosen native op cannot run here."""
    reason = reason or native.why_not(op) or _conv_cpu.lacks(dtype)
    return reason or (_conv_cpu.why_not_amx() if "amx" in op else None)


def why_not(x, weight, bias, *geometry):
    return _why_not(x.dtype, *_forward(x, weight, *geometry))


def why_not_input(grad_y, *args):
    return _why_not(grad_y.dtype, *_input(grad_y, *args))


def why_not_weight(grad_y, x, *args):
    return why_not_channels_last("grad_y", grad_y) or _why_not(x.dtype, *_weight(grad_y, x, *args))


def why_not_cuda(x, weight, bias, *geometry):
    return _conv_rows.why_not(x, weight.shape, *geometry)


def why_not_cuda_weight(grad_y, x, kernel, *geometry):
    shape = (grad_y.shape[1], x.shape[1], *kernel)
    return why_not_channels_last("grad_y", grad_y) or _conv_rows.why_not(x, shape, *geometry, op="conv_rows_backward_weight")


# Winograd's transform, and the zeros that tile registers multiply by, would spread values that are not finite: calls with such
# results run PyTorch's convolution.


def run(x, weight, bias, *geometry):
    op, _ = _forward(x, weight, *geometry)
    y = native.op(op)(x, weight, *((geometry[1], False) if op in WINOGRAD else geometry[:3]))
    if y.numel() == 0:
        return reference(x, weight, bias, *geometry)
    return y if bias is None else y.add_(bias.view(1, -1, 1, 1))


def run_input(grad_y, weight, size, *geometry):
    op, _ = _input(grad_y, weight, size, *geometry)
    padding = full_padding(weight.shape[2:], *geometry[1:3])
    grad_x = native.op(op)(grad_y, weight, *((padding, True) if op in WINOGRAD else (size, *geometry[:3])))
    return grad_x if grad_x.numel() else reference_input(grad_y, weight, size, *geometry)


def run_weight(grad_y, x, size, *geometry):
    op, _ = _weight(grad_y, x, size, *geometry)
    grad_weight = native.op(op)(grad_y, x, *((geometry[1],) if op in WINOGRAD else (size, *geometry[:3])))
    return grad_weight if grad_weight.numel() else reference_weight(grad_y, x, size, *geometry)


# ---- samples and cost -------------------------------------------------------------------------------------------------


def samples(device, dtype):
    """Those of the evaluation ops, and shapes that repay the transform: odd sizes, wide to narrow, no padding, bias."""
    generator = torch.Generator().manual_seed(0)

    def case(label, n, c, size, k, padding, bias=False, stride=(1, 1), kernel=(3, 3)):
        tensors = (
            torch.randn(n, c, *size, generator=generator),
            torch.randn(k, c, *kernel, generator=generator) / (kernel[0] * kernel[1] * c) ** 0.5,
            torch.randn(k, generator=generator) if bias else None,
        )
        tensors = tuple(t if t is None else t.to(device, dtype) for t in tensors)
        return Sample(label, (*tensors, stride, padding, (1, 1), 1))

    found = []
    for sample in _conv.samples(device, dtype, with_residual=False):
        x, weight, bias, *_, stride, padding, dilation, groups, _ = sample.args
        tensors = (x, weight.to(dtype), None if bias is None else bias.to(dtype))
        found.append(Sample(sample.label, (*tensors, stride, padding, dilation, groups)))
    return [
        *found,
        case("winograd", 4, 32, (8, 8), 32, (1, 1)),
        case("winograd, small images", 32, 16, (4, 4), 32, (1, 1)),
        case("winograd, odd size", 2, 48, (13, 11), 96, (1, 1), bias=True),
        case("winograd, no padding", 2, 80, (15, 14), 32, (0, 0)),
        case("winograd, wide padding", 2, 32, (10, 13), 64, (2, 1)),
        case("few pixels", 3, 80, (3, 2), 96, (1, 1)),
        case("few pixels, stride", 2, 256, (2, 2), 256, (0, 0), bias=True, stride=(2, 2), kernel=(1, 1)),
        case("one pixel", 3, 80, (1, 1), 96, (1, 1)),
        case("stride, odd images", 3, 48, (9, 11), 80, (1, 1), stride=(2, 2)),
        case("1x1, narrow to wide", 4, 32, (7, 5), 112, (0, 0), kernel=(1, 1)),
    ]


def _gradients(device, dtype):
    """For every sample: a gradient of the output, with its arguments."""
    for sample in samples(device, dtype):
        x, weight, _, *geometry = sample.args
        generator = torch.Generator().manual_seed(1)
        shape = _conv.output_shape(x, weight, *geometry[:3])
        yield sample.label, torch.randn(shape, generator=generator).to(device, dtype), x, weight, geometry


def samples_input(device, dtype):
    found = _gradients(device, dtype)
    return [Sample(label, (grad_y, weight, tuple(x.shape[2:]), *rest)) for label, grad_y, x, weight, rest in found]


def samples_weight(device, dtype):
    found = _gradients(device, dtype)
    return [Sample(label, (grad_y, x, tuple(weight.shape[2:]), *rest)) for label, grad_y, x, weight, rest in found]


def cost(x, weight, bias, stride, padding, dilation, groups):
    return _conv.cost(x, weight, None, stride, padding, dilation)


def cost_input(grad_y, weight, size, *geometry):
    moved = grad_y.numel() + weight.numel() + grad_y.shape[0] * weight.shape[1] * geometry[-1] * size[0] * size[1]
    return moved * grad_y.element_size(), 2 * grad_y.numel() * weight[0].numel()


def cost_weight(grad_y, x, kernel, *geometry):
    taps = x.shape[1] // geometry[-1] * kernel[0] * kernel[1]
    return (grad_y.numel() + x.numel() + grad_y.shape[1] * taps) * x.element_size(), 2 * grad_y.numel() * taps


CONV_BACKWARD_INPUT = Op(
    "conv_backward_input",
    SCHEMA_INPUT,
    reference=reference_input,
    check=check_input,
    fake=fake_input,
    samples=samples_input,
    cost=cost_input,
    backends=[Backend("cpu", why_not_input, lambda: run_input)],
)

CONV_BACKWARD_WEIGHT = Op(
    "conv_backward_weight",
    SCHEMA_WEIGHT,
    reference=reference_weight,
    check=check_weight,
    fake=fake_weight,
    samples=samples_weight,
    cost=cost_weight,
    backends=[
        Backend("cpu", why_not_weight, lambda: run_weight),
        Backend("cuda", why_not_cuda_weight, lambda: _conv_rows.run_weight),
    ],
)

CONV = Op(
    "conv",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend("cpu", why_not, lambda: run), Backend("cuda", why_not_cuda, lambda: _conv_rows.run)],
    setup_context=setup_context,
    backward=backward,
)
