"""What an optimised model must survive: training in between, copies, hooks, replaced layers, forwards that cannot be
trusted to a graph.
"""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from _torchvision import torchvision
from torch import nn

import fastres
from fastres.optimize.swap import state_of


def images(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = images(4, 3, 64, 64)


def small():
    """A whole torchvision network of two block kinds, quick to run."""
    torch.manual_seed(0)
    return lively(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10))


def infer(model, x=X):
    with torch.inference_mode():
        return model.eval()(x)


def assert_same(model, plain, x=X):
    """Both answer alike in evaluation, plain in PyTorch; a stale fold would be far off."""
    torch.testing.assert_close(infer(model, x), infer(plain, x), rtol=1e-3, atol=1e-3)


def train(model, x=X):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(x).tanh().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def write_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    fastres.refresh(model)


def load(model):
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def average(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model)
    averaged.update_parameters(model)
    train(model)
    averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())


def train_fused(model):
    """In evaluation, so that nothing but the optimizer changes anything; its kernels count up no version."""
    optimizer = torch.optim.AdamW(model.eval().parameters(), lr=1e-2, fused=True)
    model(X).tanh().mean().backward()
    optimizer.step()


def estimate_statistics(model):
    """Weights as they were; the batch norms are called, so PyTorch's own changes their buffers, and counts up no version."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(lambda *_: None) for norm in norms]
    model.train()
    with torch.no_grad():
        model(X * 3)
    for handle in handles:
        handle.remove()


CHANGES = {
    "training step": train,
    "fused step": train_fused,
    "statistics alone": estimate_statistics,
    "load_state_dict": load,
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: v * 0.9 for k, v in m.state_dict().items()}, assign=True
    ),
    "writes to .data": write_data,
    "averaged copy": average,
    "half and back": lambda m: m.half().float(),
    "other eps": lambda m: setattr(m.layer1[0].bn1, "eps", 0.5),
    "replaced layer": lambda m: setattr(m.layer1[0], "bn2", lively(nn.BatchNorm2d(64)).eval()),
    "replaced activation": lambda m: setattr(m.layer1[0], "relu", nn.Sigmoid()),
    "dropped shortcut": lambda m: setattr(m.layer2[0], "downsample", lively(nn.Conv2d(64, 128, 1, 2))),
    "frozen norms": lambda m: [b.eval() for b in m.modules() if isinstance(b, nn.BatchNorm2d)] and None,
    "SyncBatchNorm": torch.nn.SyncBatchNorm.convert_sync_batchnorm,
    "new head": lambda m: setattr(m, "fc", nn.Linear(512, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folds_and_plans_follow_the_model(change):
    plain = small()
    model = fastres.optimize(copy.deepcopy(plain))
    assert_same(model, plain)
    for each in (model, plain):
        torch.manual_seed(7)
        CHANGES[change](each)
    assert_same(model, plain)
    fastres.restore(model)
    assert not any(
        vars(module).keys() - vars(other).keys() for module, other in zip(model.modules(), plain.modules(), strict=True)
    )


def test_a_training_step_between_evaluations_matches_pytorch():
    plain = small()
    model = fastres.optimize(copy.deepcopy(plain))
    for _ in range(3):
        for each in (model, plain):
            train(each)
        assert_same(model, plain)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)


def test_parameters_hooks_and_keys_stay():
    model = small()
    before, names = list(model.parameters()), list(model.state_dict())
    fired = []
    handle = model.layer1[0].register_forward_hook(lambda *_: fired.append("block"))
    fastres.optimize(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and list(model.state_dict()) == names
    assert type(model.layer1[0]).__qualname__ == "BasicBlock" and type(model.layer1[0]).__module__.startswith(
        "torchvision"
    )
    inner = model.layer1[0].bn1.register_forward_hook(lambda *_: fired.append("bn1"))
    infer(model)
    assert fired == ["bn1", "block"]
    inner.remove()
    handle.remove()
    assert_same(model, fastres.restore(copy.deepcopy(model)))


def test_a_hook_on_an_identity_fires():
    model = fastres.optimize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4))).eval()
    fired = []
    model[1].register_forward_hook(lambda *_: fired.append(1))
    infer(model)
    assert fired == [1]


def test_sequentials_may_grow_and_shrink():
    model = fastres.optimize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    plain = nn.Sequential(*model)
    infer(model)
    for each in (model, plain):
        each.append(nn.Sigmoid())
        each.insert(2, nn.Tanh())
        del each[3]
    assert_same(model, plain)


def test_a_deep_copy_trains_by_itself():
    model = fastres.optimize(small())
    kept = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    assert state_of(other) is not state_of(model) and fastres.explain(other).counts == fastres.explain(model).counts
    infer(other)
    train(other)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert_same(other, fastres.restore(copy.deepcopy(other)))


def test_inplace_false_leaves_the_model_alone():
    model = small()
    other = fastres.optimize(model, inplace=False)
    assert state_of(model) is None and state_of(other) is not None and type(model) is torchvision.models.ResNet
    assert_same(other, model)


def test_pickle_in_a_fresh_process(tmp_path):
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fastres.optimize(block)
    x = images(2, 3, 5, 5)
    torch.save((block, x, infer(block, x)), tmp_path / "block.pt")
    code = (
        "import sys, torch; block, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.inference_mode(): assert torch.equal(block(x), y)\n"
        "import fastres; assert fastres.explain(block).counts['conv_bn_act'] == 1\n"
        "fastres.restore(block); assert type(block) is torch.nn.Sequential and 'fastres' not in str(vars(block))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "block.pt")], check=True)
    model = fastres.optimize(small())
    assert_same(pickle.loads(pickle.dumps(model)), model)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_compiles_to_one_graph(training, copied):
    torch._dynamo.reset()
    model = fastres.optimize(small()).train(training)
    model = copy.deepcopy(model) if copied else model
    plain = fastres.restore(copy.deepcopy(model))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(X), plain(X), rtol=1e-3, atol=1e-3)


def test_tracers_see_the_layers_they_know():
    model = small()
    names = [node.name for node in torch.fx.symbolic_trace(model).graph.nodes]
    assert [node.name for node in torch.fx.symbolic_trace(fastres.optimize(model)).graph.nodes] == names


def test_gradients_of_single_images():
    """Under torch.func, whose batched tensors have no memory format."""
    plain = small().eval()
    model = fastres.optimize(copy.deepcopy(plain))

    def loss(parameters, x, module):
        return torch.func.functional_call(module, parameters, x[None]).square().sum()

    parameters, found = {name: p.detach() for name, p in plain.named_parameters()}, []
    for each in (model, plain):
        found.append(torch.vmap(torch.func.grad(loss), (None, 0, None))(parameters, X[:2], each))
    for name in parameters:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-3, msg=name)


def test_autocast_and_autograd_in_evaluation():
    plain = small().eval()
    model = fastres.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(X), plain(X), rtol=0.1, atol=0.3)
    for each in (model, plain):
        each.zero_grad()
        each(X).sum().backward()
    torch.testing.assert_close(model.conv1.weight.grad, plain.conv1.weight.grad, rtol=1e-3, atol=1e-2)


def test_threads_plan_and_run_together():
    model = fastres.optimize(small()).eval()
    expected = infer(model)
    state_of(model).children = state_of(model.layer1[0]).children = None
    found = []
    threads = [threading.Thread(target=lambda: found.append(infer(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(y, expected) for y in found)


def test_optimizing_again_changes_nothing_but_the_options():
    model = fastres.optimize(small())
    counts, kind = fastres.explain(model).counts, type(model)
    fastres.optimize(model)
    assert fastres.explain(model).counts == counts and type(model) is kind
    fastres.optimize(model, skip="layer1")
    assert state_of(model.layer1[0]) is None and state_of(model.layer2[0]) is not None
    fastres.restore(fastres.restore(model))
    assert all(state_of(module) is None for module in model.modules())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.bn, self.relu = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.ReLU(True),
        )


class SharedConv(Shared):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.conv(x)


class SharedNorm(Shared):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.relu(self.bn(self.other(x)))


class UsedInBetween(Shared):
    """The convolution's value is also returned, before an in-place ReLU."""

    def forward(self, x):
        z = self.conv(x)
        y = self.bn(z)
        return torch.cat([self.relu(y) + z, y])


class WritesIntoItsInput(Shared):
    """``+=`` on what the caller holds, and on what two names hold."""

    def forward(self, x):
        kept = z = self.other(x)
        z += self.bn(self.conv(x))
        return F.relu(z) + kept


class ReusesAWrittenValue(Shared):
    """The shortcut changes the convolution's input in place, after the convolution has read it."""

    def forward(self, x):
        x = x * 1.0
        y = self.bn(self.conv(x))
        y += self.relu(x)
        return self.relu(y) + x


class DeadCode(Shared):
    def forward(self, x):
        self.bn(self.other(x))
        return self.relu(self.conv(x))


class BothOperands(Shared):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)


class Broadcasts(Shared):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


class Scaled(Shared):
    def forward(self, x):
        return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2)) + self.relu(self.bn(self.other(x)) + 1.0)


GRAPHS = (SharedConv, SharedNorm, UsedInBetween, WritesIntoItsInput, ReusesAWrittenValue, DeadCode, BothOperands)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("cls", [*GRAPHS, Broadcasts, Scaled])
def test_graphs_that_fold_wrong_elsewhere(cls, training):
    """In float64, where only the function can differ; inputs and buffers must be as PyTorch leaves them, too."""
    torch.manual_seed(0)
    plain = lively(cls()).double().train(training)
    model = fastres.optimize(copy.deepcopy(plain), channels_last=False)
    x, y = images(4, 3, 6, 6).double(), images(4, 3, 6, 6).double()
    y.copy_(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(y), rtol=1e-11, atol=1e-11)
        assert torch.equal(x, y)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=name)
    if not training:
        assert_same(model, plain, x)
