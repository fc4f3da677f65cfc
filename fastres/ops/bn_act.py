"""bn_act: y = act(batch_norm(x)), which follows the convolutions inside every residual block (He et al. 2016, section 3.4).

x: (N, C, H, W); y takes its memory format. ``bn_act`` is given the statistics; ``bn_act_train`` computes those of the batch and
returns them as fp32 (C,) tensors, var biased: the caller owns the running buffers. Accumulates in fp32 (fp64 for fp64)
and rounds once. Saved for backward: x and the statistics; the ReLU mask is recomputed from x, never stored.
Evaluation whose weight and bias need no gradient saves y instead of x; its backward runs that of ``add_act`` first.
Bytes moved: 2 tensors in evaluation, 3 in training, 5 in backward; with ``cuda_cluster`` 2 in training, 3 in backward.
"""

import torch
from torch import Tensor

from fastres.kernels.layout import memory_format
from fastres.ops import _backends, _bn, _bn_cluster, _check, _mask
from fastres.ops._op import Op, Sample
from fastres.ops.add_act import ADD_ACT_BACKWARD

SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act) -> Tensor"
SCHEMA_TRAIN = "(Tensor x, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor)"
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act,"
    " bool training) -> (Tensor, Tensor, Tensor)"
)


def reference(x, weight, bias, mean, var, eps, act):
    return _bn.activate(_bn.normalize(x, weight, bias, mean, var, eps), act)


def reference_train(x, weight, bias, eps, act):
    y, mean, var = _bn.normalize_train(x, weight, bias, eps)
    return _bn.activate(y, act), mean, var


def reference_backward(grad_y, x, weight, bias, mean, var, eps, act, training):
    dz = grad_y
    if act == "relu":
        dz = torch.ops.aten.threshold_backward(grad_y, _bn.normalize(x, weight, bias, mean, var, eps), 0)
    grad_x, grad_weight, grad_bias = _bn.differentiate(dz, x, weight, mean, var, eps, training)
    return grad_x, *_bn.parameter_grads(grad_weight, grad_bias, weight, bias)


def check(x, weight, bias, mean, var, eps, act):
    _bn.check_forward("bn_act", x, weight, bias, {"mean": mean, "var": var}, eps, act)


def check_train(x, weight, bias, eps, act):
    _bn.check_forward("bn_act_train", x, weight, bias, {}, eps, act)
    _check.batch_statistics("bn_act_train", x)


def check_backward(grad_y, x, weight, bias, mean, var, eps, act, training):
    _bn.check_forward("bn_act_backward", x, weight, bias, {"mean": mean, "var": var}, eps, act, grad_y=grad_y)
    _check.flag("bn_act_backward", "training", training)


def fake(x, weight, bias, mean, var, eps, act):
    return _bn.fake_like(x)


def fake_train(x, weight, bias, eps, act):
    return _bn.fake_like(x), *_bn.fake_stats(x)


def fake_backward(grad_y, x, weight, bias, mean, var, eps, act, training):
    return _bn.fake_like(x), *_bn.fake_parameter_grads(x, weight, bias)


def setup_context(ctx, inputs, output):
    x, weight, bias, mean, var, ctx.eps, ctx.act = inputs
    mean, var = _bn.constants(mean, var)
    ctx.training, ctx.fixed, ctx.layout = False, are_fixed(weight, bias), memory_format(x)
    ctx.save_for_backward(_mask.needed(output, ctx.act) if ctx.fixed else x, weight, bias, mean, var)


def setup_context_train(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.act = inputs
    _, mean, var = output
    ctx.training, ctx.fixed = True, False
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def are_fixed(*parameters: Tensor | None) -> bool:
    """Whether none of them needs a gradient: then backward needs only y, which the next convolution keeps too, and not x."""
    return not any(p is not None and p.requires_grad for p in parameters)


def through_relu(grad_y: Tensor, y: Tensor | None, act: str) -> Tensor:
    """The gradient behind act, from what evaluation saves of y."""
    if y is None or torch.is_grad_enabled():  # create_graph=True
        return _mask.gradient_at(grad_y, y)
    return ADD_ACT_BACKWARD(grad_y, y.contiguous(memory_format=memory_format(grad_y)), act)


def scaled(dz: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The gradient of x in evaluation, for dz of batch norm's output."""
    if torch.is_grad_enabled():  # create_graph=True
        own, var = _bn.match(dz, weight, var)
        scale = torch.rsqrt(var + eps) * (1.0 if own is None else own)
        return (dz * scale.view(-1, 1, 1)).to(dz.dtype)
    return BN_ACT_BACKWARD(dz, dz, weight, None, mean, var, eps, "none", False)[0]


def gradients(ctx, grad_y: Tensor) -> tuple:
    """Gradients of x, weight and bias; None for those not needed."""
    if ctx.fixed:
        y, weight, _, mean, var = ctx.saved_tensors
        dz = through_relu(grad_y.contiguous(memory_format=ctx.layout), y, ctx.act)
        return scaled(dz, weight, mean, var, ctx.eps), None, None
    x, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        dz = grad_y
        if ctx.act == "relu":
            dz = torch.where(_bn.normalize(x.detach(), weight, bias, mean, var, ctx.eps) <= 0, 0, grad_y)
        return _bn.differentiate_twice(dz, x, weight, bias, (mean, var), ctx.eps, ctx.training)
    grad_y = _bn.laid_as(x, grad_y)
    found = BN_ACT_BACKWARD(grad_y, x, weight, bias, mean, var, ctx.eps, ctx.act, ctx.training)
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    return *gradients(ctx, grad_y), None, None, None, None


def backward_train(ctx, grad_y, grad_mean, grad_var):
    return *gradients(ctx, grad_y), None, None


def samples(device, dtype):
    return _bn.samples(device, dtype, lambda x, r, w, b, mean, var, eps, act: (x, w, b, mean, var, eps, act))


def samples_train(device, dtype):
    return _bn.samples(device, dtype, lambda x, r, w, b, mean, var, eps, act: (x, w, b, eps, act))


def samples_backward(device, dtype):
    found = []
    for sample in _bn.samples(device, dtype, lambda *args: args):
        x, grad_y, w, b, mean, var, eps, act = sample.args
        _, batch_mean, batch_var = reference_train(x, w, b, eps, act)
        found.append(Sample(f"{sample.label}, evaluation", (grad_y, x, w, b, mean, var, eps, act, False)))
        found.append(Sample(f"{sample.label}, training", (grad_y, x, w, b, batch_mean, batch_var, eps, act, True)))
    return found


def why_not_in_training(*args):
    """What the kernel requires that computes grad_x after a channel's sums."""
    *_, training = args
    return _bn.why_not(*args) or (None if training else "in evaluation grad_x waits for no sums: one pass reads all once")


BN_ACT_BACKWARD = Op(
    "bn_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=_bn.cost(5),
    backends=[
        *_backends.all_kernels("bn_act_backward", _bn.why_not, module="bn_act"),
        _bn_cluster.backend("bn_act_backward", why_not_in_training),
    ],
)

BN_ACT = Op(
    "bn_act",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=_bn.cost(2),
    backends=_backends.all_kernels("bn_act", _bn.why_not),
    setup_context=setup_context,
    backward=backward,
)

BN_ACT_TRAIN = Op(
    "bn_act_train",
    SCHEMA_TRAIN,
    reference=reference_train,
    check=check_train,
    fake=fake_train,
    samples=samples_train,
    cost=_bn.cost(3),
    backends=[
        *_backends.all_kernels("bn_act_train", _bn.why_not, module="bn_act"),
        _bn_cluster.backend("bn_act_train", _bn.why_not),
    ],
    setup_context=setup_context_train,
    backward=backward_train,
)
