"""The command line: what it prints where, its exit codes, and one line for every wrong request."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres
from fastres import cli, dispatch, info, terminal, tune
from fastres.errors import UnsupportedError, VerificationError
from fastres.frozen.module import NativeFrozen
from fastres.ops import REGISTRY

pytestmark = pytest.mark.none
ROOT = Path(cli.__file__).resolve().parents[1]
NET = ["cifar.resnet8", "--size", "16", "--batch", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "cache"))
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert err == "" or code != 0, err
    return code, json.loads(out)


def test_info_tells_everything(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for word in ("torch", "cuda", "nvcc", "driver", "tuning cache", "environment", *REGISTRY):
        assert word in out
    code, data = run_json(capsys, "info")
    assert code == 0 and set(data["ops"]) == set(REGISTRY) and data["ops"]["add_act"]["torch"] == "live"
    if info.live("cpu"):
        assert data["ops"]["conv"]["cpu"] == "live"  # of float32 in channels_last alone where bfloat16 has AMX


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_requires_a_backend(capsys):
    code, _, err = run(capsys, "info", "--require", "cuda")
    assert code == 1 and "cuda" in err and err.count("\n") == 1
    code, data = run_json(capsys, "info", "--require", "cuda", "--require", "onednn")
    assert code == 1 and data["missing"] == ["cuda"] + ([] if info.live("onednn") else ["onednn"])


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "fastres", "info", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout)["fastres"]


WRONG = {
    "no command": [],
    "unknown command": ["fly"],
    "unknown model": ["bench", "resnet51"],
    "no such depth": ["verify", "cifar.resnet21"],
    "batch of none": ["bench", "resnet18", "--batch", "0"],
    "batch of text": ["bench", "resnet18", "--batch", "many"],
    "batch too large": ["verify", "resnet18", "--batch", "100000"],
    "negative size": ["tune", "resnet18", "--size", "-3"],
    "unknown dtype": ["bench", "resnet18", "--dtype", "int3"],
    "unknown mode": ["bench", "resnet18", "--mode", "sleep"],
    "no seconds": ["tune", "resnet18", "--seconds", "nan"],
    "unknown backend": ["info", "--require", "abacus"],
    "a folder that cannot be made": ["bench", "resnet18", "--json", "--out", "/dev/null/results"],
    "no such file": ["explain", "nowhere.py:make"],
    "no epochs": ["demo", "--epochs", "0"],
    "too small": ["verify", "resnet18", "--size", "1", "--mode", "training"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_one_line_and_code_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    messages = [line for line in err.splitlines() if not line.startswith("verify [")]
    assert code == 2 and out == "" and len(messages) == 1 and messages[0].startswith("fastres")


def test_a_model_from_a_file(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch.nn as nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise KeyError('inside')\n"
    )
    code, data = run_json(capsys, "verify", f"{path}:make", "--size", "8", "--device", "cpu")
    assert code == 0 and data["ok"]
    for name, words in (("number", "torch.nn.Module"), ("absent", "must define"), ("broken", "KeyError")):
        code, _, err = run(capsys, "verify", f"{path}:{name}")
        assert code == 2 and words in err and err.count("\n") == 1


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"fastres {fastres.__version__}\n", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(capsys):
    code, out, err = run(capsys, "verify", "resnet18", "--device", "cuda")
    assert code == 2 and out == "" and err.startswith("fastres verify: --device cuda: torch") and err.count("\n") == 1


@pytest.mark.parametrize("wish", ["abacus", "conv_bn_act=abacus", "cnv=torch"])
def test_a_backend_misspelt_in_the_environment_is_told(capsys, monkeypatch, wish):
    monkeypatch.setenv("FASTRES_BACKEND", wish)
    dispatch.forget()
    code, _, err = run(capsys, "verify", *NET)
    assert code == 2 and "fastres verify: FASTRES_BACKEND: " in err and repr(wish.split("=")[-1 if "ab" in wish else 0]) in err


def test_tune_tells_before_any_work_that_nothing_can_be_stored(capsys, monkeypatch):
    monkeypatch.setenv("FASTRES_CACHE_DIR", "/dev/null/cache")
    code, out, err = run(capsys, "tune", *NET)
    assert code == 2 and out == "" and "nothing can be stored in /dev/null/cache" in err and err.count("\n") == 1


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "explain", "nowhere.py:make", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_verify(capsys, mode):
    code, data = run_json(capsys, "verify", *NET, "--mode", mode)
    assert code == 0 and data["ok"] and data["restored"] and data["error"] <= data["allowed"]


def test_verify_fails_with_code_1(capsys, monkeypatch):
    wrong = REGISTRY["conv_bn_act"].backends[-1]
    run_it = wrong.load()
    monkeypatch.setattr(
        REGISTRY["conv_bn_act"], "backends",
        (dispatch.Backend("torch", wrong.why_not, lambda: lambda *args: run_it(*args) * 1.01),),
    )  # fmt: skip
    call = NativeFrozen.call
    monkeypatch.setattr(NativeFrozen, "call", lambda self, x: call(self, x) * 1.01)
    dispatch.forget()
    code, out, _ = run(capsys, "verify", *NET)
    assert code == 1 and "FAILED" in out


def test_explain(capsys):
    code, data = run_json(capsys, "explain", *NET)
    assert data["model"].startswith(NET[0])
    assert code == 0 and data["modules"]
    code, out, _ = run(capsys, "explain", *NET)
    assert code == 0 and "layer1.0" in out


def test_tune_stores_only_when_asked(capsys, cache):
    code, data = run_json(capsys, "tune", *NET, "--seconds", "0.01", "--dry-run")
    assert code == 0 and data["calls"] and data["file"] is None and not cache.exists()
    code, data = run_json(capsys, "tune", *NET, "--seconds", "0.01")
    assert code == 0 and set(tune.read(Path(data["file"]))["choices"]) == {call["key"] for call in data["calls"]}


def test_tune_leaves_a_corrupt_cache_alone(capsys, cache):
    cache.mkdir(mode=0o700)
    path = tune.cache_file(torch.device("cpu"))
    path.write_text("{")
    code, _, err = run(capsys, "tune", *NET, "--seconds", "0.01")
    assert code == 2 and "left as it is" in err and path.read_text() == "{"


def test_tune_reports_a_wrong_backend_with_code_1(capsys, monkeypatch):
    op = REGISTRY["conv_bn_act"]
    wrong = dispatch.Backend("wrong", lambda *args: None, lambda: lambda *args: op.reference(*args) + 1.0)
    monkeypatch.setattr(op, "backends", (wrong, *op.backends))
    code, out, _ = run(capsys, "tune", *NET, "--seconds", "0.01", "--dry-run")
    assert code == 1 and "discarded: wrong for conv_bn_act" in out


def test_bench_reports_every_rival(capsys, monkeypatch, tmp_path):
    from fastres.experiments import rivals

    monkeypatch.setattr(rivals, "INFERENCE", (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST))
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")
    code, data = run_json(capsys, "bench", *NET, "--seconds", "0.1", "--out", tmp_path)
    assert code == 0 and [row["rival"] for row in data["rows"]] == ["fastres", "eager", "eager channels_last"]
    assert all(row["ok"] and row["ratio"] > 0 for row in data["rows"])
    assert [Path(path).suffix for path in data["files"]] == [".json", ".png"]
    assert all(Path(path).stat().st_size > 0 for path in data["files"])
    pytest.importorskip("rich", reason="the package rich is not installed")
    code, out, err = run(capsys, "bench", *NET, "--seconds", "0.1")
    assert code == 0 and "eager channels_last" in out and "bench [1/" in err


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["demo"], "scikit-learn"),
        (["bench", *NET], "rich"),
        (["bench", *NET, "--json", "--out", "nowhere"], "matplotlib"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(capsys, monkeypatch, arguments, package):
    monkeypatch.setattr(terminal, "installed", lambda module: False)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and package in err and "pip install fastres[demo]" in err and err.count("\n") == 1
    assert not Path("nowhere").exists()


def test_what_errors_become(capsys, monkeypatch):
    for error, expected in ((VerificationError("missed"), 1), (UnsupportedError("cannot"), 2), (OSError("full"), 2)):

        def fail(arguments, error=error):
            raise error

        fail.__name__ = "info"
        monkeypatch.setattr(cli, "info", fail)
        code, _, err = run(capsys, "info")
        assert code == expected and err == f"fastres info: {error}\n"


def test_progress_is_plain_when_piped(capsys):
    with terminal.Progress("work", 2) as progress:
        progress.step("one")
        progress.step("two")
    assert capsys.readouterr().err == "work [1/2] one\nwork [2/2] two\n"
