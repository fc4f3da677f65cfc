"""The cuDNN backend on a machine without a GPU: its refusals, and its fold and arguments, with PyTorch in cuDNN's place."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth
from torch._subclasses import FakeTensorMode

from fastres.ops import REGISTRY, _conv_cudnn

pytestmark = pytest.mark.none


@pytest.fixture
def on_cpu():
    """cuDNN's fused call for CPU tensors, by its own schema."""

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_add_relu", add_relu, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_fold_and_arguments(on_cpu, layout):
    op, ran = REGISTRY["conv_bn_add_act"], 0
    for sample in op.samples(torch.device("cpu"), torch.float32):
        args = [a.contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in sample.args]
        if args[-1] != "relu":
            continue
        exact = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        y = _conv_cudnn.run(*args)
        assert_close_to_truth(y, op.reference(*args), exact, torch.float32, sample.label)
        assert y.is_contiguous(memory_format=layout)
        ran += 1
    assert ran


def refusal(monkeypatch, device="cuda", dtype=torch.float16, channels=64, groups=1, act="relu", cudnn=True, residual=True):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)
    with FakeTensorMode():
        x = torch.empty(2, channels, 8, 8, dtype=dtype, device=device)
        weight = torch.empty(64, channels // groups, 1, 1, dtype=dtype, device=device)
        return _conv_cudnn.why_not(x, x if residual else None, weight, groups, act)


def test_refusals_say_why(monkeypatch):
    assert refusal(monkeypatch) is None
    assert "no cuDNN" in refusal(monkeypatch, cudnn=False)
    assert "on cpu" in refusal(monkeypatch, device="cpu")
    assert "float64" in refusal(monkeypatch, dtype=torch.float64)
    assert "NaN" in refusal(monkeypatch, residual=False)
    assert "act='none'" in refusal(monkeypatch, act="none")
    assert "groups=8" in refusal(monkeypatch, groups=8)
    assert "got 3" in refusal(monkeypatch, channels=3)


def test_it_waits_for_a_validated_device():
    from fastres.dispatch import GPU_KERNELS

    for name in ("conv_bn_act", "conv_bn_add_act"):
        assert "cudnn" in {backend.name for backend in REGISTRY[name].backends} & set(GPU_KERNELS)
