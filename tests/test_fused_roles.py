"""A module replaced by one of another kind, itself fusible elsewhere, is called as what it is; so is one that keeps
elsewhere what it needs."""

import copy

import pytest
import torch
from torch import nn

import fastres
from fastres.experiments.twin import torch_twin
from fastres.nn import BasicBlock, _plain


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("relu", nn.MaxPool2d(3, 1, 1)),
        ("bn1", nn.Conv2d(8, 8, 1)),
        ("conv1", nn.BatchNorm2d(8)),
        ("bn2", nn.GroupNorm(2, 8)),
        ("relu", nn.Identity()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_replaced_modules_are_called(name, module, training):
    torch.manual_seed(0)
    block = BasicBlock(8, 8).train(training)
    setattr(block, name, module)
    plain = copy.deepcopy(block)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        out = plain.bn2(plain.conv2(plain.relu(plain.bn1(plain.conv1(x)))))
        expected = plain.relu(out + x)
        torch.testing.assert_close(block(x), expected)


def test_parameters_and_buffers_kept_elsewhere_are_used():
    """As plain attributes, which tools that tie or generate weights make of them."""
    for name in ("bn1.bias", "bn1.running_mean", "bn2.num_batches_tracked", "conv1.bias"):
        torch.manual_seed(0)
        block = BasicBlock(8, 8)
        layer, _, own = name.partition(".")
        module = block.get_submodule(layer)
        value = torch.zeros(8) if name == "conv1.bias" else getattr(module, own)
        delattr(module, own)
        setattr(module, own, value.detach())
        plain, x = torch_twin(block), torch.randn(2, 8, 6, 6)
        torch.testing.assert_close(block(x), plain(x))
        assert "elsewhere" in _plain.why_not(module)


def test_statistics_that_a_called_batch_norm_writes_are_folded_anew():
    """PyTorch's kernel counts up no version."""
    torch.manual_seed(0)
    layer, x = fastres.nn.ConvBNAct2d(8, 8).eval(), torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        before = layer(x)
        hook = layer.bn.register_forward_hook(lambda *_: None)
        layer.bn.train()
        layer(3 * x + 1)
        layer.bn.eval()
        hook.remove()
        found = layer(x)
        torch.testing.assert_close(found, torch_twin(layer)(x))
    assert not torch.equal(found, before)


def test_the_average_of_all_batches_is_of_float64():
    """Whatever the default dtype."""
    bn = torch.nn.BatchNorm2d(8, momentum=None).double()
    layer = fastres.nn.ConvBNAct2d(8, 8).double()
    layer.bn = bn
    plain = torch_twin(layer)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for seed in range(3):
            x = torch.randn(4, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            layer(x), plain(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(bn.running_mean, plain.bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bn.running_var, plain.bn.running_var, rtol=1e-12, atol=1e-12)
