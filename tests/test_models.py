"""Networks against torchvision's: weights of a seed, state dicts, evaluation, a training step, checkpoints, options."""

import copy
import inspect
from functools import partial

import pytest
import torch
from _modules import assert_same_modules, called, compare, inference, judge, lively, step
from _torchvision import NETWORKS, torchvision
from torch import nn
from torchvision.models import feature_extraction

import fastres
import fastres.nn as fnn
from fastres import models

FrozenBatchNorm2d = torchvision.ops.misc.FrozenBatchNorm2d


def pair(name, **options):
    """Ours and torchvision's network of one seed."""
    torch.manual_seed(0)
    ours = getattr(models, name)(**options)
    torch.manual_seed(0)
    return ours, getattr(torchvision.models, name)(**options)


# Of the largest no training step is run: their blocks, and as many layers, are those of others.
LARGEST = ("resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")
# Images on which no ReLU of a network stands so near its edge that rounding decides, in PyTorch as here, and with it much
# of the gradient.
CLEAR = {"resnet34": 2}


def images(*size, seed=1):
    """channels_last, so that both convolve by the same oneDNN kernels: those of NCHW round less."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).contiguous(memory_format=torch.channels_last)


def assert_equal_states(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def in_place(forward, module, x, context=None):
    """``step`` without the copies that the largest networks have no time for."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = forward(module, x)
    y.backward(torch.ones_like(y).cumsum(1))
    found = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return found | {"output": y.detach(), "gradient of x": x.grad} | dict(module.named_buffers())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_torchvisions(name):
    """Weights of a seed, state dicts both ways, a training step, then evaluation; of theirs optimised too, and undone."""
    ours, theirs = pair(name, num_classes=10)
    assert_equal_states(ours, theirs)
    assert list(dict(ours.named_modules())) == list(dict(theirs.named_modules()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.device("meta"):
        truth = getattr(torchvision.models, name)(num_classes=10)
    exact = {k: v.double() if v.is_floating_point() else v.clone() for k, v in theirs.state_dict().items()}
    truth.load_state_dict(exact, assign=True)
    optimized = fastres.optimize(copy.deepcopy(theirs), strict=True, channels_last=False)
    assert repr(optimized) == repr(theirs) and list(optimized.state_dict()) == list(theirs.state_dict())
    networks, start = (ours, optimized, theirs, truth), copy.deepcopy(theirs.state_dict())
    for seed in (CLEAR.get(name, 1), 3, 4) if name not in LARGEST else ():  # on another processor, rounding decides other ReLUs
        x = images(3, 3, 49, 49, seed=seed)
        *found, plain, exact = [in_place(called, network, x.to(network.fc.weight.dtype)) for network in networks]
        try:
            for own in found:
                judge([(own, plain, exact)], torch.float32)
            break
        except AssertionError:
            if seed == 4:
                raise
        for network in networks:
            network.load_state_dict(start)
            network.zero_grad(set_to_none=True)
    for network in networks:
        network.load_state_dict(truth.state_dict())
        network.eval()
    with torch.no_grad():
        *found, plain, exact = [{"output": n(images(6, 3, 33, 33).to(n.fc.weight.dtype))} for n in networks]
    for own in found:
        judge([(own, plain, exact)], torch.float32)
    fastres.restore(optimized)
    assert_same_modules(optimized, theirs)
    assert_equal_states(optimized, theirs)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        for name in NETWORKS:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            assert sum(p.numel() for p in getattr(models, name)().parameters()) == weights.meta["num_params"]


@pytest.mark.parametrize("name", [*NETWORKS, "vgg16_bn"])
def test_builders_have_torchvisions_signature(name):
    ours, theirs = (inspect.signature(getattr(home, name)) for home in (models, torchvision.models))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_the_constructor_has_torchvisions_signature():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (models.ResNet, torchvision.models.ResNet))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


OPTIONS = {
    "dilated": {"replace_stride_with_dilation": [False, True, True]},
    "zero gamma": {"zero_init_residual": True},
    "group norm": {"norm_layer": partial(nn.GroupNorm, 8)},
    "frozen": {"norm_layer": FrozenBatchNorm2d},
    "tiny eps": {"norm_layer": partial(nn.BatchNorm2d, eps=1e-12)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_do_what_torchvisions_do(options):
    torch.manual_seed(0)
    ours = models.ResNet(fnn.Bottleneck, [1, 1, 1, 1], 10, **options)
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 10, **options)
    assert_equal_states(ours, theirs)
    truth, x = copy.deepcopy(theirs).double(), images(4, 3, 49, 49)
    for training in (True, False):
        networks = [network.train(training) for network in (ours, theirs, truth)]
        for run in (step, inference):
            results = [run(called, network, x.to(network.fc.weight.dtype)) for network in networks]
            judge([results], torch.float32)


def test_constructor_errors_are_torchvisions():
    for arguments in ({"replace_stride_with_dilation": [True]}, {"groups": 2}, {"width_per_group": 128}):
        with pytest.raises(ValueError, match=r".") as theirs:
            torchvision.models.resnet18(**arguments)
        with pytest.raises(ValueError, match=r".") as ours:
            models.resnet18(**arguments)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(NotImplementedError):
        models.resnet18(replace_stride_with_dilation=[True, True, True])
    with pytest.raises(ValueError, match="expected value 32 but got 4"):
        models.resnext50_32x4d(groups=4)


def test_torchvisions_resnet_takes_our_blocks_and_ours_theirs():
    torch.manual_seed(0)
    ours = torchvision.models.ResNet(fnn.BasicBlock, [1, 1, 1, 1], 10)
    torch.manual_seed(0)
    theirs = models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10)
    assert_equal_states(ours, theirs)


def test_feature_extraction_finds_the_usual_nodes():
    ours, theirs = (network.eval() for network in pair("resnet18", num_classes=10))
    names = [feature_extraction.get_graph_node_names(network)[1] for network in (ours, theirs)]
    assert sorted(names[0]) == sorted(names[1])
    features = feature_extraction.create_feature_extractor(ours, ["layer1.0.relu_1", "layer4"])(images(1, 3, 33, 33))
    assert list(features) == ["layer1.0.relu_1", "layer4"]


def test_vgg16_bn_is_torchvisions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # overwritten just after
        ours, theirs = pair("vgg16_bn", num_classes=10)
    assert_equal_states(ours, theirs)
    features = ours.features
    del ours, theirs

    def run_features(module, x):
        return fnn._sequence.run(module, x)

    x = images(2, 3, 32, 32)
    compare(lively(features).eval(), x, ours=run_features, plain=called, run=inference)
    for module in features:
        if isinstance(module, nn.Conv2d):
            module.bias.requires_grad_(False)  # has no effect before batch norm: a gradient of rounding errors
    compare(features.train(), x, ours=run_features, plain=called)


CIFAR = {
    "resnet": (models.cifar.resnet, {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}),
    "plain": (models.cifar.plain, {20: 0.27}),
    "preact_resnet": (models.cifar.preact_resnet, {164: 1.7, 1001: 10.2}),
}


@pytest.mark.parametrize("family", CIFAR)
def test_cifar_networks_have_the_papers_sizes(family):
    build, millions = CIFAR[family]
    for depth, expected in millions.items():
        with torch.device("meta"):
            network = build(depth)
        layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        weights = sum(p.numel() for layer in layers.values() for p in layer.parameters())
        assert round(weights / 1e6, 1 if expected > 1 else 2) == expected
        assert sum("downsample" not in name for name in layers) == depth


def test_shortcut_options_of_the_papers_networks():
    counts = {}
    with torch.device("meta"):
        for option in "ABC":
            network = models.cifar.resnet(20, shortcut=option)
            counts[option] = sum(m.kernel_size == (1, 1) for m in network.modules() if isinstance(m, nn.Conv2d))
        assert sum(p.numel() for p in models.ResNet(fnn.BasicBlock, [2] * 4, shortcut="A").parameters()) < sum(
            p.numel() for p in models.resnet18().parameters()
        )
    assert counts == {"A": 0, "B": 2, "C": 9}
    plain, residual = models.cifar.plain(20), models.cifar.resnet(20)
    assert list(plain.state_dict()) == list(residual.state_dict())


SMALL = {
    "resnet": partial(models.cifar.resnet, 8),
    "resnet, option C": partial(models.cifar.resnet, 8, shortcut="C"),
    "plain": partial(models.cifar.plain, 8),
    "preact_resnet": partial(models.cifar.preact_resnet, 11),
    "preact_resnet of two-layer blocks": partial(models.cifar.preact_resnet, 8, shortcut="A", bottleneck=False),
}


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_cifar_networks_compute_what_their_modules_do(build):
    """Against the same network with a hook on every module, which makes each run by itself."""
    torch.manual_seed(0)
    network = lively(build(in_channels=1))

    def one_by_one(module, x):
        handles = [m.register_forward_hook(lambda *args: None) for m in module.modules()]
        try:
            return module(x)
        finally:
            for handle in handles:
                handle.remove()

    for training in (True, False):
        for run in (step, inference):
            compare(network.train(training), images(4, 1, 16, 16), plain=one_by_one, run=run)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_plain_networks_have_the_layers_of_residual_ones(depth):
    with torch.device("meta"):
        plain, residual = models.plain(depth), getattr(models, f"resnet{depth}")()
    assert list(plain.state_dict()) == [name for name in residual.state_dict() if "downsample" not in name]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: models.plain(20), "models.plain: depth must be one of"),
        (lambda: models.plain([18]), "models.plain: depth must be one of"),
        (lambda: models.cifar.resnet(21), r"models.cifar.resnet: depth must be 6n \+ 2"),
        (lambda: models.cifar.resnet("20"), r"models.cifar.resnet: depth must be 6n \+ 2"),
        (lambda: models.cifar.plain(2), r"models.cifar.plain: depth must be 6n \+ 2"),
        (lambda: models.cifar.preact_resnet(21), r"models.cifar.preact_resnet: depth must be 9n \+ 2"),
        (lambda: models.cifar.resnet(20, shortcut="D"), "option must be one of"),
    ],
)
def test_wrong_arguments_say_what_must_be(call, text):
    with pytest.raises(fastres.ArgumentError, match=f"fastres.*{text}.*got"):
        call()
