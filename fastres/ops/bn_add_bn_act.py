"""bn_add_bn_act: y = act(batch_norm(x) + batch_norm(residual)), the end of a block whose shortcut is a projection.

x, residual: outputs of the block's last convolution and of the shortcut's (He et al. 2016, equation 2), of one shape, each
with its own parameters and statistics; y takes x's memory format. Statistics as in ``bn_act``. Normalised, added and
activated in fp32 (fp64 for fp64) with one rounding; the normalised shortcut is never written. Saved for backward: x,
residual, the statistics and the ReLU's mask of one bit per element, as in ``bn_add_act``; backward too may get the gradient
of y in two parts. Bytes moved: 3 tensors in evaluation, 5 and the mask in training, 8 and twice the mask in backward, 10 and
the mask with two parts, whose masked sum is written; on the CPU 11 and the mask, 12 with two parts, since it always writes
the gradient behind the activation and reads it three times.
"""

import torch

from fastres.kernels.layout import memory_format
from fastres.ops import _backends, _bn, _check, _mask
from fastres.ops._op import Op, Sample
from fastres.ops.bn_act import BN_ACT_BACKWARD, are_fixed, scaled, through_relu

_SHORTCUT = "Tensor? residual_weight, Tensor? residual_bias"
SCHEMA = (
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
    f" {_SHORTCUT}, Tensor residual_mean, Tensor residual_var, float residual_eps, str act) -> Tensor"
)
SCHEMA_TRAIN = (
    f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, {_SHORTCUT}, float residual_eps, str act)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor residual, Tensor? weight, Tensor mean, Tensor var,"
    " float eps, Tensor? residual_weight, Tensor residual_mean, Tensor residual_var, float residual_eps, str act)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def reference(x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act):
    shortcut = _bn.normalize(residual, r_weight, r_bias, r_mean, r_var, r_eps)
    return _bn.activate(_bn.normalize(x, weight, bias, mean, var, eps).add_(shortcut), act)


def reference_train(x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act):
    y, mean, var = _bn.normalize_train(x, weight, bias, eps)
    shortcut, r_mean, r_var = _bn.normalize_train(residual, r_weight, r_bias, r_eps)
    y = _bn.activate(y.add_(shortcut), act)
    return y, mean, var, r_mean, r_var, _mask.pack(y, act)


def reference_backward(grad_y, grad_y2, mask, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act):
    """Gradients of x and residual, of weight and bias, of residual_weight and residual_bias."""
    dz = _mask.gradient(_bn.whole(grad_y, grad_y2), mask, x, act)
    grad_x, *grads = _bn.differentiate(dz, x, weight, mean, var, eps, True)
    r_dz = dz.to(residual.dtype)
    grad_residual, *r_grads = _bn.differentiate(r_dz, residual, r_weight, r_mean, r_var, r_eps, True)
    return (
        grad_x, torch.empty_like(grad_x).copy_(grad_residual), *_bn.parameter_grads(*grads, weight, None),
        *_bn.parameter_grads(*r_grads, r_weight, None),
    )  # fmt: skip


def _check_both(op, x, residual, weight, bias, stats, eps, r_weight, r_bias, r_stats, r_eps, act, **activations):
    _bn.check_forward(op, x, weight, bias, stats, eps, act, residual=residual, **activations)
    parameters = {"residual_weight": r_weight, "residual_bias": r_bias}
    _check.tensors(op, x=x, **r_stats)
    _check.per_channel(op, x.shape[1], x, **parameters, **r_stats)
    _check.eps(op, r_eps)


def check(x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act):
    stats, r_stats = {"mean": mean, "var": var}, {"residual_mean": r_mean, "residual_var": r_var}
    _check_both("bn_add_bn_act", x, residual, weight, bias, stats, eps, r_weight, r_bias, r_stats, r_eps, act)


def check_train(x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act):
    _check_both("bn_add_bn_act_train", x, residual, weight, bias, {}, eps, r_weight, r_bias, {}, r_eps, act)
    _check.batch_statistics("bn_add_bn_act_train", x)


def check_backward(grad_y, grad_y2, mask, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act):
    stats, r_stats = {"mean": mean, "var": var}, {"residual_mean": r_mean, "residual_var": r_var}
    rest = weight, None, stats, eps, r_weight, None, r_stats, r_eps, act
    _check_both("bn_add_bn_act_backward", x, residual, *rest, grad_y=grad_y, **_bn.two_parts(grad_y2))
    _mask.check("bn_add_bn_act_backward", mask, x, act)


def fake(x, *rest):
    return _bn.fake_like(x)


def fake_train(x, residual, *rest):
    return _bn.fake_like(x), *_bn.fake_stats(x), *_bn.fake_stats(x), _mask.fake(x, rest[-1])


def fake_backward(grad_y, grad_y2, mask, x, residual, weight, mean, var, eps, r_weight, *rest):
    grads, r_grads = _bn.fake_parameter_grads(x, weight, None), _bn.fake_parameter_grads(x, r_weight, None)
    return _bn.fake_like(x), _bn.fake_like(x), *grads, *r_grads


def setup_context(ctx, inputs, output):
    x, residual, weight, bias, mean, var, eps, r_weight, r_bias, r_mean, r_var, r_eps, act = inputs
    mean, var = _bn.constants(mean, var)
    r_mean, r_var = _bn.constants(r_mean, r_var)
    ctx.flags = eps, r_eps, act, False
    ctx.fixed, ctx.layout = are_fixed(weight, bias, r_weight, r_bias), memory_format(x)
    ctx.residual_like = residual.dtype, memory_format(residual)
    y = _mask.needed(output, act)
    x, residual = (None, None) if ctx.fixed else (x, residual)
    ctx.save_for_backward(x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, y)


def setup_context_train(ctx, inputs, output):
    x, residual, weight, bias, eps, r_weight, r_bias, r_eps, act = inputs
    _, *constants = output
    ctx.mark_non_differentiable(*constants)
    ctx.flags, ctx.fixed = (eps, r_eps, act, True), False
    ctx.layout = memory_format(x)
    mean, var, r_mean, r_var, mask = constants
    ctx.save_for_backward(x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, mask)


def gradients(ctx, grad_y, grad_y2):
    """Gradients of x, residual, weight, bias, residual_weight and residual_bias, needed or not."""
    x, residual, weight, bias, mean, var, r_weight, r_bias, r_mean, r_var, mask_or_y = ctx.saved_tensors
    eps, r_eps, act, training = ctx.flags
    if ctx.fixed:
        dz, (dtype, layout) = through_relu(grad_y.contiguous(memory_format=ctx.layout), mask_or_y, act), ctx.residual_like
        grad_residual = scaled(dz.to(dtype).contiguous(memory_format=layout), r_weight, r_mean, r_var, r_eps)
        return scaled(dz, weight, mean, var, eps), grad_residual, None, None, None, None
    if training:  # the mask is in this order; hooks on saved tensors may have changed the layout of x
        x = x.contiguous(memory_format=ctx.layout)
    if torch.is_grad_enabled():  # create_graph=True
        grad_y = _bn.whole(grad_y, grad_y2)
        dz = _mask.gradient(grad_y, mask_or_y, x, act) if training else _mask.gradient_at(grad_y, mask_or_y)
        found = _bn.differentiate_twice(dz, x, weight, bias, (mean, var), eps, training)
        others = _bn.differentiate_twice(
            dz.to(residual.dtype), residual, r_weight, r_bias, (r_mean, r_var), r_eps, training
        )
        return found[0], others[0], *found[1:], *others[1:]
    grad_y, grad_y2 = _bn.laid_as_both(x, grad_y, grad_y2)
    if training:
        args = weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act
        grad_x, grad_residual, *grads = BN_ADD_BN_ACT_BACKWARD(grad_y, grad_y2, mask_or_y, x, residual, *args)
    else:
        dz = through_relu(grad_y, mask_or_y, act)
        grad_x, *own = BN_ACT_BACKWARD(dz, x, weight, None, mean, var, eps, "none", False)
        r_dz = _bn.laid_as(residual, dz.to(residual.dtype))
        grad_residual, *other = BN_ACT_BACKWARD(r_dz, residual, r_weight, None, r_mean, r_var, r_eps, "none", False)
        grads = [*own, *other]
    grad_weight, grad_bias, r_grad_weight, r_grad_bias = grads
    biases = (g if b is None else g.to(b.dtype) for g, b in ((grad_bias, bias), (r_grad_bias, r_bias)))
    grad_bias, r_grad_bias = biases
    return grad_x, grad_residual.to(residual.dtype), grad_weight, grad_bias, r_grad_weight, r_grad_bias


def _asked_for(ctx, found):
    return tuple(grad if need else None for grad, need in zip(found, ctx.needs_input_grad, strict=False))


def backward(ctx, grad_y):
    grad_x, grad_residual, grad_weight, grad_bias, r_grad_weight, r_grad_bias = gradients(ctx, grad_y, None)
    found = grad_x, grad_residual, grad_weight, grad_bias, None, None, None, r_grad_weight, r_grad_bias
    return _asked_for(ctx, (*found, *[None] * 4))


def backward_train(ctx, grad_y, *others, grad_y2=None):
    grad_x, grad_residual, grad_weight, grad_bias, r_grad_weight, r_grad_bias = gradients(ctx, grad_y, grad_y2)
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
    for sample in samples_train(device, dtype):
        x, residual, weight, _, eps, r_weight, _, r_eps, act = sample.args
        grad_y = residual.flip(0).contiguous()
        _, mean, var, r_mean, r_var, mask = reference_train(*sample.args)
        args = mask, x, residual, weight, mean, var, eps, r_weight, r_mean, r_var, r_eps, act
        found.append(Sample(sample.label, (grad_y, None, *args)))
    return _bn.samples_of_two_parts(found)


def why_not_backward(grad_y, grad_y2, mask, *rest):
    return _bn.why_not(grad_y, grad_y2, *rest) or _mask.why_not(mask)


def cost_backward(grad_y, grad_y2=None, *rest):
    if grad_y.device.type == "cpu":
        return _bn.cost(11 if grad_y2 is None else 12, 1)(grad_y)
    return (_bn.cost(8, 2) if grad_y2 is None else _bn.cost(10, 1))(grad_y)


BN_ADD_BN_ACT_BACKWARD = Op(
    "bn_add_bn_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=cost_backward,
    backends=_backends.all_kernels("bn_add_bn_act_backward", why_not_backward, module="bn_add_bn_act"),
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
    cost=_bn.cost(5, 1),
    backends=_backends.all_kernels("bn_add_bn_act_train", _bn.why_not, module="bn_add_bn_act"),
    setup_context=setup_context_train,
    backward=backward_train,
)
