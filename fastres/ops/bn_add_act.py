"""bn_add_act: y = act(batch_norm(x) + residual), the end of a residual block (He et al. 2016, equation 1).

x, residual: (N, C, H, W) of one shape; y takes x's memory format. Statistics as in ``bn_act``. Normalised, added and
activated in fp32 (fp64 for fp64) with one rounding. Saved for backward: x, the statistics and y, whose sign is the mask.
Bytes moved: 3 tensors in evaluation, 4 in training, 7 in backward.
"""

import torch

from fastres.ops import _backends, _bn, _check
from fastres.ops._op import Op, Sample

SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act) -> Tensor"
)
SCHEMA_TRAIN = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor y, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps, str act, bool training)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def reference(x, residual, weight, bias, mean, var, eps, act):
    return _bn.activate(_bn.normalize(x, weight, bias, mean, var, eps).add_(residual), act)


def reference_train(x, residual, weight, bias, eps, act):
    y, mean, var = _bn.normalize_train(x, weight, bias, eps)
    return _bn.activate(y.add_(residual), act), mean, var


def reference_backward(grad_y, y, x, weight, mean, var, eps, act, training):
    dz = torch.ops.aten.threshold_backward(grad_y, y, 0) if act == "relu" else grad_y
    grad_x, grad_weight, grad_bias = _bn.differentiate(dz, x, weight, mean, var, eps, training)
    grad_residual = torch.empty_like(grad_x).copy_(dz)
    return grad_x, grad_residual, *_bn.parameter_grads(grad_weight, grad_bias, weight, None)


def check(x, residual, weight, bias, mean, var, eps, act):
    _bn.check_forward("bn_add_act", x, weight, bias, {"mean": mean, "var": var}, eps, act, residual=residual)


def check_train(x, residual, weight, bias, eps, act):
    _bn.check_forward("bn_add_act_train", x, weight, bias, {}, eps, act, residual=residual)
    _check.batch_statistics("bn_add_act_train", x)


def check_backward(grad_y, y, x, weight, mean, var, eps, act, training):
    _bn.check_forward("bn_add_act_backward", x, weight, None, {"mean": mean, "var": var}, eps, act, grad_y=grad_y, y=y)


def fake(x, residual, weight, bias, mean, var, eps, act):
    return _bn.fake_like(x)


def fake_train(x, residual, weight, bias, eps, act):
    return _bn.fake_like(x), *_bn.fake_stats(x)


def fake_backward(grad_y, y, x, weight, mean, var, eps, act, training):
    return _bn.fake_like(x), _bn.fake_like(x), *_bn.fake_parameter_grads(x, weight, None)


def setup_context(ctx, inputs, output):
    x, residual, weight, bias, mean, var, ctx.eps, ctx.act = inputs
    _bn.refuse_statistics_gradient(mean, var)
    ctx.training = False
    _save(ctx, x, residual, weight, bias, mean, var, output)


def setup_context_train(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.act = inputs
    y, mean, var = output
    ctx.training = True
    ctx.mark_non_differentiable(mean, var)
    _save(ctx, x, residual, weight, bias, mean, var, y)


def _save(ctx, x, residual, weight, bias, mean, var, y):
    ctx.residual_dtype, ctx.bias_dtype = residual.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, bias, mean, var, y)


def gradients(ctx, grad_y):
    """Gradients of x, residual, weight and bias; None where none is asked for."""
    x, weight, bias, mean, var, y = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        dz = torch.where(y <= 0, 0, grad_y) if ctx.act == "relu" else grad_y
        grad_x, *others = _bn.differentiate_twice(dz, x, weight, bias, (mean, var), ctx.eps, ctx.training)
        return grad_x, dz.to(ctx.residual_dtype), *others
    grad_y = _bn.laid_as(x, grad_y)
    grad_x, grad_residual, grad_weight, grad_bias = BN_ADD_ACT_BACKWARD(
        grad_y, y, x, weight, mean, var, ctx.eps, ctx.act, ctx.training
    )
    found = (grad_x, grad_residual.to(ctx.residual_dtype), grad_weight, grad_bias.to(ctx.bias_dtype or grad_bias.dtype))
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    return *gradients(ctx, grad_y), None, None, None, None


def backward_train(ctx, grad_y, grad_mean, grad_var):
    return *gradients(ctx, grad_y), None, None


def samples(device, dtype):
    return _bn.samples(device, dtype, lambda *args: args)


def samples_train(device, dtype):
    return _bn.samples(device, dtype, lambda x, r, w, b, mean, var, eps, act: (x, r, w, b, eps, act))


def samples_backward(device, dtype):
    found = []
    for sample in samples(device, dtype):
        x, residual, w, b, mean, var, eps, act = sample.args
        grad_y = residual.flip(0).contiguous()
        y = reference(x, residual, w, b, mean, var, eps, act)
        found.append(Sample(f"{sample.label}, evaluation", (grad_y, y, x, w, mean, var, eps, act, False)))
        y, mean, var = reference_train(x, residual, w, b, eps, act)
        found.append(Sample(f"{sample.label}, training", (grad_y, y, x, w, mean, var, eps, act, True)))
    return found


BN_ADD_ACT_BACKWARD = Op(
    "bn_add_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=_bn.cost(7),
    backends=_backends.all_kernels("bn_add_act_backward", _bn.why_not, module="bn_add_act"),
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
    cost=_bn.cost(4),
    backends=_backends.all_kernels("bn_add_act_train", _bn.why_not, module="bn_add_act"),
    setup_context=setup_context_train,
    backward=backward_train,
)
