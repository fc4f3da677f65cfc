"""The CPU library compiled with a sanitizer in it, apart from the library in use, and Python under it."""

# ruff: noqa: E501

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
# Levels of the processor that the library does not see, so that the kernels of lesser ones run too: by name of the
# instruction set that is hidden. Included before every source.
HIDING = """#pragma once
#include <cstdlib>
#include <cstring>
inline bool fastres_hidden(const char* name) {
  const char* hidden = std::getenv("FASTRES_TEST_HIDES");
  return hidden && std::strcmp(hidden, name) == 0;
}
#define __builtin_cpu_supports(name) (__builtin_cpu_supports(name) && !fastres_hidden(name))
"""
FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Kind:
    """A sanitizer, the library that must be loaded before Python, its settings, and the faults it must report."""

    name: str
    switch: str
    runtime: str
    options: dict[str, str]
    faults: tuple[str, ...]


ADDRESS = Kind(
    "address", "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all",
    "libasan.so",
    {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ("address", "undefined"),
)  # fmt: skip
THREAD = Kind("thread", "-fsanitize=thread", "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}, ("thread",))


def recipes() -> ModuleType:
    """A copy of csrc/recipes.py of our own: what is changed in it changes no other build."""
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        spec = importlib.util.spec_from_file_location("fastres_recipes_instrumented", ROOT / "csrc/recipes.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def library(kind: Kind, ops: tuple[str, ...] = ()) -> Path:
    """The library with the sanitizer, built where a source changed since; of some ops only, or of all."""
    build = recipes()
    build.WORK = build.WORK.parent / f"{kind.name}-{sys.implementation.cache_tag}{''.join('-' + op for op in ops)}"
    build.WORK.mkdir(parents=True, exist_ok=True)
    build.toolchain.write_changed(build.WORK / "hiding.h", HIDING)
    build.CXX_FLAGS = [*build.CXX_FLAGS, *FLAGS, "-include", build.WORK / "hiding.h"]
    of_all = build.sources

    def sources(room: str, info: dict) -> tuple[list[Path], list[Path]]:
        kernels, bindings = of_all(room, info)
        if ops:
            kernels = [path for path in kernels if path.stem.removesuffix("_kernel") in ops]
            bindings = [path for path in bindings if path.stem in ops]
        return kernels, [*bindings, Path(__file__).with_name("sanitized.cpp")]

    build.sources = sources
    before = os.environ.get("CXX")
    os.environ["CXX"] = shlex.join([before or "g++", *kind.switch.split()])
    try:
        return build.build_cpu({"built": [], "kernels": {}}, explicit=True)
    finally:
        del os.environ["CXX"]
        if before is not None:
            os.environ["CXX"] = before


def why_not(kind: Kind) -> str | None:
    """Why this machine cannot do it, in one sentence."""
    if not shutil.which("g++"):
        return "there is no g++"
    return None if Path(runtime(kind.runtime)).is_file() else f"g++ has no {kind.runtime}"


def runtime(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(kind: Kind, built: Path, *words: str, hidden: str = "", limit: float = 1200) -> subprocess.CompletedProcess:
    """``python -m _under_sanitizer LIBRARY WORDS`` with the sanitizer loaded before all else."""
    environment = {
        **os.environ, **kind.options, "LD_PRELOAD": f"{runtime(kind.runtime)} {runtime('libstdc++.so.6')}", "FASTRES_TEST_HIDES": hidden,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONMALLOC": "malloc",
    }  # fmt: skip
    command = [sys.executable, "-m", "_under_sanitizer", str(built), *words]
    # ThreadSanitizer wants its memory at fixed addresses, which a randomised layout may occupy.
    steady = ["setarch", "-R"] if kind is THREAD and shutil.which("setarch") else []
    return subprocess.run([*steady, *command], capture_output=True, text=True, env=environment, timeout=limit)
