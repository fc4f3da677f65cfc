"""Backbones and networks that return several maps: frozen, planned in parts, fused in training, and always as PyTorch's."""

import copy
import pickle
from collections import OrderedDict, namedtuple

import _torchvision  # noqa: F401  # torchvision imports with a CPU torch
import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from _uncaptured import Uncaptured
from test_frozen import check
from tolerances import assert_close_to_truth
from torch import nn
from torch.utils._pytree import tree_flatten

import fastres
from fastres import models
from fastres.frozen import choose, device, make, program
from fastres.ops import _conv_cpu
from fastres.optimize.swap import STATE

pytestmark = pytest.mark.cpu
timm, vision = pytest.importorskip("timm"), pytest.importorskip("torchvision").models
Maps = namedtuple("Maps", "low high")


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pyramid(name="resnet18", **options):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name=name, weights=None, **options)


def getter(name="resnet18"):
    layers = {"layer1": "low", "layer4": "high"}
    return vision._utils.IntermediateLayerGetter(getattr(vision, name)(), layers)


class Taps(nn.Module):
    """Values that are read again, written to in place, returned twice, and flattened."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.bn, self.third, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        first = self.first(x)
        second = self.bn(self.second(F.relu_(first)))
        third = F.relu(self.third(F.relu(second + second)) + second)
        return self.form(first, second, third, self.last(third))


FORMS = {
    "list": lambda a, b, c, d: [a, b, c, d],
    "early": lambda a, b, c, d: (a, c),
    "nested": lambda a, b, c, d: OrderedDict(deep=[b, {"c": (c,)}], d=d),
    "named": lambda a, b, c, d: Maps(b, d),
    "twice": lambda a, b, c, d: [c, c, c.flatten(1), d.mean((2, 3))],
    "alone": lambda a, b, c, d: {"d": d},
}


@torch.no_grad()
def same_as_pytorch(call, model, x, dtype=torch.float32):
    check(call, model, x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_network_returns_comes_back_from_its_plan(form, dtype):
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    torch.manual_seed(0)
    model = lively(Taps(FORMS[form])).eval()
    frozen = fastres.freeze(model, images(2, 3, 12, 15), dtype)
    for x in (images(2, 3, 12, 15), images(5, 3, 9, 8), images(1, 3, 40, 40)):
        same_as_pytorch(frozen, model, x, dtype)
    x = images(1, 3, 12, 15)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))) if form != "named" else ():
        for y, other in zip(tree_flatten(copied(x))[0], tree_flatten(frozen(x))[0], strict=True):
            assert torch.equal(y, other)
    empty = tree_flatten(frozen(images(0, 3, 12, 15)))[0]
    assert all(len(y) == 0 for y in empty) and len(empty) == len(tree_flatten(frozen(x))[0])


@pytest.mark.parametrize("form", FORMS)
def test_what_a_network_returns_comes_back_from_its_graph(form, monkeypatch):
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    torch.manual_seed(0)
    model = lively(Taps(FORMS[form])).eval()
    frozen = make.by_ops(model, images(4, 3, 12, 15), torch.float32)
    for batch in (4, 3):
        same_as_pytorch(frozen, model, images(batch, 3, 12, 15), torch.float32)


def test_results_are_those_of_any_division_of_the_batch(monkeypatch):
    """Some values then pass from steps for a few images to steps for all of them."""
    torch.manual_seed(0)
    model, x = lively(Taps(FORMS["named"])).eval(), images(8, 3, 24, 30)
    passes = set()
    for kib in range(60, 400, 20):
        monkeypatch.setattr(program, "cache_bytes", lambda kib=kib: kib << 10)
        frozen = fastres.freeze(model, x)
        same_as_pytorch(frozen, model, x)
        passes.add(tuple(step.images for step in fastres.explain(frozen).steps))
    assert len(passes) > 3


def test_results_do_not_share_memory_with_later_ones_or_each_other():
    model = lively(Taps(FORMS["list"])).eval()
    frozen = fastres.freeze(model, images(2, 3, 12, 15))
    before = frozen(images(2, 3, 12, 15))
    kept = [y.clone() for y in before]
    frozen(images(2, 3, 12, 15, seed=1))
    assert all(map(torch.equal, before, kept))
    before[0].zero_()
    assert all(map(torch.equal, before[1:], kept[1:]))


def test_update_takes_over_weights_and_refuses_other_containers():
    first, second = (lively(Taps(FORMS["nested"])).eval() for _ in range(2))
    frozen = fastres.freeze(first, images(1, 3, 12, 15))
    frozen.update(second)
    same_as_pytorch(frozen, second, images(1, 3, 12, 15))
    second.form = FORMS["list"]
    with pytest.raises(ValueError, match="another structure"):
        frozen.update(second)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_feature_pyramid_is_one_plan_for_images_of_any_size(name):
    torch.manual_seed(0)
    model = lively(pyramid(name)).eval()
    frozen = fastres.freeze(model, images(1, 3, 64, 64))
    assert sum(step.op == "upsample+add" for step in fastres.explain(frozen).steps) == 3
    for size in ((64, 64), (97, 70)):
        same_as_pytorch(frozen, model, images(2, 3, *size))
    fastres.optimize(model)
    same_as_pytorch(model, model, images(1, 3, 97, 70))
    with torch.no_grad():
        assert any("one native plan" in note for note in fastres.explain(model, images(1, 3, 97, 70)).notes)
        x = images(1, 3, 64, 64)
        assert vars(model)[STATE].whole.run(model, x, True) is not None


class Enlarging(nn.Module):
    def __init__(self, enlarge, act=False):
        super().__init__()
        self.enlarge, self.act = enlarge, act
        self.conv, self.down = nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        y = self.enlarge(self.down(x), x)
        return F.relu(y) if self.act else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [False, True])
def test_the_nearest_pixels_are_pytorchs(act, dtype):
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    model = Enlarging(lambda low, high: high + F.interpolate(low, high.shape[2:]), act).eval()
    frozen = fastres.freeze(model, images(1, 3, 6, 6), dtype)
    for height in range(1, 40, 3):
        same_as_pytorch(frozen, model, images(2, 3, height, 41 - height), dtype)
    x = images(1, 3, 7, 5)
    x[0, :, 3, 2] = torch.nan
    with torch.no_grad():
        assert torch.equal(frozen(x).isnan(), model(x).isnan())
    doubled = Enlarging(lambda low, high: F.interpolate(low, scale_factor=3) + high).eval()
    same_as_pytorch(fastres.freeze(doubled, images(1, 3, 6, 9)), doubled, images(2, 3, 12, 3))


BESIDE = {
    "behind": lambda low, high: torch.cat([high, F.interpolate(low, high.shape[2:])], 1),
    "before": lambda low, high: torch.cat([F.interpolate(low, high.shape[2:]).relu(), high, high], 1),
    "twice": lambda low, high: torch.cat([*(F.interpolate(x, high.shape[2:]) for x in (low, F.relu(low))), high], 1),
    "by a factor": lambda low, high: torch.cat([F.interpolate(low, scale_factor=3), high], 1),
    "by factors": lambda low, high: torch.cat([F.interpolate(x, scale_factor=(2, 5)) for x in (low, F.relu(low))], 1),
    "alone": lambda low, high: F.interpolate(low, scale_factor=2),
    "read twice": lambda low, high: (y := F.interpolate(low, scale_factor=3)).relu() + torch.cat([y[:, 10:], high[:, :10]], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_enlarged_lies_beside_others_or_alone(name, dtype):
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    torch.manual_seed(0)
    model = lively(Enlarging(BESIDE[name], act=name != "read twice")).eval()
    frozen = fastres.freeze(model, images(1, 3, 6, 6), dtype)
    for shape in ((2, 3, 6, 6), (3, 3, 9, 15), (2, 3, 21, 12)):
        same_as_pytorch(frozen, model, images(*shape), dtype)


@pytest.mark.parametrize("name", ["behind", "by factors", "alone"])
def test_what_is_enlarged_comes_back_from_a_graph(name, monkeypatch):
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    model = lively(Enlarging(BESIDE[name])).eval()
    graph = make.by_ops(model, images(2, 3, 6, 6), torch.float32)
    for shape in ((2, 3, 6, 6), (1, 3, 9, 15)):
        same_as_pytorch(graph, model, images(*shape), torch.float32)


@pytest.mark.parametrize(
    "enlarge, why",
    [
        (lambda low, high: F.interpolate(low, high.shape[2:]), "supported only by whole factors, or directly before"),
        (lambda low, high: torch.cat([F.interpolate(low, high.shape[2:])] * 2, 1) + high.mean(), "aten.mean|whole factors"),
        (lambda low, high: F.interpolate(low, scale_factor=1.5)[:, :, :2, :2] + high[:, :, :2, :2], "upsample_nearest2d"),
        (lambda low, high: high + F.interpolate(low, high.shape[2:], mode="bilinear"), "upsample_bilinear2d"),
        (lambda low, high: high + F.interpolate(low, high.shape[2:], mode="nearest-exact"), "nearest_exact2d"),
    ],
)
def test_other_enlargements_are_refused(enlarge, why):
    with pytest.raises(fastres.UnsupportedError, match=why):
        fastres.freeze(Enlarging(enlarge).eval(), images(1, 3, 7, 7))


def test_what_is_enlarged_to_numbers_serves_the_examples_size_alone():
    """Only the network's Python knows where the numbers come from."""
    model = lively(Enlarging(lambda low, high: F.relu(F.interpolate(low, high.shape[2:])))).eval()
    frozen = fastres.freeze(model, images(1, 3, 6, 9))
    same_as_pytorch(frozen, model, images(3, 3, 6, 9))
    with pytest.raises(ValueError, match="whose size fits layer 'upsample'"):
        frozen(images(1, 3, 9, 6))
    optimised = fastres.optimize(copy.deepcopy(model))
    for shape in ((1, 3, 6, 9), (2, 3, 9, 6), (2, 3, 7, 7)):
        same_as_pytorch(optimised, model, images(*shape))


def test_integers_are_for_networks_that_return_one_tensor():
    if _conv_cpu.lacks(torch.int8):
        pytest.skip(_conv_cpu.lacks(torch.int8))
    for model in (Taps(FORMS["list"]), Enlarging(lambda low, high: high + F.interpolate(low, high.shape[2:]))):
        with pytest.raises(fastres.UnsupportedError, match=r"must return one tensor|no step for upsample"):
            fastres.freeze(model.eval(), images(1, 3, 6, 6), quantize=[images(2, 3, 6, 6)])


# ---- parts of a network that no plan serves ------------------------------------------------------------


class Segmenter(nn.Module):
    """A user's network, whose own code is not read: only its parts can have plans."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.calls = backbone, []
        self.head = nn.Conv2d(512, 4, 1)

    def forward(self, x):
        self.calls.append(len(x))
        maps = self.backbone(x)
        high = maps["high"] if isinstance(maps, dict) else maps[-1]
        return high.view(len(x), -1), F.interpolate(self.head(high), x.shape[2:], mode="bilinear")


BACKBONES = {
    "torchvision": getter,
    "timm": lambda: timm.create_model("resnet18", features_only=True, out_indices=(1, 4)),
    "ours": lambda: Wrapped(),
}


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        model = models.resnet18()
        self.body = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, *(
            getattr(model, f"layer{i}") for i in range(1, 5)))  # fmt: skip

    def forward(self, x):
        return [self.body(x)]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_parts_of_a_network_that_is_not_read_have_plans(name):
    torch.manual_seed(0)
    model, x = lively(Segmenter(BACKBONES[name]())).eval(), images(2, 3, 64, 48)
    fastres.optimize(model)
    same_as_pytorch(model, model, x)  # its view too: maps are laid out as PyTorch's
    with torch.no_grad():
        notes = fastres.explain(model, x).notes
        assert any("native plans of their own: backbone" in note for note in notes), notes
        part = vars(model.backbone)[STATE]
        found, expected = model.backbone(x), part.whole.run(model.backbone, x, part.channels_last)
        for y, other in zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True):
            assert torch.equal(y, other) and y.is_contiguous()
        model.backbone.train()
        assert model.backbone(x) is not None and model.calls  # no plan, no error
    fastres.restore(model)
    assert STATE not in vars(model.backbone)


def test_a_hook_in_one_stage_leaves_plans_to_the_others():
    model, x, seen = fastres.optimize(lively(vision.resnet18()).eval()), images(1, 3, 64, 64), []
    model.layer2[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    same_as_pytorch(model, model, x)
    assert seen
    with torch.no_grad():
        note = fastres.explain(model, x).notes[-1]
    assert "layer2.0.conv1 has hooks" in note and note.endswith("of their own: layer1, layer3, layer4")


def test_no_plan_covers_what_was_to_be_left_alone():
    model, x = fastres.optimize(lively(vision.resnet18()).eval(), skip="layer4.1"), images(1, 3, 64, 64)
    same_as_pytorch(model, model, x)
    with torch.no_grad():
        note = fastres.explain(model, x).notes[-1]
    assert "some of them are skipped" in note and note.endswith("of their own: layer1, layer2, layer3")
    planned = [name for name, module in model.named_modules() if getattr(vars(module).get(STATE), "whole", None) is not None]
    assert planned == ["layer1", "layer2", "layer3"]


# ---- containers, traced ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [getter, lambda: timm.create_model("resnet18", features_only=True), pyramid])
def test_backbones_train_fused_to_their_stem(network):
    torch.manual_seed(0)
    layout = torch.channels_last  # also PyTorch's: its convolutions' error is over twice that in contiguous memory
    model, x = lively(network()).train().to(memory_format=layout), images(2, 3, 64, 64).contiguous(memory_format=layout)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fastres.optimize(model, strict=True)
    runs = [tree_flatten(net(x.to(next(net.parameters()).dtype))) for net in (model, plain, exact)]
    assert runs[0][1] == runs[1][1]
    for y, same, truth in zip(*(leaves for leaves, _ in runs), strict=True):
        assert_close_to_truth(y, same, truth, torch.float32)
    for leaves, _ in runs:
        sum(leaf.square().mean() for leaf in leaves).backward()
    for (name, ours), theirs, true in zip(model.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        if true.grad is not None:
            assert_close_to_truth(ours.grad, theirs.grad, true.grad, torch.float32, name, spread=1.0)


@pytest.mark.parametrize("training", [False, True])
def test_what_layers_are_returned_may_change(training):
    """In place, where nobody is told."""
    model, x = fastres.optimize(lively(getter())).train(training), images(2, 3, 64, 64)
    with torch.no_grad():
        assert list(model(x)) == ["low", "high"]
        model.return_layers["layer2"] = "middle"
        same_as_pytorch(model, model, x) if not training else None
        assert list(model(x)) == ["low", "middle", "high"]
        del model["layer4"]
        assert list(model(x)) == ["low", "middle"]


class Noting(nn.ModuleDict):
    """A forward that writes into a dict."""

    def __init__(self):
        super().__init__({"conv": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "relu": nn.ReLU()})
        self.counts = {"calls": 0}

    def forward(self, x):
        self.counts["calls"] += 1
        return self.relu(self.bn(self.conv(x)))


def test_a_forward_that_writes_into_a_dict_is_left_alone():
    model = fastres.optimize(Noting()).eval()
    for _ in range(3):
        with torch.no_grad():
            model(images(1, 3, 8, 8))
    assert model.counts == {"calls": 3}
    (site,) = fastres.explain(model).modules
    assert site.status == "left"
