"""What loads the native libraries: once, and every way to fail is a sentence that says what to do."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from fastres.kernels import inplace, native

pytestmark = pytest.mark.none


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder in the package's place; this torch has CUDA."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def test_libraries_are_looked_for_once_however_many_threads_ask(monkeypatch):
    looked, found = [], []

    def look():
        looked.append(1)
        time.sleep(0.05)
        return "a reason"

    monkeypatch.setattr(native, "_refusals", None)
    monkeypatch.setattr(native, "_load_cpu", look)
    monkeypatch.setattr(native, "_load_cuda", lambda: None)
    threads = [threading.Thread(target=lambda: found.append(native.why_not_cpu())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert looked == [1] and found == ["a reason"] * 4 and native.why_not_cuda() is None


def test_nothing_was_built(package):
    for part, load in (("CPU", native._load_cpu), ("CUDA", native._load_cuda)):
        assert load().startswith(f"the native {part} kernels were not built: fastres runs from a source folder")


def test_the_record_says_why_a_part_was_not_built(package, monkeypatch):
    record = {"built": [], "why_not": {"cpu": "there is no compiler"}}
    (package / "_build_info.json").write_text(json.dumps(record))
    assert native._load_cpu() == "the native CPU kernels were not built: there is no compiler"
    assert native._load_cuda().endswith("its file is missing, install fastres again")
    monkeypatch.setattr(native, "why_not_cpu", lambda: "there is no compiler")
    assert native.build_info() == record


@pytest.mark.parametrize(("version", "old"), [("2.10.1+cu128", True), ("1.13.0", True), ("2.11.0a0+git", False)])
def test_an_older_torch_is_not_given_the_libraries(package, monkeypatch, version, old):
    (package / "_C.so").touch()
    (package / "_cuda.so").touch()
    monkeypatch.setattr(torch, "__version__", version)
    given = []
    monkeypatch.setattr(native.importlib, "import_module", given.append)
    monkeypatch.setattr(torch.ops, "load_library", given.append)
    for reason in (native._load_cpu(), native._load_cuda()):
        assert (f"need torch 2.11 or newer, got {version}" in reason) if old else reason is None
    assert given == ([] if old else ["fastres._C", package / "_cuda.so"])


def test_a_library_that_cannot_be_loaded_is_one_sentence(package, monkeypatch):
    (package / "_cuda.so").write_text("no library")  # which the system itself refuses
    (package / "_C.so").touch()

    def fail(name):
        raise ImportError(f"undefined symbol of {name}\nand more lines")

    for part, load in (("CUDA", native._load_cuda), ("CPU", native._load_cpu)):
        if part == "CPU":
            monkeypatch.setattr(native.importlib, "import_module", fail)
        reason = load()
        advice = f"install fastres again, for torch {torch.__version__}"
        assert reason.startswith(f"the native {part} library cannot be loaded ({advice})")
        assert "\n" not in reason and ("undefined symbol of fastres._C" if part == "CPU" else "_cuda.so") in reason


def test_a_torch_without_cuda_needs_no_cuda_library(package, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native._load_cuda() == f"torch {torch.__version__} is a build without CUDA"


@pytest.mark.cpu
def test_an_op_that_an_older_build_lacks_is_named():
    assert native.why_not("cpu_add_act") is None and native.op("cpu_add_act")._schema.name == "fastres_C::cpu_add_act"
    assert native.why_not("cpu_of_tomorrow") == "the native library was built without cpu_of_tomorrow (build fastres again)"
    assert native.build_info()["built"] and Path(native._PACKAGE / "_build_info.json").is_file()


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("added", [True, False])
def test_the_epilogue_in_place_is_the_same_without_the_library(monkeypatch, act, added):
    y, residual = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5) if added else None
    expected = y if residual is None else y + residual
    expected = expected.relu() if act == "relu" else expected
    for reason in (None, "not built"):
        if reason is not None:
            monkeypatch.setattr(native, "why_not", lambda name, reason=reason: reason)
        given = y.clone()
        assert inplace.add_act_(given, residual, act) is given and torch.equal(given, expected)
