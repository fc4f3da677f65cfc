"""An optimised network runs as one plan exactly as long as nothing about it has changed."""

import copy
import gc
import math
import weakref

import pytest
import torch
from _modules import lively
from torch import nn

import fastres
from fastres import models
from fastres.optimize import whole
from fastres.optimize.swap import STATE

pytestmark = pytest.mark.cpu


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fastres.optimize(lively(models.cifar.resnet(8)).eval())


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def runs_whole(model, x=X):
    """Whether a call is one plan; its result is then the plan's, to the bit."""
    y = vars(model)[STATE].whole.run(model, x, True)
    return y is not None and torch.equal(y, model(x))


def module_by_module(model, x=X):
    with fastres.use("torch"):
        return copy.deepcopy(model)(x)


def test_without_autograd_and_only_so(model):
    assert not runs_whole(model)
    with torch.no_grad():
        assert runs_whole(model)
        assert torch.equal(model(X), fastres.freeze(model, X)(X))
    with torch.inference_mode():
        assert runs_whole(model)
    assert model(X).requires_grad


@torch.no_grad()
@pytest.mark.parametrize("change", ["step", "load", "data pointer", "buffer", "eps", "stride", "child", "identity"])
def test_every_change_is_seen(model, change):
    before = model(X)
    if change == "step":
        model.layer2[0].conv1.weight.add_(0.1)
    elif change == "load":
        model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    elif change == "data pointer":
        model.conv1.weight.data = model.conv1.weight * 2
    elif change == "buffer":
        model.bn1.running_mean = model.bn1.running_mean + 1
    elif change == "eps":
        model.layer1[0].bn2.eps = 0.5
    elif change == "stride":
        model.layer3[0].conv2.dilation = model.layer3[0].conv2.padding = (2, 2)
    elif change == "child":
        model.layer1[0].relu = nn.Hardtanh()
    else:
        model.layer1[0].bn1 = nn.Identity()
    after = model(X)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, module_by_module(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plan_takes_over_what_is_written(model):
    sizes = (X, torch.randn(1, 3, 96, 64), X[:1])  # a layer or two by either algorithm
    for x in sizes:
        model(x)
    plan = vars(model)[STATE].whole._made.plan
    for _ in range(2):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(1.125) if tensor.is_floating_point() else tensor.add_(1)
        for x in (*sizes, torch.randn(2, 3, 48, 48)):
            assert torch.equal(model(x), fastres.freeze(model, x)(x))
    assert vars(model)[STATE].whole._made.plan is plan
    model.layer2[0].conv1.weight[0, 0, 0, 0] = math.nan
    assert model(X).isnan().all() and not runs_whole(model)
    model.layer2[0].conv1.weight[0, 0, 0, 0] = 0.5
    assert runs_whole(model) and torch.equal(model(X), fastres.freeze(model, X)(X))


@torch.no_grad()
def test_a_call_that_runs_keeps_its_weights(model):
    frozen, other = fastres.freeze(model, X), copy.deepcopy(model)
    other.bn1.weight.mul_(2)
    before, y = frozen(X), torch.empty(2, 1, 1, 10)
    with frozen._call(tuple(X.shape)) as plan:
        frozen.update(other)
        assert not torch.equal(frozen(X), before)
        frozen.run(plan, X, [y])
    assert torch.equal(y.flatten(1), before) and torch.equal(frozen(X), fastres.freeze(other, X)(X))


@torch.no_grad()
def test_hooks_fire_whenever_they_came(model):
    seen = []
    model(X)
    for place in (model, model.layer1, model.layer2[0].conv1):
        handle = place.register_forward_hook(lambda *_: seen.append(1))
        model(X)
        handle.remove()
    assert len(seen) == 3 and runs_whole(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    model.refresh = None  # any change: the plan is made anew, and refused
    model(X)
    handle.remove()
    assert len(seen) > 10


@torch.no_grad()
def test_a_network_without_a_plan_is_looked_at_less_and_less(model, monkeypatch):
    looks, holds = [], whole._Made.holds
    monkeypatch.setattr(whole._Made, "holds", lambda self, model: looks.append(1) or holds(self, model))
    handle = model.register_forward_hook(lambda *_: None)
    for _ in range(200):
        model(X[:, :, :32, :32])
    assert 8 < len(looks) < 40
    handle.remove()
    assert "one native plan" in str(fastres.explain(model, X))  # which looks, and so do calls from then on
    assert runs_whole(model)


@torch.no_grad()
def test_writes_through_data_after_refresh_and_after_a_change_of_mode(model):
    before = model(X)
    model.conv1.weight.data.mul_(3)
    fastres.refresh(model)
    second = model(X)
    assert not torch.allclose(before, second)
    model.conv1.weight.data.mul_(3)
    fastres.refresh()
    third = model(X)
    assert not torch.allclose(second, third)
    model.train()
    model.conv1.weight.data.mul_(3)
    model.eval()
    assert not torch.allclose(third, model(X))


@torch.no_grad()
def test_what_follows_a_call_finds_modules(model):
    assert runs_whole(model)
    with fastres.use("torch"):
        assert not runs_whole(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_whole(model)
    for other in (X.double(), X[0], X[:0], X.to(torch.bfloat16), X[:, :2]):
        assert vars(model)[STATE].whole.run(model, other, True) is None
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    model.layer1.train()
    assert not runs_whole(model)
    model.eval()
    assert runs_whole(model) and runs_whole(copy.deepcopy(model))


@torch.no_grad()
def test_networks_that_no_plan_can_run_say_so():
    model = models.resnet18(num_classes=3)
    model.fc = nn.Sequential(model.fc, nn.Tanh())
    model = fastres.optimize(model.eval())
    x = torch.randn(1, 3, 32, 32)
    assert not runs_whole(model, x)
    assert any("one by one: a plan has no step for aten.tanh" in note for note in fastres.explain(model, x).notes)


@torch.no_grad()
def test_a_compiled_part_runs_as_it_was_compiled(model):
    calls = []
    model.layer1.compile(backend=lambda graph, _: lambda *args: calls.append(1) or graph(*args))
    model(X)
    assert calls and any("layer1 is compiled" in note for note in fastres.explain(model, X).notes)


@torch.no_grad()
def test_what_no_plan_can_run_is_not_tried_again_after_every_step(monkeypatch):
    """But weights may become finite."""
    model, tries = lively(models.cifar.resnet(8)).eval(), []
    model.fc = nn.Sequential(model.fc, nn.Tanh())
    fastres.optimize(model.eval())  # whose stages have plans
    monkeypatch.setattr(whole, "freeze", lambda *args, freeze=whole.freeze: tries.append(type(args[0])) or freeze(*args))
    for _ in range(3):
        model.conv1.weight.mul_(1.5)
        model(X)
        assert tries.count(type(model)) == 1
    plain = fastres.optimize(lively(models.cifar.resnet(8)).eval())
    plain.conv1.weight[0] = math.nan
    assert not runs_whole(plain)
    plain.conv1.weight[0] = 0.5
    assert runs_whole(plain)


@torch.no_grad()
def test_explain_says_that_the_network_is_one_plan(model):
    assert any("one native plan" in note for note in fastres.explain(model, X).notes)
    with torch.enable_grad():
        assert any("one by one: autograd is on" in note for note in fastres.explain(model, X).notes)
    assert not any("plan" in note for note in fastres.explain(fastres.restore(model), X).notes)


@torch.no_grad()
def test_restored_networks_run_their_own_forward(model):
    y = model(X)
    fastres.restore(model)
    assert STATE not in vars(model)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """Python that depends on the image's size, and on whether there is one image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y = self.relu(y + y) if x.shape[2] > 8 else y
        return self.relu(y + self.conv(x)) if x.shape[0] == 1 else y


class Counting(Branching):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return self.relu(self.bn(self.conv(x)))


@torch.no_grad()
def test_branches_on_shapes_are_taken_anew_for_every_size():
    torch.manual_seed(0)
    plain = lively(Branching()).eval()
    model = fastres.optimize(copy.deepcopy(plain))
    for shape in ((2, 3, 8, 8), (2, 3, 12, 8), (1, 3, 8, 8), (5, 3, 8, 8), (1, 3, 12, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_effects_of_a_forward_are_not_lost():
    model = fastres.optimize(lively(Counting()).eval())
    for _ in range(3):
        model(X)
    assert len(model.calls) == 3 and not runs_whole(model)
    assert any("its forward reads calls, a list that may change unseen" in note for note in fastres.explain(model, X).notes)


@torch.no_grad()
def test_a_patched_forward_is_called(model):
    model(X)
    seen, original = [], model.layer1.forward
    model.layer1.forward = lambda x: seen.append(1) or original(x)
    model(X)
    model(X)
    assert len(seen) == 2


@torch.no_grad()
def test_a_forward_patched_on_the_class_is_called(model, monkeypatch):
    model(X)
    seen, original = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: seen.append(1) or original(conv, x))
    model(X)
    assert len(seen) == 7


@torch.inference_mode()
def test_parameters_of_inference_mode_are_never_planned(model):
    model = copy.deepcopy(model)
    before = model(X)
    model.fc.weight.mul_(2)
    torch.testing.assert_close(model(X) - model.fc.bias, 2 * (before - model.fc.bias))
    assert any("inference tensors" in note for note in fastres.explain(model, X).notes)


@torch.no_grad()
def test_a_network_dies_with_its_last_name(model):
    """Its plan does not keep it for a garbage collection to come."""
    model = copy.deepcopy(model)
    gc.collect()
    gc.disable()
    try:
        assert runs_whole(model)
        weight = weakref.ref(model.conv1.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_default_device_is_no_mode_to_be_seen(model):
    """``torch.set_default_device`` is for tensors without a device, of which fastres makes none."""
    expected = model(X)
    with torch.device("meta"):
        assert runs_whole(model) and torch.equal(model(X), expected)
        assert runs_whole(copy.deepcopy(model)) and torch.equal(fastres.freeze(model, X)(X), expected)


@torch.no_grad()
def test_the_bits_do_not_depend_on_the_sizes_seen_before(model):
    small, large = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 64, 64)
    first = copy.deepcopy(model)
    first(small)
    assert torch.equal(first(large), model(large)) and torch.equal(first(small), model(small))


@torch.no_grad()
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("where", ["freeze", "record"])
def test_memory_that_ran_out_once_is_told_and_not_remembered(model, monkeypatch, where, error):
    right, first = getattr(whole, where), []

    def fails_once(*args):
        if not first:
            first.append(1)
            raise error
        return right(*args)

    monkeypatch.setattr(whole, where, fails_once)
    with pytest.raises(type(error)):
        for size in (32, 24, 40):  # the second size is recorded, to be compared with the first
            model(torch.randn(2, 3, size, size))
    assert first and runs_whole(model)


def test_memory_that_runs_out_while_a_forward_is_read_is_told(monkeypatch):
    monkeypatch.setattr(torch.fx.Graph, "create_node", raiser(MemoryError()))
    with pytest.raises(MemoryError):
        fastres.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


def raiser(error):
    def raises(*args, **kwargs):
        raise error

    return raises
