"""Plans of networks that put values side by side or take them apart by channels (DenseNet, Inception, Res2Net), and of those
with other activations than ReLU (MobileNet, EfficientNet)."""

import copy

import _torchvision  # noqa: F401  # torchvision imports with a CPU torch
import pytest
import torch
import torch.nn.functional as F
from _modules import lively
from _uncaptured import Uncaptured
from test_backbones import images
from test_frozen import check
from test_frozen_steps import STEPS, Behind, X
from torch import nn

import fastres
from fastres.frozen import choose, device, make, program
from fastres.kernels import native
from fastres.ops import _conv_cpu

pytestmark = pytest.mark.cpu
timm, vision = pytest.importorskip("timm"), pytest.importorskip("torchvision").models
class Scales(nn.Module):
    """Res2Net's idea and DenseNet's: parts of the channels, each added to the next, then side by side with all before."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(64, 5, 1)
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)) for _ in range(2))
        self.bn, self.grow = nn.BatchNorm2d(48), nn.Conv2d(48, 16, 3, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        first, second, third = x.split(8, 1)
        second = F.relu(self.convs[0](second))
        third = F.relu(self.convs[1](third + second))
        all_before = torch.cat([x, first, second, third], 1)
        grown = self.grow(F.relu(self.bn(all_before)))
        return self.last(torch.cat([all_before, grown], 1))


class UNet(nn.Module):
    """A ResNet, and a decoder that enlarges what it has and puts the encoder's map beside it (Ronneberger et al., 2015)."""

    def __init__(self):
        super().__init__()
        self.encoder = timm.create_model("resnet18", features_only=True)
        widths = self.encoder.feature_info.channels()
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(low + high, high, 3, 1, 1, bias=False), nn.BatchNorm2d(high), nn.ReLU(inplace=True))
            for high, low in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x):
        *maps, y = self.encoder(x)
        for high, block in zip(maps[::-1], self.decoder, strict=True):
            y = block(torch.cat([F.interpolate(y, size=high.shape[2:]), high], 1))
        return F.interpolate(self.head(y), scale_factor=2)


NETWORKS = {
    "DenseNet": lambda: vision.densenet121(num_classes=5),
    "GoogLeNet": lambda: vision.googlenet(num_classes=5, aux_logits=False, init_weights=False),
    "SqueezeNet": lambda: vision.squeezenet1_1(num_classes=5),
    "Res2Net": lambda: timm.create_model("res2net50_14w_8s", num_classes=5),
    "DLA": lambda: timm.create_model("dla34", num_classes=5),
    "DPN": lambda: timm.create_model("dpn48b", num_classes=5),
    "VoVNet": lambda: timm.create_model("ese_vovnet19b_slim_dw", num_classes=5),
    "ECA-ResNet": lambda: timm.create_model("ecaresnet26t", num_classes=5),
    "U-Net": UNet,
    "CSPNet": lambda: timm.create_model("cs3darknet_focus_s", num_classes=5),
    "MobileNetV2": lambda: vision.mobilenet_v2(num_classes=5),
    "MobileNetV3": lambda: vision.mobilenet_v3_small(num_classes=5),
    "EfficientNet": lambda: vision.efficientnet_b0(num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    model = lively(NETWORKS[name]()).eval()
    frozen = fastres.freeze(model, images(2, 3, 64, 96))
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64)):
        check(frozen, model, images(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_any_division_of_the_batch(dtype, monkeypatch):
    """A value side by side is then written by steps for a few images and by steps for all of them."""
    if _conv_cpu.lacks(dtype):
        pytest.skip(_conv_cpu.lacks(dtype))
    torch.manual_seed(0)
    model, x = lively(Scales()).eval(), images(8, 3, 40, 48)
    passes, results = set(), []
    for kib in range(40, 1200, 60):
        monkeypatch.setattr(program, "cache_bytes", lambda kib=kib: kib << 10)
        frozen = fastres.freeze(model, x, dtype)
        check(frozen, model, x, dtype)
        results.append(frozen(x))
        passes.add(tuple(step.images for step in fastres.explain(frozen).steps))
    assert len(passes) > 3 and all(torch.equal(results[0], result) for result in results)


def test_update_takes_over_weights_and_refuses_other_channels():
    first, second = (lively(Scales()).eval() for _ in range(2))
    frozen = fastres.freeze(first, images(1, 3, 20, 24))
    frozen.update(second)
    check(frozen, second, images(2, 3, 20, 24))
    other = copy.deepcopy(second)
    other.forward = lambda x: Scales.forward(other, x.flip(0))
    with pytest.raises((ValueError, fastres.UnsupportedError)):
        frozen.update(other)
    before = frozen(images(2, 3, 20, 24))
    swapped = fastres.freeze(Behind(lambda m, y: torch.cat([y[:, :4], y[:, 4:9]], 1)).eval(), X)
    with pytest.raises(ValueError, match="another structure"):
        swapped.update(Behind(lambda m, y: torch.cat([y[:, :4], y[:, 5:10]], 1)).eval())
    assert torch.equal(frozen(images(2, 3, 20, 24)), before)


@pytest.mark.parametrize("name", [name for name in STEPS if "side by side" in name or "channels of" in name or "pool" in name])
def test_a_graph_computes_what_pytorch_does(name, monkeypatch):
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    torch.manual_seed(0)
    model = lively(Behind(STEPS[name])).eval()
    check(make.by_ops(model, X, torch.float32), model, X)


def test_optimised_networks_run_as_one_plan():
    torch.manual_seed(0)
    model = lively(Scales()).eval()
    x = images(2, 3, 40, 48)
    optimised = fastres.optimize(copy.deepcopy(model))
    with torch.no_grad():
        check(optimised, model, x)
        assert any("one native plan" in note for note in fastres.explain(optimised, x).notes)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: torch.cat([y.flatten(1), m.bn(y).flatten(1)], 1),
        lambda m, y: m.line(y.view(2, 1, -1)).flatten(1),
    ],
)
def test_features_are_not_taken_for_pixels_of_larger_images(function):
    """One pixel of many channels and many pixels of one look alike once they are flattened."""
    model = lively(Behind(function)).eval()
    frozen = fastres.freeze(model, images(2, 3, 3, 3))
    check(frozen, model, images(2, 3, 3, 3))
    with pytest.raises(ValueError, match="whose size fits layer"):
        frozen(images(2, 3, 4, 4))


def test_integers_have_no_step_for_them():
    for function in (lambda m, y: torch.cat([y, y], 1), lambda m, y: y[:, :8], lambda m, y: F.avg_pool2d(y, 3, 1, 1)):
        with pytest.raises(fastres.UnsupportedError, match="in 8-bit integers a plan has no step for"):
            fastres.freeze(Behind(function).eval(), X, quantize=[X])


def test_a_copy_cannot_leave_its_memory():
    frozen = fastres.freeze(Behind(lambda m, y: torch.cat([y[:, 3:], y], 1)).eval(), X)
    plan = frozen.program(X.shape)
    arena, ys = torch.empty(plan.arena_bytes, dtype=torch.uint8), frozen.results(plan, len(X))
    run, copied = native.op("cpu_plan"), program.KINDS.index("copy")
    run(X, plan.rows, plan.constants, arena, ys, plan.parts)
    row = [int(kind) for kind in plan.rows[:, 0]].index(copied)
    large = 1 << 62
    for place, value in ((16, 5), (17, 9), (26, 0), (26, 17), (26, large), (32, -1), (32, 4), (32, large), (33, -1), (33, 17)):
        rows = plan.rows.clone()
        rows[row, place] = value
        with pytest.raises(RuntimeError, match=r"fastres\.freeze: .* must be"):
            run(X, rows, plan.constants, arena, ys, plan.parts)
