"""conv_bn_add_act: y = act(batch_norm(conv2d(x)) + residual) in evaluation, the end of a block (He et al. 2016, eq. 1).

x, weight and folding as in ``conv_bn_act``; residual has y's shape (N, K, OH, OW). In fp16 and bf16 the oneDNN backend
rounds the convolution before the addition, as PyTorch does. Bytes moved: x, weight, residual and y.
"""

from fastres.ops import _conv
from fastres.ops._op import Op

SCHEMA = f"(Tensor x, Tensor residual, {_conv.PARAMETERS}) -> Tensor"


def check(*args):
    _conv.check("conv_bn_add_act", *args)


def fake(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    return _conv.fake(x, weight, stride, padding, dilation)


def setup_context(ctx, inputs, output):
    ctx.flags = tuple(inputs[8:])
    _conv.save(ctx, inputs[:8])


def backward(ctx, grad_y):
    grads = _conv.recompute_gradients(ctx, grad_y, lambda *p: _conv.differentiable(*p, *ctx.flags))
    return *grads, *[None] * len(ctx.flags)


def samples(device, dtype):
    return _conv.samples(device, dtype, with_residual=True)


def cost(x, residual, weight, bias, bn_weight, bn_bias, mean, var, eps, stride, padding, dilation, groups, act):
    return _conv.cost(x, weight, residual, stride, padding, dilation)


CONV_BN_ADD_ACT = Op(
    "conv_bn_add_act",
    SCHEMA,
    reference=_conv.reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=_conv.backends(with_residual=True),
    setup_context=setup_context,
    backward=backward,
)
