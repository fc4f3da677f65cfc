"""Cases in a process of their own: where memory is watched or fails, where threads race, where signals arrive."""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import _cuda_on_cpu

from reliability.board import Found, Tally

ROOT = Path(__file__).resolve().parents[2]
PREFIX = ""  # what each process does first: a fault is planted here


@functools.cache
def watcher() -> Path:
    """memory.cpp, compiled once."""
    toolchain, recipes = _cuda_on_cpu.tools()
    folder = recipes.WORK / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-builtin", "-Wall", "-Wextra", "-static-libstdc++", "-static-libgcc"]
    command = toolchain.quoted([*toolchain.find_cxx()["command"], *flags])
    edges = [("memory.so", "cxx", [Path(__file__).with_name("memory.cpp")], [])]
    with contextlib.redirect_stderr(io.StringIO()):
        toolchain.run_ninja(folder, {"cxx": f"{command} -shared $in -o $out $flags"}, edges)
    return folder / "memory.so"


def environment(watched: bool) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, **({"LD_PRELOAD": str(watcher())} if watched else {})}


def apart(tally: Tally, where: str, *arguments: object, watched: bool = False, patience: float = 3000) -> None:
    """``reliability.<where>(tally, *arguments)`` in another process, which may crash or hang; ``watched``: see memory.cpp."""
    code = f"{PREFIX}\nfrom reliability import children\nchildren.serve({where!r}, {arguments!r}, {tally.one})"
    try:
        command = [sys.executable, "-X", "faulthandler", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(watched), timeout=patience)
    except subprocess.TimeoutExpired:
        with tally.case(where):
            raise TimeoutError(f"hung for {patience} s") from None
        return
    if done.returncode:
        with tally.case(where):
            raise RuntimeError(f"ended with code {done.returncode}: {done.stderr[:500]} ... {done.stderr[-200:]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    tally.tried += found["tried"]
    for text in found["failures"]:
        tally.fail(text)
    tally.failed += found["failed"] - len(found["failures"])


def serve(where: str, arguments: tuple, one: bool) -> None:
    """In that process: try, and print what became of it."""
    module, _, name = where.rpartition(".")
    tally = Tally(one=one)
    with contextlib.suppress(Found):
        getattr(importlib.import_module(f"reliability.{module}"), name)(tally, *arguments)
        if count := touched():
            tally.fail(f"{where}: {count} blocks of memory were written past their ends")
    print(json.dumps(dataclasses.asdict(tally)))
    sys.stdout.flush()


@functools.cache
def _watched() -> ctypes.CDLL | None:
    """The watcher, where it is preloaded."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "fastres_test_touched"):
        return None
    library.fastres_test_touched.restype = library.fastres_test_seen.restype = ctypes.c_int64
    library.fastres_test_fail.argtypes = (ctypes.c_int64, ctypes.c_size_t)
    library.fastres_test_fail.restype = None
    return library


def touched() -> int:
    """Blocks freed so far whose red zones had been written to."""
    library = _watched()
    return 0 if library is None else library.fastres_test_touched()


@contextlib.contextmanager
def failing(nth: int, least: int) -> Iterator[list[int]]:
    """The nth allocation of at least so many bytes fails; afterwards the list holds how many there were."""
    library = _watched()
    assert library is not None, "memory is not watched"
    seen = [0]
    library.fastres_test_fail(nth, least)
    try:
        yield seen
    finally:
        seen[0] = library.fastres_test_seen()
        library.fastres_test_fail(-1, 0)
