"""Every op x backend x sample x dtype x layout, values and gradients, walked from the registry."""

import itertools

import pytest
import torch
from tolerances import assert_close_to_truth

import fastres
from fastres import budget, dispatch
from fastres.ops import REGISTRY, _mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced")
CPU = torch.device("cpu")
BACKENDS = [(op.name, backend.name) for op in REGISTRY.values() for backend in op.backends]


def laid_out(tensor, layout):
    """The same values with other strides; ``sliced`` lies inside a larger tensor, at an odd offset."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        larger = tensor.new_full([size + 2 for size in tensor.shape], torch.nan if tensor.is_floating_point() else 99)
        inner = larger[tuple(slice(1, size + 1) for size in tensor.shape)]
        inner.copy_(tensor)
        return inner
    return tensor.contiguous()


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def differentiable(op, args):
    """Copies of the arguments; all tensors but the statistics, which are constants, require grad."""
    return [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(not name.endswith(("mean", "var")))
        if isinstance(a, torch.Tensor)
        else a
        for name, a in zip(op.parameters, args, strict=True)
    ]


def values_and_grads(op, args, seeds):
    """Outputs, then gradients of all tensor arguments for fixed output gradients."""
    if not op.differentiable:
        return as_tuple(op(*args)), []
    args = differentiable(op, args)
    outputs = as_tuple(op(*args))
    pairs = [(y, seed) for y, seed in zip(outputs, seeds, strict=True) if y.requires_grad]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], inputs, [seed.to(y.dtype) for y, seed in pairs], allow_unused=True
    )
    return tuple(y.detach() for y in outputs), list(grads)


def spread_of_gradient(seeds, grad):
    """Of a parameter's gradient, which sums the first output's."""
    return budget.spread_of_sums(grad, seeds[0]) if grad is not None and grad.dim() == 1 else 0.0


def in_double(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def cases(device):
    for (name, backend), dtype in itertools.product(BACKENDS, DTYPES):
        yield pytest.param(name, backend, dtype, id=f"{name}-{backend}-{str(dtype).removeprefix('torch.')}")


def check_parity(name, backend, dtype, device, layout):
    """All samples of one op on one backend; returns how many ran and why the others were refused."""
    op, ran, refusals = REGISTRY[name], 0, set()
    implementation = next(b for b in op.backends if b.name == backend)
    for sample in op.samples(device, dtype):
        args = [laid_out(a, layout) for a in sample.args]
        reason = implementation.why_not(*args)
        if reason is not None:
            refusals.add(reason)
            with fastres.use(**{name: backend}), pytest.raises(fastres.UnsupportedError, match="cannot run"):
                op(*args)
            continue
        with fastres.use("torch"):
            probe = as_tuple(op(*in_double(args)))
            generator = torch.Generator().manual_seed(1)
            seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device, dtype) for y in probe]
            truth = values_and_grads(op, in_double(args), seeds)
            reference = values_and_grads(op, args, seeds)
        family = dispatch.family(name)
        backward = REGISTRY.get(f"{family}_backward", op)
        both = (name, backward.name) if backend in (b.name for b in backward.backends) else (name,)
        with fastres.use(**dict.fromkeys(both, backend)):
            own = values_and_grads(op, args, seeds)
        spreads = budget.spreads(name, args, truth[0]), [spread_of_gradient(seeds, t) for t in truth[1]]
        for kind, (a, r, t, s) in enumerate(zip(own, reference, truth, spreads, strict=True)):
            for index, (actual, torch_same, exact, spread) in enumerate(zip(a, r, t, s, strict=True)):
                what = f"{family} {sample.label} {('output', 'gradient')[kind]} {index}"
                assert (actual is None) == (exact is None), what
                if actual is None:
                    continue
                if actual.dtype == torch.uint8:  # bits: of this backend's own y, which rounds as it may
                    assert torch.equal(actual, _mask.pack(a[0], args[-1])), what
                    continue
                if not actual.is_floating_point():  # integers are what they are
                    assert torch.equal(actual, torch_same), what
                    continue
                assert_close_to_truth(actual, torch_same, exact, dtype, what, spread)
        ran += 1
    return ran, refusals


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "backend", "dtype"), list(cases(CPU)))
def test_parity(name, backend, dtype, layout):
    ran, refusals = check_parity(name, backend, dtype, CPU, layout)
    if not ran:
        pytest.skip(f"{backend}: {min(refusals)}")


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "backend", "dtype"), list(cases("cuda")))
def test_parity_cuda(name, backend, dtype, layout):
    ran, refusals = check_parity(name, backend, dtype, torch.device("cuda"), layout)
    if not ran:
        pytest.skip(f"{backend}: {min(refusals)}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(REGISTRY))
def test_opcheck(name, layout):
    """Compiled, which takes longest, one sample in one layout, with gradients where there are any; more of it in R6."""
    op = REGISTRY[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    compiled = ["test_aot_dispatch_dynamic"] if layout == "channels_last" else []
    for sample in op.samples(CPU, torch.float32)[::4]:
        args = [laid_out(a, layout) for a in sample.args]
        last = differentiable(op, args) if op.differentiable else args
        for inputs, wanted in [(args, checks)] * op.differentiable + [(last, checks + compiled)]:
            torch.library.opcheck(getattr(torch.ops.fastres, name).default, tuple(inputs), test_utils=wanted)
        compiled = []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(REGISTRY))
def test_outputs_are_fresh_and_keep_the_memory_format(name, layout):
    op = REGISTRY[name]
    for sample in op.samples(CPU, torch.float32):
        args = [laid_out(a, layout) for a in sample.args]
        before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
        outputs = as_tuple(op(*args))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        for output in outputs:
            assert all(output.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        if layout == "channels_last" and outputs[0].dim() == 4:
            assert outputs[0].is_contiguous(memory_format=torch.channels_last)
