"""The ``weights=`` of the builders: files and torchvision's enums, good, corrupt and foreign."""

import pickle
import sys

import pytest
import torch
from _torchvision import torchvision
from safetensors.torch import save_file

import fastres
from fastres import models

small = models.cifar.resnet


@pytest.fixture
def state():
    torch.manual_seed(1)
    return small(8).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".anything"])
def test_a_file_loads(tmp_path, state, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for weights in (path, str(path)):
        loaded = small(8, weights=weights).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_a_checkpoint_without_batch_counters_loads(tmp_path, state):
    torch.save({k: v for k, v in state.items() if "num_batches_tracked" not in k}, tmp_path / "old.pth")
    assert torch.equal(small(8, weights=tmp_path / "old.pth").conv1.weight, state["conv1.weight"])


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint ran')",)


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


FAULTS = {
    "list": (lambda s: [1, 2], "a state dict"),
    "int keys": (lambda s: {1: torch.zeros(1)}, "a state dict"),
    "missing": (lambda s: without(s, "fc.bias"), "1 missing"),
    "extra": (lambda s: {**s, "more": torch.zeros(1)}, "1 extra"),
    "wrapped": (lambda s: {"state_dict": s, "epoch": 3}, "save its 'state_dict' alone"),
    "module.": (lambda s: {f"module.{k}": v for k, v in s.items()}, "strip 'module.'"),
    "classes": (lambda s: {**s, "fc.weight": torch.zeros(5, 64), "fc.bias": torch.zeros(5)}, "pass num_classes"),
    "shape": (lambda s: {**s, "conv1.weight": torch.zeros(16, 1, 3, 3)}, r"conv1.weight \(16, 3, 3, 3\)"),
    "not a tensor": (lambda s: {**s, "fc.bias": 3}, "fc.bias is a int"),
    "complex": (lambda s: {**s, "fc.bias": s["fc.bias"].to(torch.complex64)}, "fc.bias is complex"),
    "sparse": (lambda s: {**s, "fc.bias": s["fc.bias"].to_sparse()}, "fc.bias is not a plain tensor"),
    "meta": (lambda s: {**s, "fc.bias": s["fc.bias"].to("meta")}, "fc.bias is not a plain tensor"),
    "code": (lambda s: {"conv1.weight": Bomb()}, "cannot be read"),
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_foreign_checkpoint_changes_nothing(tmp_path, state, change):
    path = tmp_path / "weights.pth"
    torch.save(change[0](state), path)
    network = small(8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(fastres.ArgumentError, match=f"fastres.models.load_weights: weights must be.*{change[1]}"):
        models.load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\xff" * 4096])
def test_a_corrupt_file_is_refused(tmp_path, state, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(fastres.ArgumentError, match=r"fastres.models.cifar.resnet: weights must be.*cannot be read"):
        small(8, weights=path)


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(fastres.ArgumentError, match="cannot be read"):
        models.resnet18(weights=tmp_path / "weights.pkl")


@pytest.mark.parametrize("weights", ["missing.pth", "no/such/file.safetensors"])
def test_a_missing_file_is_named(weights):
    with pytest.raises(fastres.ArgumentError, match=f"resnet18: weights must be an existing file, got {weights}"):
        models.resnet18(weights=weights)


@pytest.fixture
def downloaded(monkeypatch):
    """torchvision's download replaced by a state dict of the seed."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    calls = []

    def get_state_dict(self, *args, **kwargs):
        calls.append((self, kwargs))
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    return state, calls


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.DEFAULT", "enum"])
def test_torchvisions_weights_load(downloaded, weights):
    state, calls = downloaded
    member = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    network = models.resnet18(weights=member if weights == "enum" else weights, progress=False)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    assert calls == [(member, {"progress": False, "check_hash": True})]


def test_torchvisions_weights_fix_the_classes(downloaded):
    with pytest.raises(ValueError, match="'num_classes' expected value 1000 but got 10"):
        models.resnet18(weights="DEFAULT", num_classes=10)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V1"])
def test_unknown_names_are_refused(weights):
    with pytest.raises(fastres.ArgumentError, match="resnet18: weights must be a file or one of"):
        models.resnet18(weights=weights)


def test_another_networks_weights_are_refused_as_in_torchvision():
    with pytest.raises(TypeError, match="expected ResNet18_Weights"):
        models.resnet18(weights=torchvision.models.ResNet50_Weights.DEFAULT)
    with pytest.raises(fastres.ArgumentTypeError, match="weights must be None, a path"):
        models.resnet18(weights=3)


def test_without_torchvision_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(fastres.UnsupportedError, match=r"resnet18: weights='DEFAULT'.*cannot be imported"):
        models.resnet18(weights="DEFAULT")
