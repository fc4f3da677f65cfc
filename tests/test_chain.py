"""A block's layers as one node of autograd: what is one node, what is not, and that nothing tells the difference."""

import copy

import pytest
import torch
from tolerances import assert_close_to_truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastres
import fastres.nn as fnn
from fastres.experiments.twin import torch_twin
from fastres.kernels import native
from fastres.nn import _fused, _plain
from fastres.ops import _node, _running

LAST = torch.channels_last
BLOCKS = {
    "basic": lambda: fnn.BasicBlock(16, 16),
    "option A": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("A", 16, 32, 2)),
    "projection": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("B", 16, 32, 2)),
    "bottleneck": lambda: fnn.Bottleneck(64, 16),
    "plain": lambda: fnn.PlainBlock(16, 32, 2),
    "single": lambda: fnn.ConvBNAct2d(16, 32, bias=True),
}


def images(block, seed=0):
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(32, channels, 8, 8, generator=torch.Generator().manual_seed(seed)).to(memory_format=LAST)


@pytest.fixture
def nodes(monkeypatch):
    """The numbers of layers of the nodes that were made."""
    found = []
    run = _node.run
    monkeypatch.setattr(_node, "run", lambda chain, *rest: found.append(len(chain.links) // 2) or run(chain, *rest))
    return found


def step(block, x, amp=False):
    """Output, all gradients and all buffers of a step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = block(x)
    (y.to(x.dtype) * torch.linspace(-1, 2, y.shape[3], dtype=x.dtype)).square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **dict(block.named_buffers())}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_is_torchs(name, amp, nodes):
    torch.manual_seed(1)
    block = BLOCKS[name]().to(memory_format=LAST)
    plain, double = torch_twin(block), torch_twin(block).double()
    x = images(block)
    own, same, truth = step(block, x, amp), step(plain, x, amp), step(double, x.double())
    assert nodes == {"bottleneck": [3], "single": [1]}.get(name, [2])
    assert own.keys() == same.keys()
    for what in own:
        assert own[what].dtype == same[what].dtype
        if own[what].is_floating_point():
            assert_close_to_truth(own[what], same[what], truth[what], torch.bfloat16 if amp else torch.float32, what)
        else:
            assert torch.equal(own[what], same[what])


@pytest.mark.parametrize("frozen", [("conv1.weight",), ("conv1.weight", "bn1.weight", "bn1.bias"), ("bn2.weight",)])
@pytest.mark.parametrize("with_x", [True, False])
def test_only_what_is_asked_for_gets_a_gradient(frozen, with_x):
    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    whole, x = copy.deepcopy(block), images(block)
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    expected = step(whole, x)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(with_x)
    y = block(x)
    (y * torch.linspace(-1, 2, 8)).square().sum().backward()
    assert (x.grad is not None) == with_x and (x.grad is None or torch.equal(x.grad, expected["gradient of x"]))
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name in frozen)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[f"gradient of {name}"])


def test_hooks_modes_and_other_layers_see_their_modules_called(nodes):
    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    x, seen = images(block), []
    hook = block.bn2.register_forward_hook(lambda *_: seen.append(1))
    step(block, x)
    assert seen == [1] and nodes == [1]  # the first layer joins; the second is called
    hook.remove()
    nodes.clear()
    block.bn1.eval()
    step(block, x)
    block.bn1.train()
    with torch.no_grad():
        block(x)
    torch.func.functional_call(block, dict(block.named_parameters()), (x,))
    assert nodes == [1, 2]  # the second after one in evaluation; nothing without gradients; a functional call is plain
    report = fastres.explain(nn.Sequential(block), x)
    assert any("bn_add_act_train" in str(module) for module in report.modules) and nodes == [1, 2]


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_are_updated_by_one_native_call(dtype):
    if native.why_not("cpu_bn_running_") is not None:
        pytest.skip(native.why_not("cpu_bn_running_"))
    mean, var, results = torch.randn(8), torch.rand(8), []
    for together in (True, False):
        running = [torch.linspace(-1, 2, 16, dtype=dtype)[::2], torch.ones(8, dtype=dtype)]
        counter = torch.tensor(3)
        before = [t._version for t in (*running, counter)]
        if together:
            assert _running.update_together([_running.Batch(*running, counter, mean, var, 0.1, 16)]) and counter == 4
            assert all(t._version > version for t, version in zip((*running, counter), before, strict=True))  # folds follow
        else:
            _running.update_running(torch.empty(4, 8, 2, 2), *running, mean, var, 0.1)
        results.append(torch.cat(running))
    truth = torch.cat([torch.linspace(-1, 2, 16, dtype=dtype)[::2], torch.ones(8, dtype=dtype)]).double() * 0.9
    truth += torch.cat([mean, var * 16 / 15]).double() * 0.1
    assert_close_to_truth(*results, truth, dtype)
    wrong = {
        "one value a channel": ([torch.zeros(3)], [torch.zeros(8)], [torch.tensor(0)]),
        "one int64": ([torch.zeros(8)], [torch.zeros(8)], [torch.zeros(2, dtype=torch.int64)]),
        "as long as the others": ([torch.zeros(8)], [torch.zeros(8)] * 2, []),
    }
    for text, buffers in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            native.op("cpu_bn_running_")(*buffers, [mean], [var], [0.1], [1.1])
        assert not any(buffer.any() for buffer in buffers[1])


def test_large_inputs_go_op_by_op_with_the_same_bits(nodes, monkeypatch):
    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    other, x = copy.deepcopy(block), images(block)
    own = step(block, x)
    assert nodes == [2]
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", x.numel() - 1)
    for what, tensor in step(other, x).items():
        assert torch.equal(tensor, own[what]), what
    assert nodes == [2]
    report = fastres.explain(nn.Sequential(block), x)
    assert any("one autograd node" in note for note in report.notes)


def test_retained_graphs_hooks_of_tensors_and_checkpoints():
    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    other, x = copy.deepcopy(block), images(block)
    seen = []
    block.conv1.weight.register_hook(lambda grad: seen.append(grad.shape))
    y = block(x)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert len(seen) == 2
    checkpoint(other, x, use_reentrant=False).sum().backward()
    for one, two in zip(block.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, 2 * two.grad)
    y = other(x)
    with torch.no_grad():
        other.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_kept_for_backward_goes_with_the_output():
    import gc
    import weakref

    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    gc.collect()
    gc.disable()
    try:
        y = block(images(block))
        gone = weakref.ref(y.grad_fn)
        del y
        assert gone() is None
    finally:
        gc.enable()


def test_wrong_inputs_raise_torchs_errors_and_update_nothing():
    block = fnn.BasicBlock(16, 16)
    for x in (torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8, dtype=torch.float64), torch.randn(16, 8)):
        with pytest.raises(RuntimeError):
            block(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 16, 1, 1))
    assert block.bn1.num_batches_tracked == 0 and not block.bn1.running_mean.any()
    assert _fused.layers([(block.conv1, block.bn1, block.relu)], torch.randn(4, 16, 4, 4)).shape == (4, 16, 4, 4)


SET = [{"stride": 1}, {"stride": [1, 1]}, {"stride": (1,)}, {"padding": 1}, {"padding": [1, 1], "dilation": [1, 1]}]


@pytest.mark.parametrize("change", SET, ids=str)
def test_a_convolution_without_pairs_is_called(change, nodes):
    """As PyTorch's module takes them where somebody sets them by hand."""
    block = fnn.BasicBlock(16, 16).to(memory_format=LAST)
    vars(block.conv1).update(change)
    x, plain, double = images(block), torch_twin(block), torch_twin(block).double()
    own, same, truth = step(block, x), step(plain, x), step(double, x.double())
    assert nodes == [1] and own.keys() == same.keys()
    for what in own:
        if own[what].is_floating_point():
            assert_close_to_truth(own[what], same[what], truth[what], torch.float32, what)
    assert "only pairs can be fused" in _plain.why_not(block.conv1)
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch_twin(block)(x), rtol=1e-4, atol=1e-4)
