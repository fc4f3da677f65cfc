"""``fastres train``: folders of images, networks of all kinds, wrong requests, logs, and several processes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_train import some_images
from torch import nn

from fastres import cli, cli_training, terminal
from fastres.errors import ArgumentError
from fastres.experiments import trainer as command
from fastres.models import cifar, load_weights
from fastres.train import Settings, checkpoint

pytestmark = pytest.mark.none
ROOT = Path(cli.__file__).resolve().parents[1]


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
    arguments = [
        "train",
        "cifar.resnet8",
        "--data",
        "folder",
        images,
        "--out",
        out,
        "--epochs",
        "4",
        "--batch",
        "5",
        "--device",
        "cpu",
    ]
    options = [
        "--zero-init",
        "--ema",
        "0.5",
        "--amp",
        "bf16",
        "--schedule",
        "plateau",
        "--workers",
        "1",
        "--rate",
        "0.05",
    ]
    code, text, err = run(capsys, *arguments, *options)
    assert code == 0 and "test error" in text and "1 images cannot be read and are left out, red/bad.png" in err
    assert len((out / "log.csv").read_text().splitlines()) == 5
    result = json.loads((out / "train.json").read_text())
    assert (
        result["data"]["images"] == [15, 3]
        and result["data"]["skipped"] == ["red/bad.png"]
        and len(result["history"]) == 4
    )
    for name in ("model", "average"):
        load_weights(cifar.resnet(8, num_classes=3), out / f"{name}.safetensors")
    told = f"cifar.resnet8 on folder {images}: 15 training and 3 test images of 3x32x32, 3 classes; 4 epochs of 3 steps on cpu"
    assert f"{told}\n" in err
    code, text, err = run(capsys, *arguments, *options)
    assert code == 0 and f"{told}; {out} holds this run, finished\n" in err
    code, text, err = run(capsys, *arguments, *options, "--epochs", "5")
    assert code == 2 and "(epochs=4)" in err and "a run cannot be made longer" in err
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
        "def make():\n"
        "    norm = nn.BatchNorm2d(8)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(7200, 3))\n"
    )
    for number, model in enumerate(("resnet18", "cifar.preact_resnet11", "torchvision:resnet18", f"{mine}:make")):
        if model.startswith("torchvision"):
            import _torchvision  # noqa: F401
        settings = Settings(epochs=1, batch=4, rate=0.01)
        request = command.Request(model, tmp_path / str(number), "folder", images, 32, settings, logs=("csv",))
        result = command.run(request, quiet=True)
        assert math.isfinite(result["history"][0]["train_loss"])


def test_a_run_goes_on_with_images_of_its_size_and_its_network_alone(capsys, tmp_path):
    images, mine = folder(tmp_path / "images"), tmp_path / "mine.py"
    source = "from torch.nn import *\ndef make():\n    return Sequential(Conv2d(3, 8, 3), Flatten(), Linear(288, 3))\n"
    mine.write_text(source)
    arguments = ["train", f"{mine}:make", "--data", "folder", images, "--out", tmp_path / "out", "--epochs", 1, "--batch", 4]
    assert run(capsys, *arguments, "--size", 8)[0] == 0
    code, _, err = run(capsys, *arguments, "--size", 9)
    assert code == 2 and "holds another run (size=8)" in err
    mine.write_text(source.replace("3, 8, 3", "3, 4, 3").replace("288", "144"))
    code, _, err = run(capsys, *arguments, "--size", 8)
    assert code == 2 and "holds a run of another network (" in err and "size mismatch for 0.weight" in err


def test_zero_init_starts_as_the_shortcuts_and_refuses_what_has_none():
    model = cifar.resnet(8)
    command.zero_last_norms(model)
    assert all(
        not block.bn2.weight.any() and block.bn1.weight.all()
        for stage in (model.layer1, model.layer3)
        for block in stage
    )
    for wrong, words in (
        (cifar.plain(8), "in a plain network"),
        (nn.Conv2d(3, 8, 3), "blocks that end in a batch norm"),
    ):
        with pytest.raises(ArgumentError, match=words):
            command.zero_last_norms(wrong)
    assert (
        command.warmup("cifar.resnet110") == 1
        and command.warmup("cifar.resnet56") == 0
        and command.warmup("resnet152") == 0
    )


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "folder", "PATH", "MODEL"],
        ["train", "--data", "folder", "PATH", "MODEL", "--epochs", "3"],
        ["train", "--epochs", "3", "--data", "folder", "PATH", "MODEL"],
        ["train", "MODEL", "--epochs", "3", "--data", "folder", "PATH"],
        ["train", "--data", "digits", "MODEL"],
        ["train", "--data=digits", "MODEL"],
        ["train", "MODEL"],
    ],
    ids=" ".join,
)
def test_the_network_may_stand_before_or_after_the_images(monkeypatch, words):
    told = []

    def train(arguments):
        told.append((arguments.model, arguments.data))
        return 0

    monkeypatch.setattr(cli_training, "train", train)
    assert cli.main(words) == 0
    assert told == [("MODEL", ["folder", "PATH"] if "PATH" in words else ["digits"])]


WRONG = {
    "no path": ["train", "cifar.resnet8", "--data", "folder"],
    "no path but an option": ["train", "--data", "folder", "--epochs", "3", "cifar.resnet8"],
    "no kind": ["train", "cifar.resnet8", "--data"],
    "no network": ["train", "--data", "folder", "images"],
    "two paths": ["train", "cifar.resnet8", "--data", "folder", "images", "more"],
    "unknown data": ["train", "cifar.resnet8", "--data", "imagenet", "x"],
    "digits need no path": ["degradation", "--data", "digits", "x"],
    "no such folder": ["train", "cifar.resnet8", "--data", "folder", "/dev/null/images"],
    "no such archive": ["degradation", "--data", "cifar10", "/dev/null/cifar"],
    "unknown network": ["train", "resnet51"],
    "no such depth": ["degradation", "--depths", "21"],
    "no such depth of the family": ["degradation", "--family", "imagenet", "--depths", "20"],
    "a rate of nothing": ["train", "cifar.resnet8", "--rate", "nan"],
    "too large a seed": ["train", "cifar.resnet8", "--seed", str(2**63)],
    "too many workers": ["train", "cifar.resnet8", "--workers", "257"],
    "too large a batch": ["train", "cifar.resnet8", "--batch", "2000"],
    "a place that cannot be written": ["train", "cifar.resnet8", "--out", "/dev/null/out"],
    "a place for the study": ["degradation", "--out", "/dev/null/out"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("fastres") and len(err) < 500, err


@pytest.mark.parametrize("model", ["resnet51", "cifar.resnet9", "nowhere.py:make"])
def test_a_wrong_network_is_refused_before_its_images_are_read(capsys, tmp_path, model):
    out = tmp_path / "out"
    code, _, err = run(capsys, "train", model, "--data", "folder", tmp_path / "nowhere", "--out", out)
    assert code == 2 and "--data" not in err and not out.exists(), err


@pytest.mark.parametrize("words", [["train", "cifar.resnet8"], ["degradation", "--quick"]], ids=lambda words: words[0])
def test_results_among_the_images_are_refused(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(folder(tmp_path / "images"))
    code, _, err = run(capsys, *words, "--data", "folder", ".")  # the default place is a folder here
    assert code == 2 and "--out must be outside of ." in err and len(os.listdir()) == 3


def test_packages_that_are_missing_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "installed", lambda module: False)
    monkeypatch.chdir(tmp_path)
    for arguments, package in (
        (["train", "resnet18"], "scikit-learn"), (["train", "resnet18", "--data", "folder", "images"], "pillow"),
        (["train", "resnet18", "--log", "tensorboard"], "tensorboard"), (["degradation"], "matplotlib"),
    ):  # fmt: skip
        code, _, err = run(capsys, *arguments)
        assert (
            code == 2
            and f"needs {package}" in err.replace("matplotlib and rich", "matplotlib")
            and "pip install fastres[" in err
        )


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
    request = command.Request("cifar.resnet8", tmp_path, settings=Settings(epochs=2, batch=16), logs=("tensorboard",))
    command.run(request, quiet=True)
    assert written[0] == ("from", 1) and written[-1] == "closed" and written.count(("train_loss", 2)) == 1
    assert not (tmp_path / "log.csv").exists()


TRAINING = [
    "train",
    "cifar.resnet8",
    "--data",
    "digits",
    "--epochs",
    "10",
    "--batch",
    "718",
    "--rate",
    "0.01",
    "--device",
    "cpu",
]


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
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    for a, b in zip(one["history"], two["history"], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-5
        assert abs(a["test_error"] - b["test_error"]) < 0.01
