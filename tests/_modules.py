"""What the tests of modules share: plain-PyTorch forwards of every block, and the judgement of a step against them."""

import contextlib
import copy

import numpy
import torch
from tolerances import assert_close_to_truth
from torch import nn

import fastres.nn as fnn


def conv_bn_act(block, x, residual=None):
    y = block.bn(block.conv(x))
    y = y if residual is None else y + residual
    return y if block.act is None else block.act(y)


def _two_layers(block, x):
    return block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))


def _three_layers(block, x):
    return block.bn3(block.conv3(block.relu(_two_layers(block, x))))


def _shortcut(block, x):
    return x if block.downsample is None else block.downsample(x)


def _add(y, residual):
    """As ``y += residual``: y's dtype stays."""
    return (y + residual).to(y.dtype)


def basic_block(block, x):
    return block.relu(_add(_two_layers(block, x), _shortcut(block, x)))


def bottleneck(block, x):
    return block.relu(_add(_three_layers(block, x), _shortcut(block, x)))


def plain_block(block, x):
    return block.relu(_two_layers(block, x))


def plain_bottleneck(block, x):
    return block.relu(_three_layers(block, x))


def _resized(block, x, activated):
    if block.downsample is None:
        return x
    return block.downsample(x if isinstance(block.downsample, fnn.ZeroPadShortcut) else activated)


def preact_basic(block, x):
    activated = block.relu(block.bn1(x))
    return block.conv2(block.relu(block.bn2(block.conv1(activated)))) + _resized(block, x, activated)


def preact_bottleneck(block, x):
    activated = block.relu(block.bn1(x))
    y = block.conv2(block.relu(block.bn2(block.conv1(activated))))
    return block.conv3(block.relu(block.bn3(y))) + _resized(block, x, activated)


DRAWS = 3
ENTRIES = 2**16

_PLAIN = {
    fnn.ConvBNAct2d: conv_bn_act,
    fnn.BasicBlock: basic_block,
    fnn.Bottleneck: bottleneck,
    fnn.PlainBlock: plain_block,
    fnn.PlainBottleneck: plain_bottleneck,
    fnn.PreActBasicBlock: preact_basic,
    fnn.PreActBottleneck: preact_bottleneck,
}

# What no block of 16 channels takes.
BAD_INPUTS = {
    "rank 2": torch.zeros(2, 16),
    "rank 3": torch.zeros(16, 9, 9),
    "channels": torch.zeros(2, 3, 9, 9),
    "float64": torch.zeros(2, 16, 9, 9).double(),
    "float16": torch.zeros(2, 16, 9, 9).half(),
    "int64": torch.zeros(2, 16, 9, 9).long(),
    "bool": torch.zeros(2, 16, 9, 9).bool(),
    "complex": torch.zeros(2, 16, 9, 9, dtype=torch.complex64),
    "other device": torch.zeros(2, 16, 9, 9, device="meta"),
    "no height": torch.zeros(2, 16, 0, 9),
    "sparse": torch.zeros(2, 16, 9, 9).to_sparse(),
    "None": None,
    "list": [1.0],
    "NumPy": numpy.zeros((2, 16, 9, 9), "float32"),
}


def plainly(block, *args):
    """The block's forward in plain PyTorch, module by module."""
    return _PLAIN[type(block)](block, *args)


def called(module, *args):
    return module(*args)


def assert_same_modules(module, other):
    """Of the same names, types and attributes, as after optimising one of them was undone."""
    for (name, ours), (_, theirs) in zip(module.named_modules(), other.named_modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert vars(ours).keys() == vars(theirs).keys(), name


def lively(module):
    """The module with batch norms away from their initial state: gammas of both signs and one 0, used statistics."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                for tensor in (child.bias, child.running_mean):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator))
                for tensor in (child.weight, child.running_var):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                if child.weight is not None:
                    child.weight[0], child.weight[1] = 0, -1
    return module


def steady(module):
    """A lively module whose ReLUs are on or off by whole channels, so that no rounding of bfloat16 switches one."""
    with torch.no_grad():
        for child in lively(module).modules():
            if isinstance(child, nn.BatchNorm2d):
                child.weight.mul_(0.5)
                child.bias.fill_(8)
                child.bias[1::2] = -8
    return module


def step(forward, module, x, context=contextlib.nullcontext):
    """Everything a training step yields: output, gradients, buffers, by name."""
    module = copy.deepcopy(module)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with context():
        y = forward(module, x)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(seed.to(torch.bfloat16).to(y.dtype))
    found = {"output": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return found | dict(module.named_buffers())


def saved(model, x, amp=False):
    """Bytes that a forward keeps for backward, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        model(x)
    return sum(kept.values())


def inference(forward, module, x, context=contextlib.nullcontext):
    """The output without gradients, by name."""
    with torch.no_grad(), context():
        return {"output": forward(copy.deepcopy(module), x)}


def judge(draws, dtype):
    """Compare results by name: integers equal, the rest within budget; all gradients as one vector, as all buffers.

    One vector over all draws, every tensor in it scaled to its largest true entry, because the rounding errors of the
    few values of a single bias are a matter of luck, PyTorch's as ours.

    Args:
        draws: ``(ours, theirs, truth)`` for each input, dictionaries of tensors.
    """
    groups = {}
    for ours, theirs, truth in draws:
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            actual = ours[name]
            if expected is None:
                assert actual is None, f"{name} must be None, got {actual}"
                continue
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
            if not expected.dtype.is_floating_point:
                assert torch.equal(actual, expected), f"{name} must be {expected}, got {actual}"
                continue
            kind = "gradients" if "gradient" in name else "buffers" if "running" in name else name
            groups.setdefault(kind, []).append(_scaled(actual, expected, truth[name]))
    for kind, rows in groups.items():
        assert_close_to_truth(*(torch.cat(column) for column in zip(*rows, strict=True)), dtype, kind)


def _scaled(*tensors):
    """Flat, in float64, divided by the largest entry of the last; of a large tensor every so many entries."""
    flat = [tensor.detach().flatten() for tensor in tensors]
    every = flat[0].numel() // ENTRIES | 1  # odd, to meet every channel
    flat = [tensor[::every].double() for tensor in flat]
    scale = flat[-1].abs().max().item() if flat[-1].numel() else 0.0
    return [tensor / (scale or 1.0) for tensor in flat]


def compare(module, x, dtype=torch.float32, ours=called, plain=plainly, run=step, context=contextlib.nullcontext):
    """Judge ``run`` of the module on x, and on more inputs like x, against plain PyTorch and float64.

    ``context`` surrounds both at ``dtype``, not the float64 run.
    """
    module, draws = copy.deepcopy(module).to(dtype), []
    exact = copy.deepcopy(module).double()
    for draw in range(DRAWS):
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(draw))
        image = torch.empty_like(x).copy_(fresh).to(torch.bfloat16).to(dtype)
        truth = run(plain, exact, image.double())
        draws.append((run(ours, module, image, context), run(plain, module, image, context), truth))
    judge(draws, torch.bfloat16 if context is not contextlib.nullcontext else dtype)
