"""conv_bn_act: y = act(batch_norm(conv2d(x))) in evaluation (He et al. 2016, figure 2 and 5, one weight layer).

x: (N, C, H, W); weight: (K, C / groups, R, S); y is (N, K, OH, OW) in x's memory format. Any stride, padding, dilation
and groups. Batch norm is folded into a cached copy of the weights; accumulates in fp32. For backward the inputs are
saved and the plain composition runs again. Bytes moved: x, weight and y.
"""

from fastres.ops import _conv
from fastres.ops._op import Op

SCHEMA = f"(Tensor x, {_conv.PARAMETERS}) -> Tensor"


def reference(x, *parameters):
    return _conv.reference(x, None, *parameters)


def check(x, *parameters):
    _conv.check("conv_bn_act", x, None, *parameters)


def fake(x, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    return _conv.fake(x, weight, stride, padding, dilation)


def setup_context(ctx, inputs, output):
    ctx.flags = tuple(inputs[7:])
    _conv.save(ctx, inputs[:7])


def backward(ctx, grad_y):
    grads = _conv.recompute_gradients(ctx, grad_y, lambda x, *p: _conv.differentiable(x, None, *p, *ctx.flags))
    return *grads, *[None] * len(ctx.flags)


def samples(device, dtype):
    return _conv.samples(device, dtype, with_residual=False)


def cost(x, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    return _conv.cost(x, weight, None, stride, padding, dilation)


CONV_BN_ACT = Op(
    "conv_bn_act",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=_conv.backends(with_residual=False),
    setup_context=setup_context,
    backward=backward,
)
