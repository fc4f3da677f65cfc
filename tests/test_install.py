"""Installing on every kind of machine: what is built, what is said of the rest, and that it runs anywhere."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

import fastres
from fastres.kernels import native

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree")
STEERING = (
    *("FASTRES_BUILD", "FASTRES_CUDA_HOME", "CUDA_HOME"),
    *("FASTRES_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CXX"),
)


@pytest.fixture(scope="module")
def scripts():
    """setup.py as a module; importing it builds nothing."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("fastres_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def toolchain(scripts, monkeypatch):
    """csrc/toolchain.py, with nothing in the environment that steers it."""
    for name in STEERING:
        monkeypatch.delenv(name, raising=False)
    return sys.modules["toolchain"]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stub_nvcc(home: Path, version: str = "13.0") -> Path:
    """A CUDA home whose nvcc answers questions and compiles nothing."""
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    answers = f'case "$1" in --version) echo "Cuda tools, release {version}";;'
    answers += f' --dryrun) echo "#$ TOP={home}";; --list-gpu-code) echo sm_80 sm_90 sm_100 sm_120;;'
    answers += " *) exit 1;; esac"
    return program(home / "bin/nvcc", f"#!/bin/sh\n{answers}\n")


# --- finding the tools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho I am no compiler\n", "names no release, got 'I am no compiler'"),
        ("#!/bin/sh\nexit 0\n", "names no release, got ''"),
        ("#!/bin/sh\necho no licence; exit 1\n", "failed with exit code 1: no licence"),
        ("#!/bin/sh\nsleep 600\n", "gave no answer in 1 s"),
        ("not a program", "cannot be run: Exec format error"),
    ],
    ids=["garbage", "silent", "exit 1", "hangs", "no program"],
)
def test_broken_nvcc_is_a_named_reason(toolchain, monkeypatch, tmp_path, script, reason):
    nvcc = program(tmp_path / "bin/nvcc", script)
    monkeypatch.setenv("FASTRES_CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(toolchain, "PATIENCE_S", 1)
    with pytest.raises(toolchain.Unmet, match=re.escape(reason)) as caught:
        toolchain.find_nvcc()
    assert str(nvcc) in str(caught.value)


def test_missing_cuda_home_and_missing_libraries_are_named(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(toolchain.Unmet, match="nowhere/bin/nvcc cannot be run"):
        toolchain.find_nvcc()
    stub_nvcc(tmp_path / "cuda")
    monkeypatch.setenv("FASTRES_CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.find_nvcc()["version"] == "13.0"
    (tmp_path / "cuda/lib64/libcudart_static.a").unlink()
    with pytest.raises(toolchain.Unmet, match=r"libcudart_static\.a is missing"):
        toolchain.find_nvcc()


def fake_torch(folder: Path, version: str, cuda: str | None) -> dict:
    (folder / "torch/include").mkdir(parents=True)
    text = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "torch/version.py").write_text(text)
    return {"root": folder / "torch", "version": version, "cuda": cuda}


def test_torch_is_found_without_importing_it_and_an_old_one_refused(toolchain, monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("empty", "new", "old")]
    monkeypatch.setattr(toolchain, "site_folders", lambda: folders)
    new = fake_torch(tmp_path / "new", "2.12.1+cu130", "13.0")
    assert toolchain.find_torch() == new
    shutil.rmtree(tmp_path / "new")
    fake_torch(tmp_path / "old", "2.10.0", None)
    with pytest.raises(toolchain.Unmet, match=re.escape("torch 2.10.0 is too old: native code needs 2.11")):
        toolchain.find_torch()
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(toolchain.Unmet, match="install torch, then pip install --no-build-isolation"):
        toolchain.find_torch()


def test_torch_of_the_target_environment_is_found_from_an_isolated_one(toolchain, monkeypatch, tmp_path):
    home = tmp_path / "venv"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    expected = fake_torch(home / f"lib/python{version}/site-packages", "2.13.0", None)
    (home / "pyvenv.cfg").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "isolated"))
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{home}/bin{os.pathsep}/usr/bin")
    assert toolchain.find_torch() == expected


@pytest.mark.parametrize(
    ("variables", "archs"),
    [
        ({}, ["80", "90a", "100"]),
        ({"TORCH_CUDA_ARCH_LIST": "5.2 8.0 9.0a+PTX"}, ["80", "90a"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.0", "FASTRES_CUDA_ARCHS": "sm_120"}, ["120"]),
        ({"FASTRES_CUDA_ARCHS": "90a;52"}, None),
        ({"FASTRES_CUDA_ARCHS": "hopper"}, None),
        ({"TORCH_CUDA_ARCH_LIST": "Volta"}, None),
    ],
)
def test_architectures(toolchain, monkeypatch, tmp_path, variables, archs):
    nvcc = str(stub_nvcc(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if archs is None:
        with pytest.raises(toolchain.Unmet, match=r"CUDA architectures must be known to .*, got "):
            toolchain.cuda_archs(nvcc)
    else:
        assert toolchain.cuda_archs(nvcc) == archs


# --- deciding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason"),
    [
        (None, "13.0", "has no CUDA (FASTRES_BUILD=cuda compiles them all the same)"),
        ("12.8", "13.0", "nvcc is 13.0 and torch 2.13.0 is for CUDA 12.8"),
        ("13.0", None, "cannot be run"),
    ],
    ids=["CPU torch", "another major version", "no nvcc"],
)
def test_auto_leaves_cuda_out_with_a_reason(scripts, toolchain, monkeypatch, tmp_path, cuda, nvcc, reason):
    torch_found = fake_torch(tmp_path / "site", "2.13.0", cuda)
    monkeypatch.setattr(toolchain, "find_torch", lambda: torch_found)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    if nvcc:
        stub_nvcc(tmp_path / "cuda", nvcc)
    build_cpu = lambda info, explicit: info["built"].append("cpu") or Path("x")  # noqa: E731
    monkeypatch.setitem(scripts.recipes.BUILD, "cpu", build_cpu)
    info, libraries = scripts.build_native("auto")
    assert list(libraries) == info["built"] == ["cpu"]
    assert reason in info["why_not"]["cuda"] and reason in scripts.summary(info)


def test_an_explicit_wish_fails_with_the_reason(scripts, toolchain, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for wish in ("cpu", "cuda"):
        with pytest.raises(SystemExit) as caught:
            scripts.build_native(wish)
        text = f"fastres: FASTRES_BUILD={wish} cannot be met: no-such-compiler cannot be run"
        assert text in str(caught.value)
    info, libraries = scripts.build_native("auto")
    assert libraries == {} and info["built"] == [] and info["kernels"] == {}
    assert scripts.summary(info).startswith("fastres: pure Python; no CUDA or CPU kernels: no-such-compiler")


# --- real installs --------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path) -> Path:
    """The sources, with one native op so that building them is quick, and no trace of earlier builds."""
    unwanted = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "*.egg-info")
    for name in ("csrc", "fastres"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, tmp_path / "clone" / name)
    for path in (tmp_path / "clone/csrc/cpu").glob("*.cpp"):
        if not path.name.startswith("add_act"):
            path.unlink()
    return tmp_path / "clone"


def install(clone: Path, **variables: str) -> tuple[int, str]:
    """pip install into clone/../site, without torch again; the exit status and all that was said."""
    for name in ("pip", "setuptools", "pybind11"):  # build isolation would download them each time
        if importlib.util.find_spec(name) is None:  # not imported: setuptools must be before distutils, which others import
            pytest.skip(f"{name} is not installed")
    options = ["-v", "--no-deps", "--no-build-isolation", "--upgrade", "--target", str(clone.parent / "site")]
    command = [sys.executable, "-m", "pip", "install", *options, "."]
    environment = {name: value for name, value in os.environ.items() if name not in STEERING}
    run = subprocess.run(command, cwd=clone, env=environment | variables, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def python_elsewhere(clone: Path, code: str) -> str:
    """What code prints, run in another folder with the installed package; it must say nothing on stderr."""
    environment = os.environ | {"PYTHONPATH": str(clone.parent / "site")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    return run.stdout


STATE = (
    "import json, fastres; from fastres.nn import Bottleneck; from fastres.kernels import native; "
    "print(json.dumps([fastres.__file__, native.build_info(), native.why_not_cpu()]))"
)


@pytest.mark.compile
def test_pure_python_install(clone):
    status, said = install(clone, FASTRES_BUILD="none", CXX="no-such-compiler")
    assert status == 0, said
    assert "fastres: pure Python; no CUDA or CPU kernels: FASTRES_BUILD=none" in said
    assert "py3-none-any.whl" in said
    file, info, why_not = json.loads(python_elsewhere(clone, STATE))
    assert file.startswith(str(clone.parent / "site")) and info["built"] == []
    assert why_not == "the native CPU kernels were not built: FASTRES_BUILD=none"


@pytest.mark.compile
def test_a_compiler_that_fails_leaves_pure_python_or_stops_the_explicit_wish(clone):
    script = "#!/bin/sh\n[ $1 = --version ] && echo stub 1.0 && exit\necho error: no\nexit 1\n"
    compiler = program(clone.parent / "c++", script)
    status, said = install(clone, CXX=str(compiler))
    assert status == 0, said
    assert "fastres: pure Python" in said and "compiling failed: error: no" in said
    _, info, why_not = json.loads(python_elsewhere(clone, STATE))
    assert info["built"] == [] and "compiling failed: error: no" in why_not
    status, said = install(clone, CXX=str(compiler), FASTRES_BUILD="cpu")
    assert status != 0 and "fastres: FASTRES_BUILD=cpu cannot be met: compiling failed: error: no" in said
    status, said = install(clone, FASTRES_BUILD="gpu")
    assert status != 0 and "fastres: FASTRES_BUILD must be auto, none, cpu, cuda, got 'gpu'" in said


@pytest.mark.cpu
@pytest.mark.compile
def test_native_install_runs_elsewhere_and_survives_a_broken_library(clone):
    status, said = install(clone, FASTRES_BUILD="cpu")
    assert status == 0, said
    file, info, why_not = json.loads(python_elsewhere(clone, STATE))
    assert info["built"] == ["cpu"] and info["kernels"] == {"cpu": ["add_act"]} and why_not is None
    record = json.loads((Path(file).parent / "_build_info.json").read_text())
    assert record == info and info["torch"] == torch.__version__

    (library,) = Path(file).parent.glob("_C*.so")
    library.write_bytes(b"not a library")
    _, info, why_not = json.loads(python_elsewhere(clone, STATE))
    assert why_not.startswith("the native CPU library cannot be loaded (install fastres again")
    library.unlink()
    _, _, why_not = json.loads(python_elsewhere(clone, STATE))
    assert why_not == "the native CPU kernels were not built: its file is missing, install fastres again"


# --- what is installed here -----------------------------------------------------------------------


@pytest.mark.cpu
def test_build_info_is_truthful():
    info = native.build_info()
    assert "cpu" in info["built"] and "cpu" not in info["why_not"] and info["stable_abi"] == "2.11"
    for op in info["kernels"]["cpu"]:
        assert hasattr(torch.ops.fastres_C, f"cpu_{op.removesuffix('_int8')}"), op


@pytest.mark.cpu
def test_the_library_uses_only_the_stable_abi():
    if not shutil.which("readelf") or not shutil.which("nm"):
        pytest.skip("readelf and nm (binutils) are needed")
    library = importlib.util.find_spec("fastres._C").origin
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    allowed = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    needed = {name for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic) if not name.startswith("ld-linux")}
    assert "libtorch_cpu.so" in needed and needed <= allowed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    undefined = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w+", undefined)


def test_importing_is_silent_and_loads_nothing():
    code = "import sys, fastres; print([name for name in ('fastres._C', 'triton') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(Path(fastres.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_an_old_torch_is_a_sentence(monkeypatch):
    monkeypatch.setattr(native, "_refusals", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    refusal = "the native kernels need torch 2.11 or newer, got 2.10.1 (pip install -U torch)"
    assert native.why_not_cpu() == refusal


def test_loading_from_many_threads_loads_once(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "_refusals", None)
    monkeypatch.setattr(native, "_load_cpu", lambda: calls.append("cpu") or "no")
    monkeypatch.setattr(native, "_load_cuda", lambda: calls.append("cuda") or "no")
    threads = [threading.Thread(target=native.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["cpu", "cuda"] and native.why_not_cpu() == "no"
