"""What spares the host's time in training: blocks whose modules are looked at once, statistics updated together. None of it
changes a value, and nobody who waits for a call waits in vain.
"""

import copy

import pytest
import torch
from torch import nn

import fastres
import fastres.nn as fnn
from fastres.experiments.twin import torch_twin
from fastres.nn import _fused, _plain, _sequence, _stage
from fastres.ops import _running

LAST = torch.channels_last
BLOCKS = {
    "basic": lambda: fnn.BasicBlock(16, 16),
    "bottleneck": lambda: fnn.Bottleneck(64, 16),
    "projection": lambda: fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2)),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    monkeypatch.setattr(_fused, "WHOLE", {"cuda", "cpu"})
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(_running, "_native_update", lambda *tensors: None)


@pytest.fixture
def at_once(monkeypatch):
    """Whether each block that was asked could run at once."""
    found, block = [], _sequence.at_once

    def watched(*args):
        both = block(*args)
        found.append(both is not None)
        return both

    monkeypatch.setattr(_sequence, "at_once", watched)
    return found


@pytest.fixture
def together(monkeypatch):
    """How many batch norms each update in few launches was for."""
    found, update = [], _running.update_together

    def watched(batches):
        done = update(batches)
        found.extend([len(batches)] * done)
        return done

    monkeypatch.setattr(_running, "update_together", watched)
    return found


def images(channels, seed=0):
    return torch.randn(4, channels, 9, 7, generator=torch.Generator().manual_seed(seed)).to(memory_format=LAST)


def step(block, x, amp=False):
    """Output, all gradients and all buffers of a step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = block(x.clone(memory_format=torch.preserve_format))  # of a leaf autocast keeps one cast for all
    (y.to(x.dtype) * torch.linspace(-1, 2, y.shape[3])).square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return {"y": y.detach(), "gradient of x": x.grad, **gradients, **dict(block.named_buffers())}


def one_by_one(monkeypatch):
    monkeypatch.setattr(_fused, "WHOLE", set())
    monkeypatch.setattr(_running, "update_together", lambda batches: False)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for what in found:
        assert torch.equal(found[what], expected[what]), what


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_at_once_has_the_bits_of_its_layers_one_by_one(name, amp, optimised, at_once, together, monkeypatch):
    torch.manual_seed(1)
    block = BLOCKS[name]().to(memory_format=LAST)
    if optimised:
        block = fastres.optimize(torch_twin(block))
    other, x = copy.deepcopy(block), images(block.conv1.in_channels)
    found = step(block, x, amp)
    assert at_once == [True] and together == [sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())]
    one_by_one(monkeypatch)
    assert_same_bits(found, step(other, x, amp))


def test_without_a_gradient_nothing_runs_twice(at_once):
    stage = fnn._stage.Stage(*(fnn.BasicBlock(16, 16) for _ in range(3))).to(memory_format=LAST)
    stage.requires_grad_(False)
    with torch.profiler.profile() as profile:
        stage(images(16))
    convolutions = [event for event in profile.events() if event.name in ("aten::convolution", "fastres_C::cpu_conv")]
    assert at_once == [True] * 3 and len(convolutions) == 6


def watch(kind, block):
    """Something that must see a layer called; what it saw."""
    seen = []
    if kind == "hook":
        block.bn1.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "patched forward":
        forward = block.conv2.forward
        block.conv2.forward = lambda x: forward(seen.append(1) or x)
    elif kind == "subclass":

        class Seeing(nn.BatchNorm2d):
            def forward(self, x):
                seen.append(1)
                return super().forward(x)

        block.bn1.__class__ = Seeing
    elif kind == "hook of the projection":
        block.downsample.register_forward_hook(lambda *_: seen.append(1))
    else:
        block.downsample[1].register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("kind", ["hook", "patched forward", "subclass", "hook of the projection", "hook in the projection"])
@pytest.mark.parametrize("optimised", [False, True])
def test_what_is_added_after_the_first_step_is_seen(kind, optimised, at_once):
    block = BLOCKS["projection"]().to(memory_format=LAST)
    block = fastres.optimize(torch_twin(block)) if optimised else block
    x = images(16)
    step(block, x)
    seen = watch(kind, block)
    step(block, x)
    assert seen == [1] and at_once in ([True], [True, False])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU])
def test_a_forward_replaced_on_the_class_is_called(kind, monkeypatch):
    block, called, forward = BLOCKS["basic"](), [], kind.forward
    step(block, images(16))
    monkeypatch.setattr(kind, "forward", lambda self, x: called.append(self) or forward(self, x))
    step(block, images(16))
    assert len(called) == 2
    assert "replaced on the class" in _plain.why_not(kind(16, 16, 1) if kind is nn.Conv2d else kind(16))


def test_a_weight_that_is_kept_elsewhere_is_used():
    block = BLOCKS["basic"]().to(memory_format=LAST)
    other, x = copy.deepcopy(block), images(16)
    for module in (block.conv1, block.bn1):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        setattr(block, "conv1" if module is block.conv1 else "bn1", replica)
    expected = step(other, x)
    torch.testing.assert_close(block(x), expected["y"])


def test_running_statistics_that_are_not_alike_are_updated_in_turn(together):
    block, x = BLOCKS["bottleneck"]().to(memory_format=LAST), images(64)
    changes = {
        "another momentum": lambda b: setattr(b.bn2, "momentum", 0.3),
        "an average of all": lambda b: setattr(b.bn2, "momentum", None),
        "no statistics": lambda b: setattr(b, "bn2", nn.BatchNorm2d(16, track_running_stats=False)),
        "one counter for two": lambda b: setattr(b.bn2, "num_batches_tracked", b.bn1.num_batches_tracked),
        "one mean for two": lambda b: setattr(b.bn2, "running_mean", b.bn1.running_mean),
        "one norm twice": lambda b: setattr(b, "bn2", b.bn1),
    }
    for what, change in changes.items():
        own = copy.deepcopy(block)
        change(own)
        plain = torch_twin(own)
        own(x)
        plain(x)
        for (name, buffer), expected in zip(own.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, msg=f"{what}: {name}")
    assert not together


def test_wrong_inputs_update_nothing():
    block = BLOCKS["basic"]()
    for x in (torch.randn(4, 8, 8, 8), torch.randn(4, 16, 8, 8, dtype=torch.float64), torch.randn(16, 8)):
        with pytest.raises(RuntimeError):
            block(x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 16, 1, 1))
    assert not block.bn1.running_mean.any() and block.bn1.num_batches_tracked == 0
    y = block(torch.randn(0, 16, 8, 8))
    assert y.shape == (0, 16, 8, 8) and not block.bn1.running_mean.any() and block.bn1.num_batches_tracked == 1
