"""Networks in 8-bit integers: every step against the same arithmetic in PyTorch, whole networks, files, and refusals."""

# ruff: noqa: E501

import copy
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from _integers import emulated
from _modules import lively
from _weights_once import weights_once  # noqa: F401
from test_frozen import NETWORKS, Odd, images, small
from torch import nn

import fastres
from fastres import Calibration
from fastres import nn as fnn
from fastres.frozen import int8
from fastres.frozen.calibrate import best_scale
from fastres.ops import _conv_cpu

REASON = _conv_cpu.lacks(torch.int8)
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def quiet(batches, **options):
    return Calibration(batches, progress=False, **{"error": None, **options})


def quantized(model, x, **options):
    return fastres.freeze(model.eval(), x, quantize=quiet([x], **options))


class Steps(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Sum(nn.Module):
    """A convolution plus what it read, or another one's."""

    def __init__(self, conv, shortcut=None, relu=True):
        super().__init__()
        self.conv, self.shortcut, self.relu = conv, shortcut, relu

    def forward(self, x):
        y = self.conv(x) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(y) if self.relu else y


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


CASES = {
    "stem of 3 channels": lambda: (Steps(conv(3, 64, 7, stride=2, padding=3), nn.ReLU()), (2, 3, 23, 30)),
    "1 channel, dilated": lambda: (Steps(conv(1, 20, 3, padding=2, dilation=2), nn.ReLU()), (2, 1, 12, 9)),
    "64 channels": lambda: (Steps(conv(64, 64, 3, padding=1), nn.ReLU(), conv(64, 130, 1)), (2, 64, 9, 8)),
    "192 to 256": lambda: (Steps(nn.ReLU(), conv(192, 256, 1, stride=2), nn.ReLU()), (1, 192, 9, 9)),
    "odd channels": lambda: (Steps(conv(18, 70, (3, 1), padding=(1, 0)), nn.ReLU(), conv(70, 33, 3)), (1, 18, 7, 7)),
    "signed, padded": lambda: (Steps(conv(32, 64, 1), conv(64, 64, 3, padding=1), nn.ReLU()), (2, 32, 8, 8)),
    "signed, padded, dilated": lambda: (Steps(conv(32, 64, 1), conv(64, 16, 3, padding=2, dilation=2)), (2, 32, 8, 8)),
    "residual": lambda: (Steps(nn.ReLU(), Sum(conv(64, 64, 3, padding=1))), (2, 64, 8, 8)),
    "signed residual": lambda: (Steps(nn.ReLU(), Sum(conv(32, 24, 1), conv(32, 24, 1), relu=False), conv(24, 8, 1)), (1, 32, 5, 5)),
    "sum of values": lambda: (Steps(nn.ReLU(), Sum(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))), (1, 20, 7, 7)),
    "pools": lambda: (Steps(conv(8, 72, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 11)), (3, 8, 12, 13)),
    "batch norm first": lambda: (Steps(lively(nn.BatchNorm2d(40)), nn.ReLU(), conv(40, 40, 1)), (2, 40, 6, 6)),
    "copied and padded": lambda: (Steps(conv(8, 20, 1), fnn.ZeroPadShortcut(20, 44, 2), conv(44, 8, 1)), (2, 8, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_compute_what_their_integers_say(name):
    torch.manual_seed(0)
    model, shape = CASES[name]()
    x = images(shape)
    frozen = quantized(model, x)
    y, expected = frozen(x), emulated(frozen, x)
    with torch.no_grad():
        truth = model.double()(x.double())
    assert y.dtype == torch.float32 and y.shape == truth.shape
    # The plan scales in float32: a value next to half way may fall to the other side, by one step of its scale.
    apart = ((y - expected).abs() > 1e-4 * expected.abs().max()).double().mean()
    assert apart < 0.01
    assert (y - expected).abs().max() <= 0.05 * truth.abs().max()
    assert (y - truth).norm() < 0.03 * truth.norm()


@pytest.mark.parametrize("name", sorted({n for n in NETWORKS if not n.startswith("in groups")} - {"wide", "timm, gated"}))
def test_networks(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    lively(model).eval()
    x = images(shape)
    with torch.no_grad():
        truth = model(x)
    frozen = quantized(fastres.restore(model), x)
    y = frozen(x)
    assert y.shape == truth.shape and y.dtype == torch.float32
    assert (y - truth).norm() < 0.06 * truth.norm()
    assert frozen.quality.error == pytest.approx(((y - truth).norm() / truth.norm()).item(), rel=0.05)


def test_convolutions_in_groups_are_refused():
    conv = nn.Conv2d(16, 16, 3, groups=4)
    with pytest.raises(fastres.UnsupportedError, match="in one group, got groups=4"):
        fastres.freeze(nn.Sequential(conv), images((2, 16, 8, 8)), quantize=[images((2, 16, 8, 8))])


def test_a_batch_in_passes_other_sizes_and_layouts(monkeypatch):
    monkeypatch.setattr("fastres.frozen.program.cache_bytes", lambda: 1 << 18)
    x = images((13, 3, 32, 32))
    frozen = quantized(small(), x)
    assert len(set(frozen.program(x.shape).chunks)) > 1
    y = frozen(x)
    for index in (0, 7, 12):
        assert torch.equal(frozen(x[index : index + 1])[0], y[index])
    assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), y)
    assert torch.equal(frozen(x.transpose(2, 3).contiguous().transpose(2, 3)), y)
    assert torch.equal(frozen(x.bfloat16().float()), frozen(x.bfloat16()))
    assert frozen(images((2, 3, 40, 24))).shape == (2, 10) and frozen(x[:0]).shape == (0, 10)


def test_the_same_for_any_number_of_threads():
    frozen, x = quantized(small(), images((3, 3, 32, 32))), images((3, 3, 32, 32), 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(frozen(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_values_beyond_the_range_saturate_and_strange_ones_are_refused():
    model = Steps(conv(3, 16, 1), nn.ReLU()).eval()
    x = images((1, 3, 6, 6))
    frozen = quantized(model, x)
    assert torch.equal(frozen(x * 1e6), frozen(x * 1e9)) and frozen(x * 1e6).max() <= frozen(x).max() * 2
    for strange in (float("nan"), float("inf"), -float("inf")):
        for layout in (torch.contiguous_format, torch.channels_last):
            bad = x.clone(memory_format=layout)
            bad[0, 1, 5, 5] = strange
            with pytest.raises(RuntimeError, match="x must be finite"):
                frozen(bad)


def test_weights_get_the_scale_of_least_error_for_each_channel():
    weight = images((5, 7, 3, 3)) * torch.tensor([1e-6, 0.1, 1.0, 30.0, 0.0]).view(-1, 1, 1, 1)
    stored, scale = int8.quantized_weight(weight)
    assert stored.dtype == torch.int8 and stored.abs().max() == 127 and torch.isfinite(scale).all()
    back = stored * scale.view(-1, 1, 1, 1)
    plain = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    simple = (weight / plain.clamp_min(1e-30)).round() * plain
    wrong = (back - weight).square().sum((1, 2, 3))
    assert (wrong <= (simple - weight).square().sum((1, 2, 3)) * 1.0001).all() and not stored[4].any()


def test_an_outlier_is_clipped_and_zero_is_exact():
    counts = torch.zeros(4096)
    counts[:600], counts[-1] = 1000.0, 1.0
    scale = best_scale(0.0, 4.0, counts)
    assert scale.zero == 0 and scale.scale * 255 < 3.0
    assert best_scale(-1.0, 3.0, torch.ones(4096)).zero in range(60, 68)
    assert best_scale(2.0, 2.0, torch.zeros(4096)).scale * 255 >= 2.0
    assert best_scale(-2.0, -2.0, torch.zeros(4096)).zero == 255 and best_scale(0.0, 0.0, counts).scale > 0


def test_thresholds_decide_whether_there_is_a_network():
    model, x = small(), images((12, 3, 32, 32))
    labels = run_model(model, x).argmax(1)
    good = fastres.freeze(model, x, quantize=quiet([(x[:6], labels[:6]), (x[6:], labels[6:])], accuracy=0.5, agreement=0.5))
    assert good.quality.images == 12 and good.quality.float_accuracy == 1.0 and good.quality.accuracy >= 0.5
    for options, word in (
        ({"error": 1e-6}, "error is"), ({"accuracy": 0.01}, "accuracy is 0.0, wanted 0.01"), ({"agreement": 1.0}, "agreement is"),
    ):  # fmt: skip
        wrong = (labels + 1) % 10 if "accuracy" in options else labels
        noisy = x + 3 * images(x.shape, 5) if "agreement" in options else x
        network = small() if "agreement" not in options else near_ties()
        with pytest.raises(fastres.VerificationError, match=word):
            fastres.freeze(network, x, quantize=quiet([(noisy, wrong)], **options))


def near_ties():
    """Classes of nearly the same weights: integers cannot tell them apart."""
    torch.manual_seed(1)
    model = Steps(conv(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        linear = model.parts[-1]
        linear.weight.copy_(linear.weight[:1] + 1e-5 * images((10, 16)))
        linear.bias.zero_()
    return model.eval()


def run_model(model, x):
    with torch.no_grad():
        return model(x)


def test_bad_calibration_is_refused():
    model, x = small(), images((2, 3, 32, 32))
    nan = x.clone()
    nan[1, 0, 3, 3] = float("nan")
    labels = torch.tensor([1, 2])
    cases = [
        ([], ValueError, "batches of images, got none"), (iter(()), ValueError, "got none"), ([nan], ValueError, "batch 0 must be finite"),
        ([x, x * float("inf")], ValueError, "batch 1 must be finite"), ([torch.ones(4, 3, 32, 32)], ValueError, "only pixels of 1.0"),
        (x, TypeError, "quantize"), (7, TypeError, "quantize"), (["no"], TypeError, "batch 0"), ([x[:, :2]], ValueError, r"\(N, 3, H, W\)"),
        ([x[0]], ValueError, "batch 0"), ([x[:0]], ValueError, "batch 0"), ([x.long()], ValueError, "floating-point"),
        ([(x, labels[:1])], ValueError, "2 integer labels"), ([(x, labels.float())], ValueError, "integer labels"),
        (quiet([x], accuracy=0.9), ValueError, "pairs"), (quiet([x], agreement=1.5), ValueError, "agreement"),
        (quiet([x], error=-1.0), ValueError, "error"), (quiet([x], error="1"), TypeError, "quantize.error"),
        ([x.to_sparse()], ValueError, "batch 0 must be of strided"), (quiet([(x, labels)], accuracy=float("nan")), ValueError, "accuracy"),
    ]  # fmt: skip
    for calibration, kind, word in cases:
        with pytest.raises(kind, match=word):
            fastres.freeze(model, x, quantize=calibration)
    with pytest.raises(ValueError, match="quantize must be given"):
        fastres.freeze(model, x, torch.int8)
    with pytest.raises(ValueError, match="dtype must be"):
        fastres.freeze(model, x, torch.bfloat16, quantize=[x])
    huge = Steps(conv(3, 16, 1), nn.ReLU(), conv(16, 4, 1)).eval()
    with torch.no_grad():
        huge.parts[0].weight.fill_(3e38)
    with pytest.raises(fastres.UnsupportedError, match="not finite in calibration"):
        fastres.freeze(huge, x, quantize=quiet([x]))
    with pytest.raises(fastres.UnsupportedError, match="at most 65536"):
        fastres.freeze(Steps(conv(3, 8200, 1), conv(8200, 2, 3)).eval(), images((1, 3, 3, 3)), quantize=quiet([images((1, 3, 3, 3))]))


def test_files(tmp_path):
    x = images((2, 3, 32, 32))
    frozen, path = quantized(small(), x), tmp_path / "network.safetensors"
    frozen.save(path)
    again = fastres.load_frozen(path)
    assert torch.equal(again(x), frozen(x)) and torch.equal(again(x[:, :, :20, 4:]), frozen(x[:, :, :20, 4:]))
    assert again.quality == frozen.quality and repr(again) == repr(frozen)
    assert str(fastres.explain(again)) == str(fastres.explain(frozen)) and "int8" in str(fastres.explain(again))
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(copied(x), frozen(x))
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["network.safetensors"]
    odd = quantized(Odd(), images((3, 20, 11, 8)))
    odd.save(tmp_path / "odd")
    assert torch.equal(fastres.load_frozen(tmp_path / "odd")(images((3, 20, 11, 8))), odd(images((3, 20, 11, 8))))
    with pytest.raises(fastres.UnsupportedError, match="only quantised"):
        fastres.freeze(small(), x).save(tmp_path / "float")


def test_a_layer_in_two_places_is_saved_and_the_model_may_change(tmp_path):
    layer, x = conv(16, 16, 1), images((2, 16, 6, 6))
    model = Steps(layer, nn.ReLU(), layer)
    frozen = quantized(model, x)
    y = frozen(x)
    with torch.no_grad():
        layer.bias.add_(3)
    frozen.save(tmp_path / "network")
    assert torch.equal(fastres.load_frozen(tmp_path / "network")(x), y)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    frozen, path = quantized(small(), images((1, 3, 32, 32))), tmp_path / "network"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        frozen.save(path)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["network"]


def damage(path, change=lambda about, tensors: None, metadata=None):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        about, tensors = json.loads(file.metadata()["fastres"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, {"fastres": json.dumps(about)} if metadata is None else metadata)


DAMAGES = {
    "format": lambda a, t: a.update(format=2),
    "no layers": lambda a, t: a.update(layers=[]),
    "layers are no list": lambda a, t: a.update(layers={"a": 1}),
    "missing key": lambda a, t: a.pop("scales"),
    "kind": lambda a, t: a["layers"][0].update(kind="exec"),
    "later value": lambda a, t: a["layers"][1].update(x=9),
    "negative value": lambda a, t: a["layers"][1].update(x=-1),
    "boolean value": lambda a, t: a["layers"][1].update(x=True),
    "stride 0": lambda a, t: a["layers"][1].update(stride=[0, 1]),
    "huge padding": lambda a, t: a["layers"][1].update(padding=[1 << 40, 1]),
    "padding is text": lambda a, t: a["layers"][1].update(padding="11"),
    "channels": lambda a, t: a.update(channels=5),
    "scale 0": lambda a, t: a["scales"].update({"1": [0.0, 0]}),
    "scale NaN": lambda a, t: a["scales"].update({"1": [float("nan"), 0]}),
    "zero point of a ReLU": lambda a, t: a["scales"].update({"1": [0.5, 3]}),
    "zero point 300": lambda a, t: a["scales"].update({"0": [0.5, 300]}),
    "kernel": lambda a, t: a["layers"][1].update(kernel=[5, 5]),
    "weights missing": lambda a, t: t.pop("1.weight"),
    "weights float": lambda a, t: t.update({"1.weight": t["1.weight"].float()}),
    "weights short": lambda a, t: t.update({"1.weight": t["1.weight"][:-1].contiguous()}),
    "bias NaN": lambda a, t: t["1.bias"].fill_(float("nan")),
    "one tensor more": lambda a, t: t.update({"more": torch.zeros(1)}),
    "relu at the end": lambda a, t: a["layers"][-1].update(relu=True),
    "quality": lambda a, t: a.update(quality={"images": "many"}),
    "quality is text": lambda a, t: a.update(quality="good"),
    "name": lambda a, t: a.update(name=["a"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(name, tmp_path):
    path = tmp_path / "network"
    quantized(small(), images((1, 3, 32, 32))).save(path)
    damage(path, DAMAGES[name])
    with pytest.raises(ValueError, match=r"fastres\.load_frozen: path must be a whole file"):
        fastres.load_frozen(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "network"
    quantized(small(), images((1, 3, 32, 32))).save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\x80\x04cos\nsystem\n.", b"{" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"fastres\.load_frozen: path must be"):
            fastres.load_frozen(path)
    for metadata in ({}, {"fastres": "[" * 100_000}, {"fastres": "3"}, {"fastres": "{"}):
        path.write_bytes(whole)
        damage(path, metadata=metadata)
        with pytest.raises(ValueError, match=r"fastres\.load_frozen: path must be"):
            fastres.load_frozen(path)
    os.mkfifo(tmp_path / "pipe")
    for missing in ("none", "pipe", "."):
        with pytest.raises(ValueError, match="path must be"):
            fastres.load_frozen(tmp_path / missing)
    for strange in (None, 5, b"network"):
        with pytest.raises(TypeError, match="path must be"):
            fastres.load_frozen(strange)


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_of_pytorch_change_nothing(default, request):
    """Every step of these kinds, so that no constant is made by them."""
    if default == "dtype":
        request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    for name in ("signed residual", "sum of values", "pools", "stem of 3 channels"):
        torch.manual_seed(0)
        model, size = CASES[name]()
        x = torch.randn(size)
        expected = quantized(model, x)(x)
        torch.set_default_dtype(torch.bfloat16) if default == "dtype" else None
        with torch.device("meta" if default == "device" else "cpu"):
            assert torch.equal(quantized(model, x)(x), expected), name
        torch.set_default_dtype(torch.float32)
