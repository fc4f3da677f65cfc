"""The trainer: resumption to the bit, what stops it, several processes, and the command."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fastres import cli, terminal
from fastres.errors import ArgumentError, DivergenceError
from fastres.experiments import trainer as command
from fastres.models import cifar, load_weights
from fastres.train import Data, Settings, Trainer, checkpoint, schedule
from fastres.train.data import Arrays
from fastres.train.processes import Processes

pytestmark = pytest.mark.none
ROOT = Path(cli.__file__).resolve().parents[1]
FEW = Settings(epochs=3, batch=16, rate=0.05)


def some_images(count=64, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    ones = torch.ones(1, 1, 1, 1)
    train, test = (Arrays(pixels[part], labels[part], 0 * ones, ones, shift=1, flips=True) for part in (slice(0, 48), slice(48, count)))
    return Data("some", train, test, tuple(map(str, range(classes))), 1, 8, "of the test")


class Net(nn.Module):
    """With dropout: what the model draws must be resumed too."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = cifar.resnet(8, num_classes=8, in_channels=1)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.body(x)))


def trainer(settings=FEW, out=None, **options):
    torch.manual_seed(1)
    return Trainer(Net(), some_images(), settings, out=out, **options)


def state(found):
    return {key: value.clone() for key, value in found._tensors().items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


FULL = replace(FEW, ema=0.8, smoothing=0.1, schedule="cosine", warmup=1.0, save_steps=1)


@pytest.mark.parametrize("settings", [FEW, FULL, replace(FULL, amp="bf16"), replace(FEW, amp="fp16", schedule="plateau")])
def test_stopped_at_every_step_and_resumed_it_ends_with_the_same_bits(tmp_path, monkeypatch, settings):
    whole = trainer(settings)
    history = whole.run()
    step, stops = Trainer._one_step, []

    def stop_after_each(self, images, labels):
        if self.step > len(stops):
            stops.append(self.step)
            raise KeyboardInterrupt
        step(self, images, labels)

    monkeypatch.setattr(Trainer, "_one_step", stop_after_each)
    again = None
    while again is None:
        torch.manual_seed(99)  # whatever the process drew before
        resumed = trainer(settings, tmp_path)
        try:
            again = resumed.run()
        except KeyboardInterrupt:
            continue
    assert stops == list(range(1, 9)) and again == history
    assert_same(state(whole), state(resumed))
    assert trainer(settings, tmp_path).run() == history, "a finished run is left as it is"


def test_a_checkpoint_is_whole_whatever_happens_while_it_is_written(tmp_path, monkeypatch):
    first = {"a": torch.arange(3.0)}
    checkpoint.save(tmp_path, first, {"step": 1})
    for failing in ("replace", "fsync"):

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, failing, fail)
            with pytest.raises(OSError, match=r"step-2\.safetensors cannot be written \(No space left on device\); what was"):
                checkpoint.save(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
        tensors, found = checkpoint.load(tmp_path)
        assert found["step"] == 1 and torch.equal(tensors["a"], first["a"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-1.safetensors"]
    checkpoint.save(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-2.safetensors"]


def test_a_full_disk_stops_with_a_message_and_loses_nothing(tmp_path):
    begun = trainer(FEW, tmp_path)
    begun.epoch(), begun.save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"step-6\.safetensors cannot be written .* what was saved before is whole"):
            trainer(FEW, tmp_path).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = trainer(FEW)
    assert trainer(FEW, tmp_path).run() == whole.run()


def test_damaged_checkpoints_are_told(tmp_path):
    trainer(replace(FEW, epochs=1), tmp_path).run()
    (tensors,) = tmp_path.glob("*.safetensors")
    content, text = tensors.read_bytes(), (tmp_path / checkpoint.STATE).read_text()
    for change in (lambda: tensors.write_bytes(content[:-1]), lambda: (tmp_path / checkpoint.STATE).write_text("{"), tensors.unlink):
        change()
        with pytest.raises(ArgumentError, match=r"cannot be resumed from .*; remove .* to start anew"):
            trainer(replace(FEW, epochs=1), tmp_path)
        tensors.write_bytes(content), (tmp_path / checkpoint.STATE).write_text(text)
    with pytest.raises(ArgumentError, match=r"holds another run \(epochs=1\)"):
        trainer(FEW, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DivergenceError, match=r"at step \d: training stops, no checkpoint was written yet"):
        trainer(replace(FEW, rate=1e30)).run()
    good = trainer(replace(FEW, save_steps=1), tmp_path)
    good.epoch(), good.save()
    kept = checkpoint.load(tmp_path)
    resumed = trainer(replace(FEW, save_steps=1), tmp_path)
    resumed.data.train.images[:] = math.nan
    with pytest.raises(DivergenceError, match=f"loss is nan at step 4: training stops, the last good checkpoint stays in {tmp_path}"):
        resumed.run()
    found = checkpoint.load(tmp_path)
    assert found[1] == kept[1]
    assert_same(found[0], kept[0])
    with torch.no_grad():
        resumed.model.fc.weight[0, 0] = math.inf
    with pytest.raises(DivergenceError, match="a weight is not finite"):
        resumed.save()


def test_requests_that_cannot_be_met():
    with pytest.raises(ArgumentError, match="batch must be at most 48"):
        trainer(replace(FEW, batch=49))
    with pytest.raises(ArgumentError, match="multiple of the 3 processes"):
        trainer(FEW, processes=Processes(0, 3))
    torch.manual_seed(0)
    with pytest.raises(ArgumentError, match=r"must give 3 logits, one for each class, got \(5,\)"):
        Trainer(Net(5), some_images(), FEW).run()


def test_schedules():
    def rates(name, warmup=0.0, errors=()):
        return [round(schedule.factor(name, done, warmup, errors), 6) for done in (0.0, 0.1, 0.49, 0.5, 0.74, 0.75, 0.99)]

    assert rates("step") == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates("step", 0.1) == [0.1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = rates("cosine", 0.1)
    assert cosine[:2] == [0.1, 1.0] and cosine[1:] == sorted(cosine[1:], reverse=True) and cosine[-1] < 0.001
    assert schedule.plateaus([0.5, 0.4] + [0.4] * 4) == 0 and schedule.plateaus([0.5, 0.4] + [0.4] * 5) == 1
    assert schedule.plateaus([0.5] * 11) == 2 and schedule.plateaus([0.5, *[0.6] * 4, 0.4, *[0.6] * 4]) == 0
    assert set(rates("plateau", errors=[0.5] * 6)) == {0.1}


def test_the_trainer_is_sgd_as_pytorch_does_it():
    """Without augmentation and dropout, one epoch by hand."""
    data, settings = some_images(), replace(FEW, epochs=1, schedule="cosine", smoothing=0.1, channels_last=False)
    data.train.shift = data.train.flips = 0
    torch.manual_seed(1)
    theirs, ours = (cifar.resnet(8, num_classes=3, in_channels=1) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    Trainer(ours, data, settings).run()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, 0.9, weight_decay=1e-4)
    schedule_ = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    from fastres.train.data import batches

    for keys in batches(48, 16, seed=0, epoch=0):
        images, labels = data.train.__getitems__(keys)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels, label_smoothing=0.1).backward()
        optimizer.step(), schedule_.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_average_is_of_the_weights():
    averaged = trainer(replace(FEW, epochs=1, ema=0.5))
    seen = []
    update = averaged.average.update_parameters
    averaged.average.update_parameters = lambda model: (seen.append(model.fc.bias.detach().clone()), update(model))
    (row,) = averaged.run()
    expected = seen[0]
    for bias in seen[1:]:
        expected = 0.5 * expected + 0.5 * bias
    assert torch.allclose(averaged.average.module.fc.bias, expected) and "average_test_error" in row


def run(capsys, *arguments):
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def folder(path, count=6):
    Image = pytest.importorskip("PIL.Image", reason="the package pillow is not installed")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200)), ("green", (0, 200, 0))):
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 36), tuple(c + number for c in colour)).save(path / name / f"{number}.png")
    return path


def test_a_folder_is_trained_on_and_told(capsys, tmp_path):
    images, out = folder(tmp_path / "images"), tmp_path / "out"
    (images / "red" / "bad.png").write_text("no picture")
    arguments = ["train", "cifar.resnet8", "--data", "folder", images, "--out", out, "--epochs", "4", "--batch", "5", "--device", "cpu"]
    options = ["--zero-init", "--ema", "0.5", "--amp", "bf16", "--schedule", "plateau", "--workers", "1", "--rate", "0.05"]
    code, text, err = run(capsys, *arguments, *options)
    assert code == 0 and "test error" in text and "1 images cannot be read and are left out, red/bad.png" in err
    assert len((out / "log.csv").read_text().splitlines()) == 5
    result = json.loads((out / "train.json").read_text())
    assert result["data"]["images"] == [15, 3] and result["data"]["skipped"] == ["red/bad.png"] and len(result["history"]) == 4
    for name in ("model", "average"):
        load_weights(cifar.resnet(8, num_classes=3), out / f"{name}.safetensors")
    code, text, err = run(capsys, *arguments, *options, "--strict")
    assert code == 2 and text == "" and "red/bad.png cannot be read" in err
    code, text, err = run(capsys, *arguments, "--json")
    assert code == 2 and "holds another run" in err and err.count("\n") == 1


def test_networks_of_all_kinds_can_be_trained(tmp_path):
    pytest.importorskip("sklearn", reason="the package scikit-learn is not installed")
    images = folder(tmp_path / "images", 3)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch.nn as nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 3))\n"
    )
    for number, model in enumerate(("resnet18", "cifar.preact_resnet11", "torchvision:resnet18", f"{mine}:make")):
        if model.startswith("torchvision"):
            import _torchvision  # noqa: F401
        settings = Settings(epochs=1, batch=4, rate=0.01)
        request = command.Request(model, tmp_path / str(number), "folder", images, 32, settings, logs=("csv",))
        result = command.run(request, quiet=True)
        assert math.isfinite(result["history"][0]["train_loss"])


def test_zero_init_starts_as_the_shortcuts_and_refuses_what_has_none():
    model = cifar.resnet(8)
    command.zero_last_norms(model)
    assert all(not block.bn2.weight.any() and block.bn1.weight.all() for stage in (model.layer1, model.layer3) for block in stage)
    for wrong, words in ((cifar.plain(8), "in a plain network"), (nn.Conv2d(3, 8, 3), "blocks that end in a batch norm")):
        with pytest.raises(ArgumentError, match=words):
            command.zero_last_norms(wrong)
    assert command.warmup("cifar.resnet110") == 1 and command.warmup("cifar.resnet56") == 0 and command.warmup("resnet152") == 0


WRONG = {
    "no path": ["train", "cifar.resnet8", "--data", "folder"],
    "unknown data": ["train", "cifar.resnet8", "--data", "imagenet", "x"],
    "digits need no path": ["degradation", "--data", "digits", "x"],
    "no such folder": ["train", "cifar.resnet8", "--data", "folder", "/dev/null/images"],
    "no such archive": ["degradation", "--data", "cifar10", "/dev/null/cifar"],
    "unknown network": ["train", "resnet51"],
    "no such depth": ["degradation", "--depths", "21"],
    "no such depth of the family": ["degradation", "--family", "imagenet", "--depths", "20"],
    "a rate of nothing": ["train", "cifar.resnet8", "--rate", "nan"],
    "too large a batch": ["train", "cifar.resnet8", "--batch", "2000"],
    "a place that cannot be written": ["train", "cifar.resnet8", "--out", "/dev/null/out"],
    "a place for the study": ["degradation", "--out", "/dev/null/out"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("fastres "), err


def test_packages_that_are_missing_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "installed", lambda module: False)
    monkeypatch.chdir(tmp_path)
    for arguments, package in (
        (["train", "resnet18"], "scikit-learn"), (["train", "resnet18", "--data", "folder", str(tmp_path)], "pillow"),
        (["train", "resnet18", "--log", "tensorboard"], "tensorboard"), (["degradation"], "matplotlib"),
    ):  # fmt: skip
        code, _, err = run(capsys, *arguments)
        assert code == 2 and f"needs {package}" in err.replace("matplotlib and rich", "matplotlib") and "pip install fastres[" in err


def test_tensorboard_is_given_every_number_once(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("from", purge_step))

        def add_scalar(self, key, value, epoch):
            written.append((key, epoch))

        def close(self):
            written.append("closed")

    monkeypatch.setattr(terminal, "need", lambda what, *modules, extra: [type("module", (), {"SummaryWriter": Writer})])
    monkeypatch.setattr(command, "load", lambda request: some_images())
    request = command.Request("cifar.resnet8", tmp_path, settings=replace(FEW, epochs=2), logs=("tensorboard",))
    command.run(request, quiet=True)
    assert written[0] == ("from", 1) and written[-1] == "closed" and written.count(("train_loss", 2)) == 1
    assert not (tmp_path / "log.csv").exists()


TRAINING = ["train", "cifar.resnet8", "--data", "digits", "--epochs", "10", "--batch", "718", "--rate", "0.01", "--device", "cpu"]


def launched(*arguments, processes=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "fastres", *map(str, arguments)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_of_torchrun_are_one_and_a_killed_run_goes_on(tmp_path):
    """20 steps with synchronised batch norm; and a run killed after its first checkpoint, both against one undisturbed."""
    pytest.importorskip("sklearn", reason="the package scikit-learn is not installed")
    killed = launched(*TRAINING, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / checkpoint.STATE).exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert cli.main([*TRAINING, "--out", str(tmp_path / "one"), "--json"]) == 0
    two = launched(*TRAINING, "--sync-bn", "--out", tmp_path / "two", processes=2)
    assert cli.main([*TRAINING, "--out", str(tmp_path / "killed"), "--json"]) == 0
    _, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    one, killed, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "killed", "two"))
    assert killed["history"] == one["history"] and two["processes"] == 2 and one["history"][-1]["step"] == 20
    weights = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "killed", "two")]
    assert_same(weights[0], weights[1])
    for a, b in zip(one["history"], two["history"], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-5
        assert abs(a["test_error"] - b["test_error"]) < 0.01
