"""R20: installing on every kind of machine, each time into a new environment: what is built, what is said of the rest, that it
runs there. Of the native ops only one is left in the sources, which makes building quick.
"""

# ruff: noqa: E501

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from test_install import STEERING, fake_torch, program, stub_nvcc

from reliability.board import Tally, scored

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("pip", "setuptools", "ninja", "pybind11")
LIMIT = 1800
FAILING = "#!/bin/sh\n[ $1 = --version ] && echo stub 1.0 && exit\necho error: no; exit 1\n"
OBLIGING = """#!/bin/sh
[ $1 = --version ] && echo stub 1.0 && exit
while [ $# -gt 1 ]; do case "$1" in -o | -MF) : > "$2";; esac; shift; done
"""
RUNS = """
import json, torch, fastres
from fastres.kernels import native
y = fastres.functional.add_act(torch.full((3,), -1.0), torch.tensor([0.0, 2.0, float("nan")]))
assert y[:2].tolist() == [0.0, 1.0] and y[2].isnan(), y
print(json.dumps([native.build_info(), str(native.why_not_cpu()), fastres.__file__]))
"""


class Environment:
    """A new environment of Python with the tools that build, and a torch: the one that runs here, none, or a fake."""

    def __init__(self, folder: Path, torch: str = "real", tools: tuple[str, ...] = TOOLS) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=LIMIT)
        self.python = folder / "bin/python"
        self.site = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        for tool in tools:
            for top in {file.parts[0] for file in importlib.metadata.files(tool) or () if file.parts[0] != ".."}:
                source = Path(str(importlib.metadata.distribution(tool).locate_file(top)))
                if source.exists() and not (self.site / top).exists():
                    (self.site / top).symlink_to(source)
        if "ninja" in tools and (ninja := Path(sysconfig.get_path("scripts"), "ninja")).exists():
            (folder / "bin/ninja").symlink_to(ninja)
        if torch == "real":
            (self.site / "torch").symlink_to(Path(sysconfig.get_path("purelib"), "torch"))
            (self.site / "torch_needs.pth").write_text(sysconfig.get_path("purelib"))
        elif torch != "none":
            cuda = torch.partition("+cu")[2]
            fake_torch(self.site, torch, f"{cuda[:-1]}.{cuda[-1]}" if cuda else None)

    def run(self, *words: object, cwd: object = "/", **variables: str) -> tuple[int, str]:
        """The exit code of the environment's Python, and all that was said."""
        unwanted = {*STEERING, "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME"}
        clean = {name: value for name, value in os.environ.items() if name not in unwanted}
        clean["PATH"] = os.pathsep.join([str(self.folder / "bin"), "/usr/bin", "/bin"])
        done = subprocess.run(
            [self.python, *map(str, words)], cwd=cwd, env=clean | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        )  # fmt: skip
        assert "Traceback" not in done.stdout, done.stdout[-1500:]
        return done.returncode, done.stdout

    def record(self) -> dict:
        return json.loads((self.site / "fastres/_build_info.json").read_text())


@dataclass
class Cell:
    """An installation, and what is documented to come of it."""

    name: str
    says: str  # a regular expression of what pip -v shows
    built: tuple[str, ...] | None = ()  # None: the installation fails
    torch: str = "real"
    tools: tuple[str, ...] = TOOLS
    options: tuple[str, ...] = ("--no-build-isolation",)
    variables: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path, dict[str, str]], None] = lambda folder, variables: None
    source: Callable[[Environment, Path], Path] = lambda env, clone: clone


def compiler(text: str) -> Callable[[Path, dict[str, str]], None]:
    def prepare(folder: Path, variables: dict[str, str]) -> None:
        variables["CXX"] = str(program(folder / "c++", text))

    return prepare


def toolkit(script: str | None, version: str = "13.0") -> Callable[[Path, dict[str, str]], None]:
    """A CUDA home whose nvcc is this script, or one that answers and compiles nothing; and a compiler that obliges."""

    def prepare(folder: Path, variables: dict[str, str]) -> None:
        variables |= {"CUDA_HOME": str(folder / "cuda"), "CXX": str(program(folder / "c++", OBLIGING))}
        nvcc = stub_nvcc(folder / "cuda", version)
        if script is not None:
            program(nvcc, script or nvcc.read_text().replace("*) exit 1", "*) echo error: ptxas: not found; exit 1"))

    return prepare


def archive(env: Environment, clone: Path) -> Path:
    """The sdist."""
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    status, said = env.run("-c", code, clone.parent, cwd=clone, FASTRES_BUILD="none")
    assert status == 0, said
    return next(clone.parent.glob("fastres-*.tar.gz"))


def wheel(env: Environment, clone: Path) -> Path:
    """A wheel made in another environment."""
    elsewhere = Environment(clone.parent / "elsewhere")
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", clone.parent / "wheels", clone)
    status, said = elsewhere.run(*command, FASTRES_BUILD="cpu")
    assert status == 0, said[-1500:]
    shutil.rmtree(elsewhere.folder)
    return next((clone.parent / "wheels").glob("*.whl"))


NONE, CPU = {"FASTRES_BUILD": "none"}, {"FASTRES_BUILD": "cpu"}
CUDA_TORCH = "2.13.0+cu130"
PURE = "fastres: pure Python"
CELLS = [
    Cell("pure Python asked for", f"{PURE}; no CUDA or CPU kernels: FASTRES_BUILD=none", variables=NONE),
    Cell("no torch", "no torch to build against was found", torch="none"),
    Cell("no compiler", "no C.. compiler was found", variables={"PATH": "/nowhere"}),
    Cell("a wish that there is not", "FASTRES_BUILD must be auto, none, cpu, cuda, got 'gpu'", None, variables={"FASTRES_BUILD": "gpu"}),
    Cell("CUDA asked for without nvcc", "FASTRES_BUILD=cuda cannot be met: /nowhere/bin/nvcc cannot be run", None,
         variables={"FASTRES_BUILD": "cuda", "CUDA_HOME": "/nowhere"}),
    Cell("torch too old", "torch 2.10.0 is too old: native code needs 2.11", torch="2.10.0"),
    Cell("no ninja", "ninja was not found", tools=("pip", "setuptools", "pybind11"), variables={"PATH": "/nowhere", "CXX": "/usr/bin/g++"}),
    Cell("a compiler that fails", "compiling failed: error: no", prepare=compiler(FAILING)),
    Cell("a failing compiler and a wish", "FASTRES_BUILD=cpu cannot be met: compiling failed: error: no", None, variables=CPU,
         prepare=compiler(FAILING)),
    Cell("nvcc absent", "/nowhere/bin/nvcc cannot be run", ("cpu",), CUDA_TORCH, prepare=compiler(OBLIGING), variables={"CUDA_HOME": "/nowhere"}),
    Cell("nvcc of another major version", r"nvcc is 12\.8 and torch .* is for CUDA 13\.0", ("cpu",), CUDA_TORCH, prepare=toolkit(None, "12.8")),
    Cell("nvcc prints garbage", "names no release, got 'I am no compiler'", ("cpu",), CUDA_TORCH,
         prepare=toolkit("#!/bin/sh\necho I am no compiler\n")),
    Cell("nvcc exits with 1", "failed with exit code 1: no licence", ("cpu",), CUDA_TORCH, prepare=toolkit("#!/bin/sh\necho no licence; exit 1\n")),
    Cell("nvcc hangs", "gave no answer in 30 s", ("cpu",), CUDA_TORCH, prepare=toolkit("#!/bin/sh\nsleep 600\n")),
    Cell("no ptxas", "compiling failed: .*ptxas: not found", ("cpu",), CUDA_TORCH, prepare=toolkit("")),
    Cell("CPU torch, with nvcc and no GPU", "has no CUDA", ("cpu",), variables={"CUDA_HOME": "/usr/local/cuda"}),
    Cell("isolated pip", "fastres: CPU kernels with", ("cpu",), options=()),
    Cell("editable", "fastres: CPU kernels with", ("cpu",), options=("--no-build-isolation", "-e")),
    Cell("from the sdist", "fastres: CPU kernels with", ("cpu",), source=archive),
    Cell("a wheel made in another environment", "Successfully installed fastres", ("cpu",), options=("--no-index",), source=wheel),
    Cell("a home that cannot be written", "fastres: CPU kernels with", ("cpu",), variables={"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}),
    Cell("offline", "fastres: CPU kernels with", ("cpu",), options=("--no-build-isolation", "--no-index"),
         variables={"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}),
]  # fmt: skip


def clone(folder: Path) -> Path:
    """The sources with one native op, and no trace of earlier builds."""
    unwanted = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "*.egg-info")
    for name in ("csrc", "fastres"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile"):
        shutil.copy2(ROOT / name, folder / name)
    for path in (folder / "csrc/cpu").glob("*.cpp"):
        if not path.name.startswith("add_act"):
            path.unlink()
    return folder


def check(cell: Cell, folder: Path, sources: Path) -> None:
    env, variables = Environment(folder / "env", cell.torch, cell.tools), dict(cell.variables)
    cell.prepare(folder, variables)
    source = cell.source(env, sources)
    status, said = env.run("-m", "pip", "install", "-v", "--no-deps", *cell.options, source, **variables)
    assert re.search(cell.says, said), f"it does not say {cell.says!r}: {said[-1500:]}"
    if cell.built is None:
        assert status != 0 and not (env.site / "fastres").exists(), f"exit code {status}"
        return
    assert status == 0, f"exit code {status}: {said[-1500:]}"
    if cell.torch == "real":
        status, said = env.run("-W", "error", "-c", RUNS, **{k: v for k, v in variables.items() if "HOME" in k and k != "CUDA_HOME"})
        assert status == 0, said
        info, why_not, file = json.loads(said)
        assert Path(file).is_relative_to(sources if "-e" in cell.options else env.site), file
        assert (why_not == "None") == ("cpu" in cell.built), why_not
        assert env.run("-m", "fastres", "info", **variables)[0] == 0
    else:
        info = env.record()
    assert info["built"] == list(cell.built), info


@scored("R20", "installing: no torch, no compiler, broken nvcc, isolated, editable, sdist, moved, offline", full=20, short=2)
def installation(tally: Tally, count: int) -> None:
    if missing := [tool for tool in TOOLS if not importlib.util.find_spec(tool)]:
        tally.note(f"{', '.join(missing)} must be installed")
        return
    with tempfile.TemporaryDirectory() as temporary:
        sources = clone(Path(temporary) / "clone")
        for index, cell in enumerate(CELLS[:count] if count < 20 else CELLS):
            with tally.case(cell.name):
                check(cell, Path(temporary) / str(index), sources)
