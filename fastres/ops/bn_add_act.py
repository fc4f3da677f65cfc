"""bn_add_act: y = act(batch_norm(x) + residual), the end of a residual block (He et al. 2016, equation 1).

x, residual: (N, C, H, W) of one shape; y takes x's memory format. Statistics as in ``bn_act``. Normalised, added and
activated in fp32 (fp64 for fp64) with one rounding. Saved for backward: x, the statistics and the ReLU's mask of one bit per
element (``_mask``), which training writes beside y; evaluation saves y, and x where weight or bias need a gradient;
its backward runs those of ``add_act`` and ``bn_act``. Backward takes the gradient of y in two parts where two paths of the next
block lead to it, and adds them in fp32.
Bytes moved: 3 tensors in evaluation, 4 and the mask in training, 6 and the mask in backward, 7 with two parts; with the backend
``cuda_cluster`` 3 in training, 4 in backward, 5 with two parts.
"""

import torch

from fastres.kernels.layout import memory_format
from fastres.ops import _backends, _bn, _bn_cluster, _check, _mask
from fastres.ops._op import Op, Sample
from fastres.ops.bn_act import BN_ACT_BACKWARD, are_fixed, scaled, through_relu

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act) -> Tensor"
)
SCHEMA_TRAIN = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps, str act)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def reference(x, residual, weight, bias, mean, var, eps, act):
    return _bn.activate(_bn.normalize(x, weight, bias, mean, var, eps).add_(residual), act)


def reference_train(x, residual, weight, bias, eps, act):
    y, mean, var = _bn.normalize_train(x, weight, bias, eps)
    y = _bn.activate(y.add_(residual), act)
    return y, mean, var, _mask.pack(y, act)


def reference_backward(grad_y, grad_y2, mask, x, weight, mean, var, eps, act):
    dz = _mask.gradient(_bn.whole(grad_y, grad_y2), mask, x, act)
    grad_x, grad_weight, grad_bias = _bn.differentiate(dz, x, weight, mean, var, eps, True)
    grad_residual = torch.empty_like(grad_x).copy_(dz)
    return grad_x, grad_residual, *_bn.parameter_grads(grad_weight, grad_bias, weight, None)


def check(x, residual, weight, bias, mean, var, eps, act):
    _bn.check_forward("bn_add_act", x, weight, bias, {"mean": mean, "var": var}, eps, act, residual=residual)


def check_train(x, residual, weight, bias, eps, act):
    _bn.check_forward("bn_add_act_train", x, weight, bias, {}, eps, act, residual=residual)
    _check.batch_statistics("bn_add_act_train", x)


def check_backward(grad_y, grad_y2, mask, x, weight, mean, var, eps, act):
    grads = {"grad_y": grad_y, **_bn.two_parts(grad_y2)}
    _bn.check_forward("bn_add_act_backward", x, weight, None, {"mean": mean, "var": var}, eps, act, **grads)
    _mask.check("bn_add_act_backward", mask, x, act)


def fake(x, residual, weight, bias, mean, var, eps, act):
    return _bn.fake_like(x)


def fake_train(x, residual, weight, bias, eps, act):
    return _bn.fake_like(x), *_bn.fake_stats(x), _mask.fake(x, act)


def fake_backward(grad_y, grad_y2, mask, x, weight, mean, var, eps, act):
    return _bn.fake_like(x), _bn.fake_like(x), *_bn.fake_parameter_grads(x, weight, None)


def why_not_backward(grad_y, grad_y2, mask, *rest):
    return _bn.why_not(grad_y, grad_y2, *rest) or _mask.why_not(mask)


def cost_backward(grad_y, grad_y2=None, *rest):
    return _bn.cost(6 if grad_y2 is None else 7, 1)(grad_y)


def setup_context(ctx, inputs, output):
    x, residual, weight, bias, mean, var, ctx.eps, ctx.act = inputs
    mean, var = _bn.constants(mean, var)
    ctx.training, ctx.fixed, ctx.layout = False, are_fixed(weight, bias), memory_format(x)
    _save(ctx, None if ctx.fixed else x, residual, weight, bias, mean, var, _mask.needed(output, ctx.act))


def setup_context_train(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.act = inputs
    _, mean, var, mask = output
    ctx.training, ctx.fixed = True, False
    ctx.mark_non_differentiable(mean, var, mask)
    ctx.layout = memory_format(x)
    _save(ctx, x, residual, weight, bias, mean, var, mask)


def _save(ctx, x, residual, weight, bias, mean, var, mask_or_y):
    ctx.residual_dtype, ctx.bias_dtype = residual.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, bias, mean, var, mask_or_y)


def gradients(ctx, grad_y, grad_y2):
    """Gradients of x, residual, weight and bias; None for those not needed."""
    x, weight, bias, mean, var, mask_or_y = ctx.saved_tensors
    if ctx.fixed:
        dz = through_relu(_bn.whole(grad_y, grad_y2).contiguous(memory_format=ctx.layout), mask_or_y, ctx.act)
        return scaled(dz, weight, mean, var, ctx.eps), dz.to(ctx.residual_dtype), None, None
    if ctx.training:  # the mask is in this order; hooks on saved tensors may have changed the layout of x
        x = x.contiguous(memory_format=ctx.layout)
    if torch.is_grad_enabled():  # create_graph=True
        grad_y = _bn.whole(grad_y, grad_y2)
        dz = _mask.gradient(grad_y, mask_or_y, x, ctx.act) if ctx.training else _mask.gradient_at(grad_y, mask_or_y)
        grad_x, *others = _bn.differentiate_twice(dz, x, weight, bias, (mean, var), ctx.eps, ctx.training)
        return grad_x, dz.to(ctx.residual_dtype), *others
    grad_y, grad_y2 = _bn.laid_as_both(x, grad_y, grad_y2)
    if ctx.training:
        args = weight, mean, var, ctx.eps, ctx.act
        grad_x, dz, grad_weight, grad_bias = BN_ADD_ACT_BACKWARD(grad_y, grad_y2, mask_or_y, x, *args)
    else:
        dz = through_relu(grad_y, mask_or_y, ctx.act)
        grad_x, grad_weight, grad_bias = BN_ACT_BACKWARD(dz, x, weight, None, mean, var, ctx.eps, "none", False)
    found = grad_x, dz.to(ctx.residual_dtype), grad_weight, grad_bias.to(ctx.bias_dtype or grad_bias.dtype)
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    return *gradients(ctx, grad_y, None), None, None, None, None


def backward_train(ctx, grad_y, *others, grad_y2=None):
    return *gradients(ctx, grad_y, grad_y2), None, None


def samples(device, dtype):
    return _bn.samples(device, dtype, lambda *args: args)


def samples_train(device, dtype):
    return _bn.samples(device, dtype, lambda x, r, w, b, mean, var, eps, act: (x, r, w, b, eps, act))


def samples_backward(device, dtype):
    found = []
    for sample in samples_train(device, dtype):
        x, residual, weight, _, eps, act = sample.args
        grad_y = residual.flip(0).contiguous()
        _, mean, var, mask = reference_train(*sample.args)
        args = mask, x, weight, mean, var, eps, act
        found.append(Sample(sample.label, (grad_y, None, *args)))
    return _bn.samples_of_two_parts(found)


BN_ADD_ACT_BACKWARD = Op(
    "bn_add_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=cost_backward,
    backends=[
        *_backends.all_kernels("bn_add_act_backward", why_not_backward, module="bn_add_act"),
        _bn_cluster.backend("bn_add_act_backward", why_not_backward),
    ],
)

BN_ADD_ACT = Op(
    "bn_add_act",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=_bn.cost(3),
    backends=_backends.all_kernels("bn_add_act", _bn.why_not),
    setup_context=setup_context,
    backward=backward,
)

BN_ADD_ACT_TRAIN = Op(
    "bn_add_act_train",
    SCHEMA_TRAIN,
    reference=reference_train,
    check=check_train,
    fake=fake_train,
    samples=samples_train,
    cost=_bn.cost(4, 1),
    backends=[
        *_backends.all_kernels("bn_add_act_train", _bn.why_not, module="bn_add_act"),
        _bn_cluster.backend("bn_add_act_train", _bn.why_not),
    ],
    setup_context=setup_context_train,
    backward=backward_train,
)
