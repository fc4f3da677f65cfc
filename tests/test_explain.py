"""explain, strict, verify and the errors: what is refused says so, and leaves the model as it was."""

import copy
import json
import logging
import re
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from _torchvision import torchvision
from torch import nn
from torch.nn.utils import prune

import fastres
import fastres.nn as fnn
from fastres.ops import REGISTRY
from fastres.optimize.swap import state_of

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def small(norm_layer=None):
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    return lively(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, norm_layer=norm_layer)).eval()


def steps(report):
    return {f"{module.name}.{step.modules[0]}": step for module in report.modules for step in module.steps}


def test_report_before_and_after():
    model = small()
    before = fastres.explain(model)
    assert {module.status for module in before.modules} == {"fusable"} and "would fuse it" in str(before)
    report = fastres.explain(fastres.optimize(model))
    assert report.counts == {
        "fused": 8,
        "conv_bn_act_maxpool": 1,
        "conv_bn_act": 7,
        "conv_bn_add_act": 4,
        "norms_left_alone": 0,
    }
    assert [module.name for module in report.modules][:3] == ["", "layer1.0", "layer2.0"]
    as_data = json.loads(json.dumps(report.to_dict()))
    assert as_data["mode"] == "evaluation" and as_data["counts"] == report.counts
    assert as_data["modules"][1]["steps"][1] == {
        "op": "conv_bn_add_act",
        "modules": ["conv2", "bn2", "relu"],
        "runs": [],
    }


def test_an_example_tells_the_backends():
    model = fastres.optimize(small())
    buffers, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with fastres.use("torch"), torch.inference_mode():
        report = fastres.explain(model, X)
    assert {choice.backend.name for step in steps(report).values() for choice in step.choices} == {"torch"}
    assert [c.op for c in steps(report)["layer1.0.conv2"].choices] == ["conv_bn_add_act"]
    trained = steps(fastres.explain(model.train(), X))
    assert [c.op for c in trained["layer1.0.conv2"].choices] == ["conv", "bn_add_act_train"]
    assert [c.op for c in trained[".conv1"].choices] == ["bn_act_maxpool_train"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in buffers.items())
    assert torch.equal(seed, torch.get_rng_state())


def test_a_step_whose_modules_are_called_says_why():
    model = fastres.optimize(small())
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    model.layer2[0].downsample[0].padding_mode = "circular"
    found = steps(fastres.explain(model))
    called = {name: step.called for name, step in found.items() if step.called is not None}
    assert called.keys() == {"layer1.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"}
    assert "has hooks" in called["layer1.0.conv1"]
    text = "not one op: Conv2d pads with 'circular'"
    assert text in str(found["layer2.0.conv2"]) and "circular" in found["layer2.0.conv2"].to_dict()["called"]


@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_computed_tensors_runs_as_a_copy(training):
    model = small().train(training)
    prune.random_unstructured(model.layer1[0].conv1, "weight", 0.5)  # keeps its product with a mask, not a leaf of autograd
    with torch.no_grad():
        fastres.optimize(model, channels_last=False, verify=X)
    own = model.layer1[0].conv1.weight
    assert steps(fastres.explain(model, X))["layer1.0.conv2"].choices and model.layer1[0].conv1.weight is own


def test_a_model_that_cannot_be_copied_says_what_to_do():
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(fastres.UnsupportedError, match=r"cannot be copied to be run .*lock.*; leave out verify"):
        fastres.optimize(model, verify=X)
    with pytest.raises(fastres.UnsupportedError, match=r"cannot be copied to be run .*lock.*; give no input"):
        fastres.explain(fastres.optimize(model), X)
    assert steps(fastres.explain(model))


def test_two_convolutions_say_why_they_are_not_one():
    """At the ends of blocks with a projection, of an optimised model and of one of fastres; nowhere else."""
    model = fastres.optimize(small())
    with torch.no_grad():
        found = steps(fastres.explain(model, X))
        apart = {name: step for name, step in found.items() if step.apart is not None}
        own = fastres.explain(fnn.BasicBlock(4, 8, 2, fnn.shortcut("B", 4, 8, 2)).eval(), torch.randn(1, 4, 8, 8))
    assert set(apart) == {f"layer{stage}.0.conv2" for stage in (2, 3, 4)}
    for step in (*apart.values(), own.modules[0].steps[-1]):
        assert [choice.op for choice in step.choices] == ["conv_bn_add_act"]
        assert step.to_dict()["apart"] == step.apart and "the tensors are on cpu" in step.apart
        assert f"(not conv_bn_add_conv_bn_act: {step.apart})" in str(step)
    assert "apart" not in found["layer1.0.conv2"].to_dict()


def test_layers_in_training_say_why_the_convolution_does_not_find_the_statistics(monkeypatch):
    """Of every convolution before a batch norm, and of no other; not in evaluation."""
    model = fastres.optimize(small()).train()
    model.layer1[0].conv1.bias = nn.Parameter(torch.zeros(64))
    found = steps(fastres.explain(model, X))
    assert found["layer1.0.conv1"].statistics == ["not conv_statistics: the convolution has a bias"]
    assert not any(step.statistics for name, step in found.items() if name != "layer1.0.conv1"), "no kernel is for a CPU"
    op = REGISTRY["conv_statistics"]
    kernel, torch_alone = op.backends
    monkeypatch.setattr(op, "backends", (replace(kernel, why_not=lambda *args: "it rests"), torch_alone))
    found = steps(fastres.explain(model, X))
    texts = [text for step in found.values() for text in step.statistics]
    assert len(texts) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    reason = "not conv_statistics: cuda_wide: it rests"
    assert texts.count(reason) == len(texts) - 1
    assert len(found["layer2.0.conv2"].statistics) == 2 and str(found["layer2.0.conv2"]).endswith(f" ({reason})")
    assert found["layer1.0.conv2"].to_dict()["statistics"] == [reason]
    assert not any(step.statistics for step in steps(fastres.explain(model.eval(), X)).values())


def test_notes_on_autograd_and_layout():
    model = fastres.optimize(small(), channels_last=True)
    assert any("autograd is on" in note for note in fastres.explain(model).notes)
    with torch.inference_mode():
        assert fastres.explain(model).notes == ["inputs are brought to channels_last"]
    assert any("convolutions run in PyTorch except" in note for note in fastres.explain(model.train()).notes)
    fastres.optimize(model, channels_last=False)
    assert any("keep their memory format" in note for note in fastres.explain(model).notes)


def test_fastres_blocks_say_so():
    report = fastres.explain(fnn.BasicBlock(4, 4).eval(), torch.randn(1, 4, 8, 8))
    assert [module.status for module in report.modules] == ["fastres"] and report.modules[0].steps


def test_ops_and_functions():
    x, mean, var = torch.randn(2, 4, 5, 5), torch.zeros(4), torch.ones(4)
    by_name = fastres.explain("bn_act", x, None, None, mean, var, 1e-5, "relu")
    by_function = fastres.explain(fastres.functional.bn_act, x, mean, var)
    assert by_name.to_dict() == by_function.to_dict() and by_name.op == "bn_act"
    trained = fastres.explain(fastres.functional.bn_act, x, mean, var, None, None, True)
    assert trained.op == "bn_act_train" and torch.equal(mean, torch.zeros(4))
    with pytest.raises(ValueError, match="target must be"):
        fastres.explain("bn_relu", x)
    with pytest.raises(ValueError, match="args must be those of add_act: x, residual, act, got 1 of them"):
        fastres.explain("add_act", x)
    with pytest.raises(ValueError, match="runs a fastres op"):
        fastres.explain(F.relu, x)
    with pytest.raises(TypeError, match="target must be"):
        fastres.explain(3)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.calls = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.bn(self.conv(x)))


class Prints(Counts):
    def forward(self, x):
        print("forward")
        return self.relu(self.bn(self.conv(x)))


class Branches(Counts):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if x.sum() > 0 else x


class Gradless(Counts):
    def forward(self, x):
        with torch.no_grad():
            return self.relu(self.bn(self.conv(x)))


class Draws(Counts):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x + torch.rand(1))))


class Swallows(Counts):
    def forward(self, x):
        try:
            flag = bool(x.sum() > 0)
        except Exception:
            flag = False
        return x if flag else self.relu(self.bn(self.conv(x)))


class Listed(Counts):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x):
        for layer in self.more:
            x = layer(x)
        return self.relu(self.bn(self.conv(x)))


class ReadsAWeight(Counts):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.conv.weight.mean()


class TwoInputs(Counts):
    def forward(self, x, y):
        return self.relu(self.bn(self.conv(x)) + y)


REFUSED = {
    Counts: "calls",
    Prints: "print",
    Branches: "branches on a value",
    Gradless: "no_grad",
    Draws: "rand",
    Swallows: "Exception|branches",
    Listed: "iterates over more",
    ReadsAWeight: "uses weight",
    TwoInputs: "exactly one input",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_a_forward_that_a_graph_could_betray_is_left_alone(cls):
    model = nn.Sequential(cls())
    plain = copy.deepcopy(model)
    fastres.optimize(model)
    left = fastres.explain(model).modules[0].left
    assert list(left) == ["0.bn"] and type(model[0]) is cls
    assert re.search(REFUSED[cls], left["0.bn"]), left
    with pytest.raises(fastres.UnsupportedError, match=r"0\.bn"):
        fastres.optimize(plain, strict=True)
    assert type(plain) is nn.Sequential


def test_strict_lists_every_refusal_and_changes_nothing():
    model = nn.Sequential(Counts(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()), small().layer1)
    model[2][0].forward = lambda x: x
    with pytest.raises(fastres.UnsupportedError) as error:
        fastres.optimize(model.train(), mode="inference", strict=True)
    text = str(error.value)
    assert all(name in text for name in ("0.bn:", "1.1: GroupNorm", "2.0.bn1: it has a forward of its own", "2.0.bn2"))
    assert model.training and all(state_of(module) is None for module in model.modules())
    with pytest.raises(fastres.UnsupportedError, match="nothing that can be fused"):
        fastres.optimize(nn.Linear(2, 2), strict=True)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_other_norms_are_named(norm):
    model = fastres.optimize(small(norm))
    left = {name: why for module in fastres.explain(model).modules for name, why in module.left.items()}
    assert len(left) == 12 and all(norm.__name__ in why for why in left.values())


def test_skip():
    model = fastres.optimize(small(), skip=["layer4.*", "layer1"])
    status = {module.name: module.status for module in fastres.explain(model).modules}
    assert {name for name, state in status.items() if state == "skipped"} == {
        "layer1.0",
        "layer4.0",
        "layer4.0.downsample",
    }
    with pytest.raises(ValueError, match="layer9"):
        fastres.optimize(model, skip="layer9")


@pytest.mark.parametrize("training", [True, False])
def test_verify_accepts_and_reports(training, caplog):
    model = small().train(training)
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with caplog.at_level(logging.INFO, "fastres"):
        fastres.optimize(model, verify=X)
    assert len(caplog.records) == 1 and "PyTorch's own" in caplog.text and "conv_bn_act" in caplog.text
    assert 0 < fastres.explain(model).verified["error"] < 1e-4
    assert model.training is training and torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_verify_refuses_a_wrong_answer(monkeypatch):
    model = small()
    monkeypatch.setattr(fastres.functional, "conv_bn_act", lambda *args: _plain(*args) * 1.001)
    with pytest.raises(fastres.VerificationError, match="the model is restored"):
        fastres.optimize(model.train(), mode="inference", verify=X)
    assert all(state_of(module) is None for module in model.modules())
    assert all(module.training for module in model.modules())


def _plain(x, weight, bias, mean, var, gamma, beta, training, momentum, eps, stride, padding, dilation, groups, act):
    z = F.batch_norm(
        F.conv2d(x, weight, bias, stride, padding, dilation, groups), mean, var, gamma, beta, False, 0.0, eps
    )
    return F.relu(z) if act == "relu" else z


def test_verify_takes_tuples_and_refuses_others():
    model = small()
    fastres.optimize(model, verify=(X,))
    for wrong in ([X], X.numpy(), ()):
        with pytest.raises(TypeError, match="verify must be"):
            fastres.optimize(small(), verify=wrong)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "eval"}, ValueError, "mode must be None, 'training' or 'inference', got 'eval'"),
        ({"channels_last": "yes"}, ValueError, "channels_last must be"),
        ({"dtype": torch.int8}, ValueError, "dtype must be"),
        ({"dtype": "bfloat16"}, ValueError, "dtype must be"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype must be"),
        ({"skip": ["nothing"]}, ValueError, "skip must be"),
        ({"skip": None}, TypeError, "skip must be a pattern of module names or a sequence of them, got NoneType"),
        ({"skip": ["0", 1]}, TypeError, "skip must be a pattern of module names or a sequence of them, got int"),
        ({"strict": "yes"}, TypeError, "strict must be a bool, got str"),
        ({"inplace": None}, TypeError, "inplace must be a bool, got NoneType"),
        ({"verify": X[:0]}, ValueError, "verify must be an input for which the model returns floating values"),
    ],
)
def test_wrong_options(options, error, text):
    model = small()
    with pytest.raises(error, match=text):
        fastres.optimize(model, **options)
    assert state_of(model) is None


@pytest.mark.parametrize("function", [fastres.optimize, fastres.restore])
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        function(lambda x: x)


def test_closed_models_are_refused_and_wrapped_ones_opened():
    model = small()
    closed = (torch.jit.trace(model, X), torch.fx.symbolic_trace(model), torch.compile(model))
    for each, why in zip(closed, ("TorchScript", "graph", "compiled"), strict=True):
        with pytest.raises(fastres.UnsupportedError, match=why):
            fastres.optimize(each)
    wrapped = fastres.optimize(nn.DataParallel(model))
    assert type(wrapped) is nn.DataParallel and state_of(wrapped.module.layer1[0]) is not None


def test_mode():
    assert fastres.optimize(small(), mode="training").training and not fastres.optimize(small()).training
    assert not fastres.optimize(small().train(), mode="inference").layer1.training


def test_a_closed_part_is_left_and_named():
    model = nn.Sequential(torch.fx.symbolic_trace(small()), nn.Conv2d(10, 4, 1), nn.BatchNorm2d(4))
    report = fastres.explain(fastres.optimize(model))
    assert any("its graph" in why for module in report.modules for why in module.left.values())
