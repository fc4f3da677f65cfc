"""conv_backward_bn_act: the input gradient of a convolution, continued through the ReLU and batch norm that made the input.

For ``z = act(bn(x)); y = conv2d(z, weight)`` in training, as inside every residual block (He et al. 2016, section 3.4):
grad_y is (N, K, OH, OW), weight (K, C / groups, R, S), x (N, C, H, W), of one dtype; mean and var, biased, are those of x. It
gives grad_x, in x's memory format, and the gradients of bn_weight and bn_bias, as ``bn_act_backward`` does.

A kernel reads x while it has the gradient of z in registers. It zeroes what the ReLU stopped (known from x, as in
``bn_act_backward``), rounds to x's dtype, writes the result, and sums it, by itself and times x - mean, 256 values of a channel
at a time; the parts are merged in double. A second pass reads that result and x, and writes grad_x. The two separate backwards
write the gradient of z, read it and x for the sums, read both again, and write grad_x: one read is saved.
Bytes moved: grad_y, weight, and five times x.

Where no kernel is chosen, callers run the two backwards one after the other. The weight gradient is left to them.
"""

import torch
from torch import Tensor

from fastres import dispatch, tune
from fastres.dispatch import Backend
from fastres.ops import _bn, _check, _conv, _conv_wide, bn_act, conv
from fastres.ops._op import Op, Sample

NAME = "conv_backward_bn_act"
SCHEMA = (
    "(Tensor grad_y, Tensor weight, Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor var, float eps, str act,"
    f" {conv.GEOMETRY}) -> (Tensor, Tensor, Tensor)"
)
WIDE = "cuda_wide"


def reference(grad_y, weight, x, bn_weight, bn_bias, mean, var, eps, act, *geometry):
    grad_z = conv.reference_input(grad_y, weight, tuple(x.shape[2:]), *geometry)
    return bn_act.reference_backward(grad_z, x, bn_weight, bn_bias, mean, var, eps, act, True)


def fallback(grad_y, weight, x, bn_weight, bn_bias, mean, var, eps, act, *geometry):
    """The two ops as they are chosen."""
    grad_z = conv.CONV_BACKWARD_INPUT(grad_y, weight, tuple(x.shape[2:]), *geometry)
    return bn_act.BN_ACT_BACKWARD(_bn.laid_as(x, grad_z), x, bn_weight, bn_bias, mean, var, eps, act, True)


def check(grad_y, weight, x, bn_weight, bn_bias, mean, var, eps, act, *geometry):
    _check.images(NAME, grad_y=grad_y, weight=weight, x=x)
    conv.check_backward(NAME, grad_y, x.shape, weight.shape, {"weight": weight, "x": x}, *geometry)
    _check.tensors(NAME, x=x, mean=mean, var=var)  # statistics are required
    _check.per_channel(NAME, x.shape[1], x, bn_weight=bn_weight, bn_bias=bn_bias, mean=mean, var=var)
    _check.eps(NAME, eps)
    _check.act(NAME, act)


def fake(grad_y, weight, x, bn_weight, bn_bias, *rest):
    return _bn.fake_like(x), *_bn.fake_parameter_grads(x, bn_weight, bn_bias)


def samples(device, dtype):
    """The convolutions of the evaluation ops behind a batch norm in training; without its parameters too."""
    found = []
    for index, sample in enumerate(_conv.samples(device, dtype, with_residual=False)):
        x, weight, *_, eps, stride, padding, dilation, groups, act = sample.args
        generator = torch.Generator().manual_seed(index)
        shape = _conv.output_shape(x, weight, stride, padding, dilation)
        grad_y, affine = torch.randn(shape, generator=generator), torch.randn(2, x.shape[1], generator=generator)
        parameters = affine.to(device, _bn.statistics_dtype(x)) if index != 2 else (None, None)
        _, *statistics = _bn.normalize_train(x, None, None, eps)
        norm = (*parameters, *statistics, eps, act)
        args = grad_y.to(device, dtype), weight.to(dtype), x, *norm, stride, padding, dilation, groups
        found.append(Sample(sample.label, args))
    return found


def cost(grad_y, weight, x, *rest):
    moved = grad_y.numel() + weight.numel() + 5 * x.numel()
    return moved * x.element_size(), 2 * grad_y.numel() * weight[0].numel() + 8 * x.numel()


def may_run(x: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether a kernel of this op may be chosen, or is forced. A cheap filter before ``dispatch``."""
    if tuple(stride) != (1, 1) or x.dim() != 4:
        return False
    return dispatch.is_forced() or (x.is_cuda and tune.why_not_validated(NAME, WIDE, x.device) is None)


def why_not_wide(grad_y, weight, x, bn_weight, bn_bias, mean, var, eps, act, *geometry):
    return _conv_wide.why_not_gradient(grad_y, weight, x, *geometry)


CONV_BACKWARD_BN_ACT = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend(WIDE, why_not_wide, lambda: _conv_wide.run_gradient, only_tuned=True)],
    fallback=fallback,
)
