"""What the machine can do at most, in a process of its own: multiply-adds of each precision, and a large copy.

The peak of a precision is the faster one of a loop in registers (``fma.cpp``, compiled here for this processor) and
PyTorch's product of two matrices, which knows units that the loop does not; the row says which.
"""

import ctypes
import functools
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks import harness
from benchmarks.peers.ways import DTYPES
from benchmarks.peers.worker import answers, reason

SOURCE = Path(__file__).with_name("fma.cpp")
ROUNDS = 1 << 24
SIZE = 2048
REPEATS = 10
Row = dict[str, Any]


def main() -> None:
    channel = answers()
    print(json.dumps({"rows": measure()}), file=channel)


def measure() -> list[Row]:
    """A row for each precision, and one for memory."""
    loops, why_not = _loops()
    rows = []
    for dtype in DTYPES:
        found = {}
        if loops is not None:
            found["multiply-adds in registers"] = _best(functools.partial(_loop, getattr(loops, dtype)))
        try:
            found[f"torch matrix product of {SIZE}"] = _best(_product(dtype))
        except RuntimeError as error:  # this torch has no such product
            why_not = why_not or reason(error)
        row: Row = {"name": "peak", "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        method, rate = max(found.items(), key=lambda item: item[1], default=("", 0.0))
        row |= {"rival": method, "gop_per_s": rate} if rate else {"rival": "none", "missing": why_not}
        rows.append(row | {"found": found, **({"no_loop": why_not} if loops is None else {})})
    copied = harness.copy_peak(torch.device("cpu"))
    return [*rows, {"name": "peak", "dtype": "", "rival": "copy of 256 MiB", "gb_per_s": copied}]


def _loops() -> tuple[ctypes.CDLL | None, str]:
    """The compiled loops, or why there are none."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None, "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma.so")
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"]
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            return None, f"{compiler} failed: {done.stderr.strip().partition(chr(10))[0]}"
        loops = ctypes.CDLL(str(library))
    for name in DTYPES:
        function = getattr(loops, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    return loops, ""


def _loop(function: Callable[[int], float]) -> float:
    """Operations of all threads together, each on its own core (a pinned process would hold them all to one)."""
    done: list[float] = []

    def work(core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        done.append(function(ROUNDS))

    cores: Iterator[int | None] = itertools.cycle(sorted(benchmarks.CORES) or [None])
    threads = [threading.Thread(target=work, args=(next(cores),)) for _ in range(torch.get_num_threads())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def _product(dtype: str) -> Callable[[], float]:
    if dtype == "int8":
        a, b = (torch.ones(SIZE, SIZE, dtype=torch.int8) for _ in range(2))
        product: Callable[[], Any] = functools.partial(torch._int_mm, a, b)
    else:
        a, b = (torch.ones(SIZE, SIZE, dtype=DTYPES[dtype]) for _ in range(2))
        product = functools.partial(torch.mm, a, b)

    def call() -> float:
        product()
        return 2.0 * SIZE**3

    return call


def _best(call: Callable[[], float]) -> float:
    """1e9 operations per second, of the fastest of some calls: a peak is what the machine can do, not what it mostly
    does.
    """
    call()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        done = call()
        rates.append(done / (time.perf_counter() - start) / 1e9)
    return max(rates)


if __name__ == "__main__":
    main()
