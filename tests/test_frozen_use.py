"""Frozen networks in a user's program: examples of any dtype, derivatives, graphs of others, files of other machines."""

import copy
import io
import itertools
import os
import pickle

import pytest
import torch
from _modules import lively
from test_frozen import images, small
from torch import nn

import fastres
from fastres import models
from fastres.kernels import native

pytestmark = pytest.mark.cpu


def test_images_of_any_dtype_are_an_example_under_autocast_too():
    model, x = small(), images((2, 3, 32, 32))
    y = fastres.freeze(model, x)(x)
    for kind, dtype in itertools.product((torch.float32, torch.float64, torch.bfloat16), (torch.float32, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            frozen = fastres.freeze(model.to(kind), x.to(dtype), torch.float32)
            assert kind == torch.bfloat16 or torch.equal(frozen(x), y)
            frozen.update(model)
    with pytest.raises(ValueError, match="must be the network itself, got one that is frozen already"):
        frozen.update(frozen)


def test_a_graph_that_would_share_a_plans_memory_is_refused():
    x = images((2, 3, 32, 32))
    frozen = fastres.freeze(small(), x)
    for close in (torch.jit.script, lambda f: torch.jit.trace(f, x), lambda f: torch.export.export(nn.Sequential(f), (x,))):
        with pytest.raises(fastres.UnsupportedError, match="cannot be traced, scripted or exported"):
            close(frozen)


def test_derivatives_are_refused_instead_of_zeros():
    frozen, x = fastres.freeze(small(), images((2, 3, 32, 32))), images((2, 3, 32, 32))
    with pytest.raises(ValueError, match="without gradient"), torch.no_grad():
        torch.func.jvp(frozen, (x,), (x,))
    with pytest.raises(ValueError, match="without gradient"):
        torch.func.grad(lambda images: frozen(images).sum())(x)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantize": True}], ids=["float32", "bfloat16", "int8"])
def test_a_pickle_holds_the_weights_once_and_torch_saves_it(options):
    x = images((2, 3, 32, 32))
    if "quantize" in options:
        options = {"quantize": fastres.Calibration([x], error=None, progress=False)}
    frozen = fastres.freeze(lively(models.cifar.resnet(20)).eval(), x, **options)
    kept, file = pickle.dumps(frozen), io.BytesIO()
    own = sum(tensor.nbytes for tensors in frozen._packed.values() for tensor in tensors)
    assert len(kept) < 4 * own + 2**18  # with the weights of layers that other sizes want in another order
    torch.save(frozen, file)
    file.seek(0)
    for again in (pickle.loads(kept), torch.load(file, weights_only=False), copy.copy(frozen), copy.deepcopy(frozen)):
        assert torch.equal(again(x), frozen(x))
        blocks = {tensor.untyped_storage().data_ptr() for tensors in again._packed.values() for tensor in tensors}
        assert len(blocks) == 1


def test_a_pickle_of_a_processor_with_other_vectors_is_refused(monkeypatch):
    frozen, features = fastres.freeze(small(), images((2, 3, 32, 32))), native.cpu_features()
    kept = pickle.dumps(frozen)
    monkeypatch.setattr(native, "cpu_features", lambda: features | {"level": 7 - features["level"]})
    with pytest.raises(fastres.UnsupportedError, match="cannot run on x86-64-v"):
        pickle.loads(kept)


def test_a_file_has_the_rights_of_a_new_one_and_replaces_files_alone(tmp_path):
    x = images((2, 3, 32, 32))
    frozen = fastres.freeze(small(), x, quantize=fastres.Calibration([x], error=None, progress=False))
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "touched").touch()
    os.mkfifo(tmp_path / "device")
    frozen.save(tmp_path / "link")
    assert torch.equal(fastres.load_frozen(tmp_path / "own")(x), frozen(x)) and (tmp_path / "link").is_symlink()
    assert (tmp_path / "own").stat().st_mode == (tmp_path / "touched").stat().st_mode
    for path in (tmp_path, tmp_path / "device", tmp_path / "nowhere" / "own", ""):
        with pytest.raises(ValueError, match="must be a file, or a new one in a folder"):
            frozen.save(path)
    with pytest.raises(TypeError, match="path must be a str or"):
        frozen.save(None)
    assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / "device").is_fifo()


def test_autocast_does_not_round_what_integers_are_held_against():
    x = images((8, 3, 32, 32))
    calibration = fastres.Calibration([x], error=None, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fastres.freeze(small(), x, quantize=calibration)
    assert cast.quality == fastres.freeze(small(), x, quantize=calibration).quality
