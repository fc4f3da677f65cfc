"""bn_act_maxpool: y = max_pool(act(batch_norm(x))), the tail of the stem (He et al. 2016, table 1: conv1, then 3x3/2).

x: (N, C, H, W); y is (N, C, OH, OW) in x's memory format. The normalised tensor, four times y's size, is never written.
Statistics and rounding as in ``bn_act``; ties, NaN and padding as in ``torch.nn.functional.max_pool2d``. Saved for
backward: x and the statistics; the position of each maximum is found again. Bytes moved: x and y; in backward x twice.
"""

import torch
import torch.nn.functional as F

from fastres.errors import must
from fastres.kernels.layout import memory_format, output_size
from fastres.ops import _backends, _bn, _check, bn_act
from fastres.ops._op import Op, Sample

_MOST_POSITIONS = 254
_WINDOW = "int[] kernel_size, int[] stride, int[] padding"
SCHEMA = f"(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act, {_WINDOW}) -> Tensor"
SCHEMA_TRAIN = f"(Tensor x, Tensor? weight, Tensor? bias, float eps, str act, {_WINDOW}) -> (Tensor, Tensor, Tensor)"
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act,"
    f" bool training, {_WINDOW}) -> (Tensor, Tensor, Tensor)"
)


def pool(z, kernel_size, stride, padding):
    return F.max_pool2d(z, kernel_size, stride, padding).contiguous(memory_format=memory_format(z))


def reference(x, weight, bias, mean, var, eps, act, *window):
    return pool(bn_act.reference(x, weight, bias, mean, var, eps, act), *window)


def reference_train(x, weight, bias, eps, act, *window):
    z, mean, var = bn_act.reference_train(x, weight, bias, eps, act)
    return pool(z, *window), mean, var


def reference_backward(grad_y, x, weight, bias, mean, var, eps, act, training, *window):
    z = bn_act.reference(x, weight, bias, mean, var, eps, act)
    index = F.max_pool2d(z, *window, return_indices=True)[1]
    dz = torch.ops.aten.max_pool2d_with_indices_backward(grad_y, z, *window, (1, 1), False, index)
    if act == "relu":
        dz = torch.ops.aten.threshold_backward(dz, z, 0)
    grad_x, grad_weight, grad_bias = _bn.differentiate(dz, x, weight, mean, var, eps, training)
    return grad_x, *_bn.parameter_grads(grad_weight, grad_bias, weight, bias)


def check_window(op, x, kernel_size, stride, padding):
    _check.pair(op, "kernel_size", kernel_size, 1)
    _check.pair(op, "stride", stride, 1)
    _check.pair(op, "padding", padding, 0)
    for size, kernel, pad in zip(x.shape[2:], kernel_size, padding, strict=True):
        if pad > kernel // 2:
            raise must(op, "padding", f"at most half of kernel_size {tuple(kernel_size)}", tuple(padding))
        if size + 2 * pad < kernel:
            padded = tuple(s + 2 * p for s, p in zip(x.shape[2:], padding, strict=True))
            raise must(op, "kernel_size", f"at most x's padded size {padded}", tuple(kernel_size))


def check(x, weight, bias, mean, var, eps, act, *window):
    _bn.check_forward("bn_act_maxpool", x, weight, bias, {"mean": mean, "var": var}, eps, act)
    check_window("bn_act_maxpool", x, *window)


def check_train(x, weight, bias, eps, act, *window):
    _bn.check_forward("bn_act_maxpool_train", x, weight, bias, {}, eps, act)
    _check.batch_statistics("bn_act_maxpool_train", x)
    check_window("bn_act_maxpool_train", x, *window)


def check_backward(grad_y, x, weight, bias, mean, var, eps, act, training, *window):
    _bn.check_forward("bn_act_maxpool_backward", x, weight, bias, {"mean": mean, "var": var}, eps, act)
    _check.flag("bn_act_maxpool_backward", "training", training)
    _check.images("bn_act_maxpool_backward", x=x, grad_y=grad_y)
    _check.same_dtype("bn_act_maxpool_backward", x=x, grad_y=grad_y)
    check_window("bn_act_maxpool_backward", x, *window)
    expected = output_shape(x, *window)
    if grad_y.shape != expected:
        raise must("bn_act_maxpool_backward", "grad_y", f"of shape {tuple(expected)}", tuple(grad_y.shape))


def output_shape(x, kernel_size, stride, padding):
    return (*x.shape[:2], *output_size(x.shape[2:], kernel_size, stride, padding))


def fake(x, weight, bias, mean, var, eps, act, *window):
    return x.new_empty(output_shape(x, *window)).contiguous(memory_format=memory_format(x))


def fake_train(x, weight, bias, eps, act, *window):
    return fake(x, weight, bias, None, None, eps, act, *window), *_bn.fake_stats(x)


def fake_backward(grad_y, x, weight, bias, mean, var, eps, act, training, *window):
    return _bn.fake_like(x), *_bn.fake_parameter_grads(x, weight, bias)


def setup_context(ctx, inputs, output):
    *inputs, kernel_size, stride, padding = inputs
    ctx.window = tuple(kernel_size), tuple(stride), tuple(padding)
    x, weight, bias, mean, var, ctx.eps, ctx.act = inputs
    ctx.training = False
    ctx.save_for_backward(x, weight, bias, *_bn.constants(mean, var))


def setup_context_train(ctx, inputs, output):
    *inputs, kernel_size, stride, padding = inputs
    ctx.window = tuple(kernel_size), tuple(stride), tuple(padding)
    bn_act.setup_context_train(ctx, inputs, output)


def gradients(ctx, grad_y):
    """Gradients of x, weight and bias; None for those not needed."""
    x, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        z = bn_act.reference(x.detach(), weight, bias, mean, var, ctx.eps, ctx.act)
        _, index = F.max_pool2d(z.detach(), *ctx.window, return_indices=True)
        dz = torch.zeros_like(z).flatten(2).scatter_add(2, index.flatten(2), grad_y.flatten(2)).view_as(z)
        dz = torch.where(z.detach() <= 0, 0, dz) if ctx.act == "relu" else dz
        return _bn.differentiate_twice(dz, x, weight, bias, (mean, var), ctx.eps, ctx.training)
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    found = BN_ACT_MAXPOOL_BACKWARD(grad_y, x, weight, bias, mean, var, ctx.eps, ctx.act, ctx.training, *ctx.window)
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    return *gradients(ctx, grad_y), *[None] * 7


def backward_train(ctx, grad_y, grad_mean, grad_var):
    return *gradients(ctx, grad_y), *[None] * 5


def _windows(x):
    """The stem's 3x3/2 window, and an uneven one where x is large enough for both."""
    if min(x.shape[2:]) < 3:
        return [((1, 1), (1, 1), (0, 0))]
    return [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1))]


def _with_windows(samples):
    return [
        Sample(f"{sample.label}, {'x'.join(map(str, window[0]))}", (*sample.args, *window))
        for sample in samples
        for window in _windows(sample.args[0])
    ]


def samples(device, dtype):
    return _with_windows(bn_act.samples(device, dtype))


def samples_train(device, dtype):
    return _with_windows(bn_act.samples_train(device, dtype))


def samples_backward(device, dtype):
    found = []
    for sample in bn_act.samples_backward(device, dtype):
        grad, x, *rest = sample.args
        for window in _windows(x):
            grad_y = grad[tuple(slice(size) for size in output_shape(x, *window))].contiguous()
            found.append(Sample(f"{sample.label}, {window[0]}", (grad_y, x, *rest, *window)))
    return found


def why_not_backward(grad_y, x, *rest):
    """The layout of grad_y is checked separately: a plane of one pixel has several."""
    reason = _bn.why_not(x) or (None if grad_y.dtype == x.dtype else f"grad_y must have x's dtype, got {grad_y.dtype}")
    if reason is None and not grad_y.is_contiguous(memory_format=memory_format(x)):
        return f"grad_y must be dense in x's memory format, got strides {tuple(grad_y.stride())}"
    return reason


def backends(op, why_not):
    """Native CPU, CUDA and Triton; the GPU kernels keep a position in a window in one byte."""

    def why_not_byte(*args):
        rows, columns = args[-3]
        if rows * columns > _MOST_POSITIONS:
            return f"a window may have at most {_MOST_POSITIONS} positions, got kernel_size {(rows, columns)}"
        return why_not(*args)

    module = "bn_act_maxpool"
    return [_backends.cpu(op, why_not), _backends.cuda(op, why_not_byte), _backends.triton(op, why_not_byte, module)]


BN_ACT_MAXPOOL_BACKWARD = Op(
    "bn_act_maxpool_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=lambda grad_y, x, *rest: (x.element_size() * (3 * x.numel() + 2 * grad_y.numel()), 16 * x.numel()),
    backends=backends("bn_act_maxpool_backward", why_not_backward),
)

BN_ACT_MAXPOOL = Op(
    "bn_act_maxpool",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=_bn.cost(2),
    backends=backends("bn_act_maxpool", _bn.why_not),
    setup_context=setup_context,
    backward=backward,
)

BN_ACT_MAXPOOL_TRAIN = Op(
    "bn_act_maxpool_train",
    SCHEMA_TRAIN,
    reference=reference_train,
    check=check_train,
    fake=fake_train,
    samples=samples_train,
    cost=_bn.cost(3),
    backends=backends("bn_act_maxpool_train", _bn.why_not),
    setup_context=setup_context_train,
    backward=backward_train,
)
