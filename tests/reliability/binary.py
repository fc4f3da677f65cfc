"""R21: the built libraries against the stable ABI of the oldest PyTorch that they promise to run on.

Libraries cannot be tried on older CPU builds of PyTorch here; in their place stands what makes one run there: every symbol it
asks PyTorch for is one that PyTorch's own headers declare for that version, and no other library is needed.
"""

# ruff: noqa: E501

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch

from fastres.kernels import native
from reliability.board import Tally, scored

TARGET = "0x020b000000000000"  # 2.11, as in csrc/recipes.py
LIBRARIES = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
WITH_CUDA = LIBRARIES | {"libtorch.so", "libdl.so.2", "librt.so.1", "libpthread.so.0"}
HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
SHIM = r"\b(?:aoti_)?torch_\w+"
# torch version, and whether it may load the library
VERSIONS = {"2.10.1": False, "2.9.0": False, "1.13.1": False, "2.11.0": True, "2.13.0+cpu": True, "2.20.0a0+git": True, "3.0.0": True}


def said(*command: str, given: str = "") -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, input=given).stdout


def declared() -> set[str]:
    """The functions that PyTorch's headers declare for TARGET, as the compiler reads them."""
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    include = str(Path(torch.__file__).parent / "include")
    text = said("g++", "-E", "-P", "-x", "c++", "-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET}", "-I", include, "-", given=source)
    return set(re.findall(rf"({SHIM})\s*\(", text))


def defined(library: Path) -> set[str]:
    return {line.split()[-1].partition("@")[0] for line in said("nm", "-D", "--defined-only", str(library)).splitlines()}


def libraries() -> list[Path]:
    """Those that are built."""
    package = Path(native.__file__).parents[1]
    found = importlib.util.find_spec("fastres._C")
    assert found is not None and found.origin is not None, "the CPU library is not built"
    return [Path(found.origin), *package.glob("_cuda.so")]


def judge(tally: Tally, library: Path) -> None:
    offered = defined(Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    stable = declared()
    asked = [line.split()[-1] for line in said("nm", "-D", "-u", str(library)).splitlines()]
    for symbol in asked:
        with tally.case(f"{library.name}: {symbol}"):
            if re.fullmatch(SHIM, symbol):
                assert symbol in stable, "it is not of the stable ABI"
                assert symbol in offered or "cuda" in symbol, "the PyTorch that is installed does not have it"
            assert not re.match(r"_ZNK?(2at|3c10|5torch|6caffe2)", symbol), "a C++ function of PyTorch's"
            assert "@" in symbol or re.match(SHIM + r"|_?Py|_ITM_|__cxa_pure|__gmon|_ZNSt15__exception_ptr", symbol), "of no known library"
    dynamic = said("readelf", "-d", str(library))
    for needed in re.findall(r"NEEDED.*\[(.+)\]", dynamic):
        with tally.case(f"{library.name} needs {needed}"):
            assert needed in (WITH_CUDA if library.name == "_cuda.so" else LIBRARIES)
    with tally.case(f"{library.name}: where it looks for libraries"):
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    with tally.case(f"{library.name}: what it offers"):
        own = {name for name in defined(library) if "fastres" in name or re.match(r"_ZNK?(2at|3c10|5torch)", name)}
        assert not own, f"others could bind to {sorted(own)[:3]}"


@scored("R21", "built libraries: only symbols of the stable ABI of 2.11, only the allowed libraries; older ones refused", full=80, short=80)
def stable_abi(tally: Tally, count: int) -> None:
    if missing := [tool for tool in ("g++", "nm", "readelf") if not shutil.which(tool)]:
        tally.note(f"{', '.join(missing)} must be installed")
        return
    for library in libraries():
        judge(tally, library)
    for version, fine in VERSIONS.items():
        with tally.case(f"torch {version}"), mock.patch.object(torch, "__version__", version):
            refusal = native._old_torch()
            assert (refusal is None) == fine, refusal
            assert fine or re.fullmatch(r"the native kernels need torch 2\.11 or newer, got \S+ \(.+\)", refusal or "")
