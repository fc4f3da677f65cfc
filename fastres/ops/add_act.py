"""add_act: y = act(x + residual), the tail of a residual block (He et al. 2016, section 3.2, equation 1).

x, residual: any shape, the same for both; y takes x's strides. Any floating dtype; narrower ones than fp32 are computed in
fp32 and rounded once. Saved for backward: y. Bytes moved: 3 tensors forward, 3 backward.
"""

import torch
from torch import Tensor

from fastres.kernels.layout import is_dense, with_strides_of
from fastres.ops import _backends, _check
from fastres.ops._op import Op, Sample, is_differentiated
from fastres.ops._samples import Draw

SCHEMA = "(Tensor x, Tensor residual, str act) -> Tensor"
SCHEMA_BACKWARD = "(Tensor grad_y, Tensor y, str act) -> Tensor"


def reference(x: Tensor, residual: Tensor, act: str) -> Tensor:
    if is_differentiated():
        y = x + residual
    else:  # in x's strides
        y = torch.empty_like(x, dtype=torch.result_type(x, residual))
        torch.add(x, residual, out=y)
    return y.relu_() if act == "relu" else y


def reference_backward(grad_y: Tensor, y: Tensor, act: str) -> Tensor:
    return torch.ops.aten.threshold_backward(grad_y, y, 0) if act == "relu" else grad_y.clone()


def check(x: Tensor, residual: Tensor, act: str) -> None:
    _check.tensors("add_act", x=x, residual=residual)
    _check.act("add_act", act)
    _check.same_shape("add_act", x=x, residual=residual)


def check_backward(grad_y: Tensor, y: Tensor, act: str) -> None:
    _check.tensors("add_act_backward", grad_y=grad_y, y=y)
    _check.act("add_act_backward", act)
    _check.same_shape("add_act_backward", y=y, grad_y=grad_y)


def fake(x: Tensor, residual: Tensor, act: str) -> Tensor:
    return torch.empty_like(x, dtype=torch.result_type(x, residual))


def fake_backward(grad_y: Tensor, y: Tensor, act: str) -> Tensor:
    return torch.empty_like(grad_y)


def setup_context(ctx, inputs, output) -> None:
    x, residual, ctx.act = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(*([output] if ctx.act == "relu" else []))


def backward(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    grad = grad_y
    if ctx.act == "relu":
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: in differentiable PyTorch
            grad = torch.where(y <= 0, 0, grad_y)
        else:
            grad = ADD_ACT_BACKWARD(with_strides_of(y, grad_y), y, ctx.act)
    return grad.to(ctx.dtypes[0]), grad.to(ctx.dtypes[1]), None


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Block tails of several widths, odd sizes that leave a tail behind any vector width, and no activation."""
    tensor = Draw(device, dtype).images
    shapes = [(2, 64, 8, 8), (1, 256, 7, 7), (3, 17, 5, 3), (1, 1, 1, 1), (2, 3, 1, 9)]
    cases = [Sample(f"{'x'.join(map(str, s))}", (tensor(*s), tensor(*s), "relu")) for s in shapes]
    return [*cases, Sample("no activation", (tensor(2, 8, 4, 4), tensor(2, 8, 4, 4), "none"))]


def samples_backward(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(sample.label, (sample.args[0], reference(*sample.args), sample.args[2]))
        for sample in samples(device, dtype)
    ]


def cost(x: Tensor, residual: Tensor, act: str) -> tuple[int, int]:
    return 3 * x.numel() * x.element_size(), 2 * x.numel()


def why_not(x: Tensor, other: Tensor, act: str) -> str | None:
    """What every kernel of this op requires: two dense tensors of one dtype with the same strides."""
    if x.numel() == 0:
        return "the input is empty"
    if x.dtype != other.dtype:
        return f"both tensors must have one dtype, got {x.dtype} and {other.dtype}"
    if x.stride() != other.stride() or not is_dense(x):
        return f"both tensors must be dense with the same strides, got {x.stride()} and {other.stride()}"
    return None


ADD_ACT_BACKWARD = Op(
    "add_act_backward",
    SCHEMA_BACKWARD,
    reference=reference_backward,
    check=check_backward,
    fake=fake_backward,
    samples=samples_backward,
    cost=cost,
    backends=_backends.all_kernels("add_act_backward", why_not, module="add_act"),
)

ADD_ACT = Op(
    "add_act",
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    samples=samples,
    cost=cost,
    backends=_backends.all_kernels("add_act", why_not),
    setup_context=setup_context,
    backward=backward,
)
