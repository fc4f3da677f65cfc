"""optimize on whole networks and on every form it recognises: same keys, same answers within budget, exactly undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _modules import assert_same_modules, judge, lively, saved, steady, step
from _torchvision import torchvision
from tolerances import assert_close_to_truth
from torch import nn

import fastres
import fastres.models


def images(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(name, **options):
    torch.manual_seed(0)
    return lively(getattr(torchvision.models, name)(num_classes=100, **options))


def ops(model):
    """Steps by op, of what is fused now."""
    counts = fastres.explain(model).counts
    return {name: count for name, count in counts.items() if name in ("add_act",) or name.startswith(("bn_", "conv_"))}


def assert_inference_agrees(model, optimized, x, layout=torch.channels_last):
    """Logits beside PyTorch's in the memory format that optimised networks run in, whose convolutions round alike."""
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(x.double())
        assert_close_to_truth(optimized(x), model(x.contiguous(memory_format=layout)), truth, x.dtype, "logits")


def run(module, x):
    torch.manual_seed(1)
    return module(x)


def assert_step_agrees(model, optimized, x):
    theirs = step(run, model, x.contiguous(memory_format=torch.channels_last))
    truth = step(run, copy.deepcopy(model).double(), x.double())
    judge([(step(run, optimized, x), theirs, truth)], x.dtype)


def assert_restores(model, optimized, x):
    """Undone to the bit: types, keys, attributes, parameters, answers."""
    fastres.restore(optimized)
    assert_same_modules(model, optimized)
    for (name, ours), (_, theirs) in zip(optimized.named_parameters(), model.named_parameters(), strict=True):
        assert ours.stride() == theirs.stride() and torch.equal(ours, theirs), name
    with torch.inference_mode():
        assert torch.equal(optimized(x), model(x))


# One network of every kind of block, in the memory format that optimising chooses; test_models.py has them all, in their own.
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"))
def test_torchvision_inference(name):
    model = network(name).eval()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert isinstance(optimized, torchvision.models.ResNet) and repr(optimized) == repr(model)
    x = images(2, 3, 64, 64)
    assert_inference_agrees(model, optimized, x)
    assert_restores(model, optimized, x)


@pytest.mark.parametrize("name", ("resnet18", "resnet34", "resnet50", "resnext50_32x4d"))
def test_torchvision_training_step(name):
    model = steady(network(name)).train()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert_step_agrees(model, optimized, images(4, 3, 64, 64))


def test_what_a_residual_network_becomes():
    model = fastres.optimize(network("resnet50").eval())
    assert ops(model) == {"conv_bn_act_maxpool": 1, "conv_bn_act": 2 * 16 + 4, "conv_bn_add_act": 16}
    assert ops(fastres.optimize(network("resnet18"))) == {
        "conv_bn_act_maxpool": 1,
        "conv_bn_act": 8 + 3,
        "conv_bn_add_act": 5,
        "conv_bn_add_bn_act": 3,
    }


def test_vgg():
    model = network("vgg11_bn").eval()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert ops(optimized) == {"conv_bn_act": 3, "conv_bn_act_maxpool": 5}
    x = images(2, 3, 32, 32)
    assert_inference_agrees(model, optimized, x)
    assert_restores(model, optimized, x)


@pytest.mark.parametrize(
    "options", [{"replace_stride_with_dilation": [False, True, True]}, {"zero_init_residual": True}]
)
def test_torchvision_options(options):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(**options).eval()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    assert_inference_agrees(model, optimized, images(1, 3, 64, 64))


TIMM = {
    "resnet18": "every step fuses",
    "resnet50": "every step fuses",
    "resnet50d": "deep stem, average pooling before the shortcut's convolution",
    "seresnet50": "squeeze-and-excitation between batch norm and addition",
    "resnext50_32x4d": "groups",
    "ecaresnet26t": "tiered stem, channel attention",
    "resnetblur18": "anti-aliasing between activation and convolution",
    "resnetv2_50": "pre-activation, with norms that hold their activation",
    "regnety_002": "such norms behind grouped convolutions, squeeze-and-excitation",
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = lively(timm.create_model(name, num_classes=100)).eval()
    optimized = fastres.optimize(copy.deepcopy(model))
    report = fastres.explain(optimized)
    assert report.counts["norms_left_alone"] == 0
    x = images(2, 3, 64, 64)
    assert_inference_agrees(model, optimized, x)
    assert_restores(model, optimized, x)


def test_networks_that_add_up_parts_of_the_channels_keep_their_layout():
    timm = pytest.importorskip("timm")
    model = fastres.optimize(timm.create_model("resnest14d", num_classes=5).eval())
    assert "slowly in channels_last" in str(fastres.explain(model))
    assert all(weight.is_contiguous() for weight in model.parameters())
    fastres.optimize(model, channels_last=True)
    assert not all(weight.is_contiguous() for weight in model.parameters())


def test_timm_stochastic_depth_and_checkpointing_stay():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = steady(timm.create_model("resnet18", num_classes=10, drop_path_rate=0.5))
    optimized = fastres.optimize(copy.deepcopy(model))
    assert_step_agrees(model, optimized, images(4, 3, 64, 64))
    optimized.set_grad_checkpointing()
    assert "checkpoints" in next(iter(fastres.explain(optimized).modules)).left["bn1"]


class Basic(nn.Module):
    """A block as many people write it: functional ReLU, += , a Sequential shortcut."""

    def __init__(self, inplanes=8, planes=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PreActivation(Basic):
    """bn-relu-conv twice, the second batch norm behind a convolution, written with methods."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.bn0(x).relu()
        out = self.conv2(torch.relu(self.bn1(self.conv1(out))))
        return torch.add(self.bn2(out), x)


class Inherited(Basic):
    """Calls its parent's forward and a method, reads constants."""

    scale: int = 2

    def __init__(self):
        super().__init__()
        self.twice, self.gate = True, nn.Parameter(torch.tensor(0.5))

    def head(self, x):
        return x * self.gate if self.twice else x

    def forward(self, x, extra=None):
        x = self.head(super().forward(x))
        return x if extra is None else x + extra * self.scale


class Net(nn.Module):
    """A whole network of a user: views memory before its linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layers = nn.Sequential(Basic(), Basic(8, 16, 2), Basic(16, 16))
        self.fc = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x):
        x = self.layers(self.stem(x))
        return self.fc(x.view(x.size(0), -1))


FORMS = {
    "user's block": (Basic, {"conv_bn_act": 1, "conv_bn_add_act": 1}),
    "user's block with a projection": (lambda: Basic(8, 12, 2), {"conv_bn_act": 2, "conv_bn_add_act": 1}),
    "pre-activation": (PreActivation, {"bn_act": 1, "conv_bn_act": 1, "conv_bn_add_act": 1}),
    "inherited forward": (Inherited, {"conv_bn_act": 1, "conv_bn_add_act": 1}),
    "identities in between": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.Identity(), nn.BatchNorm2d(8), nn.Identity(), nn.Identity(), nn.ReLU()
        ),
        {"conv_bn_act": 1},
    ),
    "no ReLU": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid()), {"conv_bn_act": 1}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, training):
    make, expected = FORMS[form]
    if training and form == "user's block with a projection":  # where gradients flow both norms join the addition
        expected = {"conv_bn_act": 2, "conv_bn_add_bn_act": 1}
    torch.manual_seed(0)
    model = lively(make()).train(training)
    optimized, x = fastres.optimize(copy.deepcopy(model), strict=True), images(4, 8, 9, 9)
    assert ops(optimized) == expected
    assert_step_agrees(model, optimized, x)
    if not training:
        assert_inference_agrees(model, optimized, x)
        assert_restores(model, optimized, x)


@pytest.mark.parametrize("channels_last", ["auto", True, False])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 3, 16, 16)])
def test_a_users_network_keeps_its_view(channels_last, shape):
    torch.manual_seed(0)
    model = lively(Net()).eval()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True, channels_last=channels_last)
    assert_inference_agrees(model, optimized, images(*shape), torch.contiguous_format)
    assert_restores(model, optimized, images(*shape))


@pytest.mark.parametrize(("channels", "stride", "kept"), [(8, 2, True), (15, (1, 2), True), (16, 2, False), (8, 1, False)])
def test_a_convolution_that_is_unsafe_in_channels_last_keeps_its_format(channels, stride, kept):
    """PyTorch's own gradient of such a weight corrupts memory in channels_last, and not in the format that users gave."""
    model = nn.Sequential(nn.Conv2d(channels, 32, 1, stride, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    seen = []
    fastres.optimize(model)
    handle = model[2].register_forward_hook(lambda module, args, y: seen.append(y.is_contiguous()))
    model(images(2, channels, 8, 8))
    handle.remove()
    notes = fastres.explain(model, images(2, channels, 8, 8)).notes
    assert seen == [kept] and any("writes beyond its memory" in note for note in notes) == kept


def test_further_arguments_run_the_original_forward():
    model = lively(Inherited()).eval()
    optimized, x = fastres.optimize(copy.deepcopy(model)), images(2, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(optimized(x, x), model(x, x)) and torch.equal(optimized(x, extra=x), model(x, extra=x))


def test_fastres_networks_are_fused_already():
    torch.manual_seed(0)
    model = lively(fastres.models.resnet18(num_classes=10)).eval()
    optimized = fastres.optimize(copy.deepcopy(model), strict=True)
    blocks = [module for module in optimized.modules() if isinstance(module, fastres.nn.BasicBlock)]
    assert all(type(block) is fastres.nn.BasicBlock for block in blocks)
    assert_inference_agrees(model, optimized, images(2, 3, 64, 64))
    assert_restores(model, optimized, images(2, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_cast_and_given_back(dtype):
    model = network("resnet18").eval()
    optimized = fastres.optimize(copy.deepcopy(model), dtype=dtype)
    x = images(2, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        assert optimized(x).dtype == dtype
    cast = copy.deepcopy(model).to(dtype)
    assert_inference_agrees(cast, optimized, x)
    assert_restores(model, optimized, x.float())


def test_a_model_optimised_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.inference_mode():
        fastres.optimize(model, channels_last=True)
    model(images(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad is not None and model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_part_that_was_optimised_before_the_whole_is_given_back_too():
    model = network("resnet18").eval()
    optimized = copy.deepcopy(model)
    for part in (optimized.layer1, optimized.layer2[0], optimized):
        fastres.optimize(part, channels_last=True)
    assert_restores(model, optimized, images(2, 3, 64, 64))


def test_a_cast_parameter_that_was_trained_keeps_its_training():
    model = fastres.optimize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    bias = model[0].bias.detach().clone()
    fastres.restore(model)
    assert model[0].weight.dtype == torch.float32 and torch.equal(model[0].weight, torch.full((4, 3, 1, 1), 0.5))
    assert torch.equal(model[0].bias, bias.float())


@pytest.mark.parametrize("when", ["between steps", "before the step", "the state of another run"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_fused_optimizers_keep_follows_the_memory_format(kind, when):
    """Their kernels ask for it and do not look."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = images(2, 3, 8, 8).double()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def optimizer_of(model):
        return kind(model.parameters(), lr=1e-2, fused=True, **options)

    def one_step(model, optimizer, between=lambda model: model):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        between(model)
        optimizer.step()

    def to_channels_last(model):
        return fastres.optimize(model, channels_last=True)

    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in (ours, theirs):
        optimizer = optimizer_of(model)
        one_step(model, optimizer)
        for change in (to_channels_last, fastres.restore):
            mine = change if model is ours else lambda model: model
            if when == "before the step":
                one_step(model, optimizer, mine)
            else:
                mine(model)
            if when == "the state of another run":
                kept, optimizer = copy.deepcopy(optimizer.state_dict()), optimizer_of(model)
                optimizer.load_state_dict(kept)
            one_step(model, optimizer)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "timm:resnet26", "timm:resnet10t"])
def test_others_blocks_keep_less_to_the_same_bits(name):
    if name.startswith("timm:"):
        torch.manual_seed(0)
        model = lively(pytest.importorskip("timm").create_model(name.removeprefix("timm:"), num_classes=100))
    else:
        model = network(name)
    model, x = fastres.optimize(model), images(2, 3, 64, 64)
    low = fastres.optimize(model, memory="low", inplace=False)
    assert saved(low, x) < 0.92 * saved(model, x)
    own, theirs = step(run, low, x), step(run, model, x)
    assert own.keys() == theirs.keys() and all(torch.equal(own[what], theirs[what]) for what in own)
    (note,) = [note for note in fastres.explain(low).notes if "memory='low'" in note]
    assert f": {sum(hasattr(module, 'conv2') for module in model.modules())} blocks" in note
    assert not any("memory=" in note for note in fastres.explain(model).notes)


def test_blocks_that_keep_less_do_so_in_copies_and_pickles_and_in_new_plans():
    model, x = network("resnet18"), images(2, 3, 64, 64)
    before = saved(fastres.optimize(model, inplace=False), x)
    after = saved(fastres.optimize(model, memory="low"), x)
    assert after < 0.9 * before
    assert saved(copy.deepcopy(model), x) == after == saved(pickle.loads(pickle.dumps(model)), x)
    model.layer1[0].relu = nn.ReLU()
    assert saved(model, x) == after
    assert saved(fastres.optimize(model), x) == before
