"""conv_statistics: y = conv2d(x, weight), and the statistics of y that the batch norm behind it needs in training (He et al.
2016, section 3.4).

x: (N, C, H, W); weight: (K, C / groups, R, S) of x's dtype; y is (N, K, OH, OW) in x's memory format; mean and var, biased, are
fp32 (K,) tensors (fp64 for fp64 x) of the rounded y. A kernel computes them while y is in registers, from 256 values of a
channel at a time: their mean, then the deviations from it; the parts are merged in double. This saves a whole read of y.
Gradients are those of ``conv``: the statistics have none of their own, since the backward of the batch norm that uses them
accounts for them. Saved for backward: x and weight. Bytes moved: x, weight and y.

Where no kernel is chosen, callers run the convolution, and the batch norm finds its statistics itself.
"""

from typing import Any

from torch import Tensor

from fastres import dispatch, tune
from fastres.dispatch import Backend
from fastres.errors import must
from fastres.kernels import native
from fastres.kernels.layout import why_not_dense
from fastres.ops import _bn, _check, _conv, _conv_cuda, _conv_wide
from fastres.ops._op import Op, Sample
from fastres.ops.conv import CONV, GEOMETRY, gradients
from fastres.ops.conv import reference as convolve

NAME = "conv_statistics"
SCHEMA = f"(Tensor x, Tensor weight, {GEOMETRY}) -> (Tensor, Tensor, Tensor)"
STATISTICS = "bn_statistics"  # the pass over y by itself
WIDE = "cuda_wide"


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    _, mean, var = _bn.normalize_train(y, None, None, 1e-5)
    return mean, var


def reference(x, weight, *geometry):
    y = convolve(x, weight, None, *geometry)
    return y, *_statistics(y)


def fallback(x, weight, *geometry):
    """The convolution as it is chosen, and the pass that finds the statistics."""
    y = CONV(x, weight, None, *geometry)
    has_kernel = y.is_cuda and y.dtype in _conv_cuda.DTYPES and why_not_dense(y) is None and native.why_not(STATISTICS) is None
    return y, *(native.op(STATISTICS)(y) if has_kernel else _statistics(y))


def check(x, weight, stride, padding, dilation, groups):
    _conv.check_convolution(NAME, x, weight, None, stride, padding, dilation, groups)
    if weight.dtype != x.dtype:
        raise must(NAME, "weight", f"of x's dtype {x.dtype}", weight.dtype, "cast one of them")
    _check.batch_statistics(NAME, x.new_empty(1).expand(_conv.output_shape(x, weight, stride, padding, dilation)))


def fake(x, weight, stride, padding, dilation, groups):
    y = _conv.fake(x, weight, stride, padding, dilation)
    return y, *_bn.fake_stats(y)


def setup_context(ctx, inputs, output):
    x, weight, *ctx.geometry = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight)


def backward(ctx, grad_y, grad_mean, grad_var):
    wanted = (*ctx.needs_input_grad[:2], False)
    grad_x, grad_weight, _ = gradients(grad_y, *ctx.saved_tensors, ctx.geometry, wanted)
    return grad_x, grad_weight, None, None, None, None


def samples(device, dtype):
    """Those of the evaluation ops, without bias."""
    found = []
    for sample in _conv.samples(device, dtype, with_residual=False):
        x, weight, *_, stride, padding, dilation, groups, _ = sample.args
        found.append(Sample(sample.label, (x, weight.to(dtype), stride, padding, dilation, groups)))
    return found


def cost(x, weight, stride, padding, dilation, groups):
    return _conv.cost(x, weight, None, stride, padding, dilation)


def may_find(x: Tensor, weight: Tensor, *geometry: Any) -> bool:
    """Whether a kernel of this op may be chosen, or is forced. A cheap filter before casts and ``dispatch``."""
    if dispatch.is_forced():
        return True
    proven = x.is_cuda and tune.why_not_validated(NAME, WIDE, x.device) is None
    return proven and _conv_wide.why_not_statistics(x, weight, *geometry) is None


def why_not_wide(x, weight, *geometry):
    return _conv_wide.why_not_statistics(x, weight, *geometry) or why_not_dense(x)


CONV_STATISTICS = Op(
    NAME,
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=[Backend(WIDE, why_not_wide, lambda: _conv_wide.run_statistics, only_tuned=True)],
    setup_context=setup_context,
    backward=backward,
    fallback=fallback,
)
