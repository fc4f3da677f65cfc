"""bn_add_bn_act: y = act(batch_norm(x) + batch_norm(residual)), the end of a block whose shortcut is a projection.

x, residual: outputs of the block's last convolution and of the shortcut's (He et al. 2016, equation 2), of one shape, each
with its own parameters and statistics; y takes x's memory format. Statistics as in ``bn_act``. Normalised, added and
activated in fp32 (fp64 for fp64) with one rounding; the normalised shortcut is never written. Saved for backward: x,
residual, the statistics and y, whose sign is the mask. Bytes moved: 3 tensors in evaluation, 5 in training, 10 in backward,
12 on the CPU, which writes the gradient behind the activation and reads it three times.
"""

import torch

from fastres.ops import _backends, _bn, _check
from fastres.ops._op import Op, Sample

_SHORTCUT = "Tensor? residual_weight, Tensor? residual_bias"
SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
    f" {_SHORTCUT}, Tensor residual_mean, Tensor residual_var, float residual_eps, str act) -> Tensor"
)
SCHEMA_TRAIN = (
    f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, {_SHORTCUT}, float residual_eps, str act)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor y, Tensor x, Tensor residual, Tensor? weight, Tensor mean, Tensor var, float eps,"
    " Tensor? residual_weight, Tensor residual_mean, Tensor residual_var, float residual_eps, str act, bool training)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def reference(x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act):
    shortcut = _bn.normalize(residual, r_weight, r_bias, r_mean, r_var, r_eps)
    return _bn.activate(_bn.normalize(x, weight, bias, mean, var, eps).add_(shortcut), act)


def reference_train(x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act):
    y, mean, var = _bn.normalize_train(x, weight, bias, eps)
    shortcut, r_mean, r_var = _bn.normalize_train(residual, r_weight, r_bias, r_eps)
    return _bn.activate(y.add_(shortcut), act), mean, var, r_mean, r_var


def reference_backward(
    grad_y, y, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act, training
):  # fmt: skip
    """Gradients of x and residual, of weight and bias, of residual_weight and residual_bias."""
    dz = torch.ops.aten.threshold_backward(grad_y, y, 0) if act == "relu" else grad_y
    grad_x, *grads = _bn.differentiate(dz, x, weight, mean, var, eps, training)
    r_dz = dz.to(residual.dtype)
    grad_residual, *r_grads = _bn.differentiate(r_dz, residual, r_weight, r_mean, r_var, r_eps, training)
    return (
        grad_x, torch.empty_like(grad_x).copy_(grad_residual), *_bn.parameter_grads(*grads, weight, None),
        *_bn.parameter_grads(*r_grads, r_weight, None),
    )  # fmt: skip


def _check_both(op, x, residual, weight, bias, stats, eps, r_weight, r_bias, r_stats, r_eps, act, **activations):
    _bn.check_forward(op, x, weight, bias, stats, eps, act, residual=residual, **activations)
    parameters = {"residual_weight": r_weight, "residual_bias": r_bias}
    _check.per_channel(op, x.shape[1], x, **parameters, **r_stats)
    _check.eps(op, r_eps)


def check(x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act):
    stats, r_stats = {"mean": mean, "var": var}, {"residual_mean": r_mean, "residual_var": r_var}
    _check_both("bn_add_bn_act", x, residual, weight, bias, stats, eps, r_weight, r_bias, r_stats, r_eps, act)


def check_train(x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act):
    _check_both("bn_add_bn_act_train", x, residual, weight, bias, {}, eps, r_weight, r_bias, {}, r_eps, act)
    _check.batch_statistics("bn_add_bn_act_train", x)


def check_backward(grad_y, y, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act, training):
    stats, r_stats = {"mean": mean, "var": var}, {"residual_mean": r_mean, "residual_var": r_var}
    rest = weight, None, stats, eps, r_weight, None, r_stats, r_eps, act
    _check_both("bn_add_bn_act_backward", x, residual, *rest, grad_y=grad_y, y=y)


def fake(x, *rest):
    return _bn.fake_like(x)


def fake_train(x, *rest):
    return _bn.fake_like(x), *_bn.fake_stats(x), *_bn.fake_stats(x)


def fake_backward(grad_y, y, x, residual, weight, mean, var, eps, r_weight, *rest):
    grads, r_grads = _bn.fake_parameter_grads(x, weight, None), _bn.fake_parameter_grads(x, r_weight, None)
    return _bn.fake_like(x), _bn.fake_like(x), *grads, *r_grads


def setup_context(ctx, inputs, output):
    x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act = inputs
    _bn.refuse_statistics_gradient(mean, var)
    _bn.refuse_statistics_gradient(r_mean, r_var)
    ctx.flags = eps, r_eps, act, False
    ctx.save_for_backward(x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, output)


def setup_context_train(ctx, inputs, output):
    x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act = inputs
    y, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.flags = eps, r_eps, act, True
    mean, var, r_mean, r_var = stats
    ctx.save_for_backward(x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, y)


def gradients(ctx, grad_y):
    """Gradients of x, residual, weight, bias, residual_weight and residual_bias, whether asked for or not."""
    x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, y = ctx.saved_tensors
    eps, r_eps, act, training = ctx.flags
    if torch.is_grad_enabled():  # create_graph=True
        dz = torch.where(y <= 0, 0, grad_y) if act == "relu" else grad_y
        found = _bn.differentiate_twice(dz, x, weight, bias, (mean, var), eps, training)
        others = _bn.differentiate_twice(
            dz.to(residual.dtype), residual, r_weight, r_bias, (r_mean, r_var), r_eps, training
        )
        return found[0], others[0], *found[1:], *others[1:]
    grad_y = _bn.laid_as(x, grad_y)
    grad_x, grad_residual, grad_weight, grad_bias, r_grad_weight, r_grad_bias = BN_ADD_BN_ACT_BACKWARD(
        grad_y, y, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act, training
    )
    biases = (g if b is None else g.to(b.dtype) for g, b in ((grad_bias, bias), (r_grad_bias, r_bias)))
    grad_bias, r_grad_bias = biases
    return grad_x, grad_residual.to(residual.dtype), grad_weight, grad_bias, r_grad_weight, r_grad_bias


def _asked_for(ctx, found):
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    grad_x, grad_residual, grad_weight, grad_bias, r_grad_weight, r_grad_bias = gradients(ctx, grad_y)
    found = grad_x, grad_residual, grad_weight, grad_bias, None, None, None, r_grad_weight, r_grad_bias
    return _asked_for(ctx, (*found, *[None] * 4))


def backward_train(ctx, grad_y, *grad_stats):
    grad_x, grad_residual, grad_weight, grad_bias, r_grad_weight, r_grad_bias = gradients(ctx, grad_y)
    return _asked_for(
        ctx, (grad_x, grad_residual, grad_weight, grad_bias, None, r_grad_weight, r_grad_bias, None, None)
    )


def samples(device, dtype):
    """Those of ``bn_add_act``; the shortcut's parameters are the block's in another order, absent where those are."""

    def build(x, residual, weight, bias, mean, var, eps, act):
        r_weight, r_bias, r_mean, r_var = (None if t is None else t.flip(0) for t in (weight, bias, mean, var))
        return x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, 2 * eps, act

    return _bn.samples(device, dtype, build)


def samples_train(device, dtype):
    found = []
    for sample in samples(device, dtype):
        x, residual, weight, bias, _, _, eps, r_weight, r_bias, _, _, r_eps, act = sample.args
        found.append(Sample(sample.label, (x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act)))
    return found


def samples_backward(device, dtype):
    found = []
    for sample in samples(device, dtype):
        x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act = sample.args
        grad_y = residual.flip(0).contiguous()
        args = grad_y, reference(*sample.args), x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act
        found.append(Sample(f"{sample.label}, evaluation", (*args, False)))
        y, mean, var, r_mean, r_var = reference_train(x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act)
        args = grad_y, y, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act
        found.append(Sample(f"{sample.label}, training", (*args, True)))
    return found


BN_ADD_BN_ACT_BACKWARD = Op(
    "bn_add_bn_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=lambda grad_y, *rest: _bn.cost(12 if grad_y.device.type == "cpu" else 10)(grad_y, *rest),
    backends=_backends.all_kernels("bn_add_bn_act_backward", _bn.why_not, module="bn_add_bn_act"),
)

BN_ADD_BN_ACT = Op(
    "bn_add_bn_act",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=_bn.cost(3),
    backends=_backends.all_kernels("bn_add_bn_act", _bn.why_not),
    setup_context=setup_context,
    backward=backward,
)

BN_ADD_BN_ACT_TRAIN = Op(
    "bn_add_bn_act_train",
    SCHEMA_TRAIN,
    reference=reference_train,
    check=check_train,
    fake=fake_train,
    samples=samples_train,
    cost=_bn.cost(5),
    backends=_backends.all_kernels("bn_add_bn_act_train", _bn.why_not, module="bn_add_bn_act"),
    setup_context=setup_context_train,
    backward=backward_train,
)
