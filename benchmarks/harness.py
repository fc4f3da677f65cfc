"""What every benchmark shares: the machine, rivals of an op, parity before time, timing in turns, result files.

A result file holds the machine, the versions, the commit, the date and the rows; README's tables come from these files.
"""

import copy
import datetime
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import benchmarks
import fastres
from benchmarks.table import case_of, cases
from fastres import budget, files, info, timing, tune
from fastres.errors import ArgumentError
from fastres.experiments import rivals
from fastres.experiments.compare import Row, training_step
from fastres.experiments.rivals import FASTRES
from fastres.experiments.subject import Subject

ROOT = benchmarks.ROOT
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 1.0  # for the rivals of one row together
MOST_COPIES = 16  # of the arguments that a GPU row rotates through, so that none is found in the cache


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine_name(place: torch.device) -> str:
    """Folder of a machine's results: its GPU, or its processor and threads."""
    if place.type == "cuda":
        return tune.device_name(place)
    return tune.file_safe(f"{info.cpu_model()} {torch.get_num_threads()} threads")


def about(place: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date of a result file."""
    revision = os.environ.get("FASTRES_COMMIT") or _git("rev-parse", "HEAD")  # for a copy of the tree without its history
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else info.cpu_model(),
        **info.machine(), **info.versions(), "fastres": fastres.__version__, "pinned": benchmarks.PINNED,
        "commit": revision, "dirty": bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }  # fmt: skip


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def save(name: str, rows: list[Row], place: torch.device, folder: Path = RESULTS, **more: Any) -> Path:
    """Write the result file of this machine."""
    return write(folder / machine_name(place) / f"{name}.json", rows, place, **more)


def write(path: Path, rows: list[Row], place: torch.device, **more: Any) -> Path:
    """Write one result file, in one step; ``more`` goes before its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"name": path.stem, **about(place), **more, "rows": rows}
    files.replace(path, (json.dumps(data, indent=1) + "\n").encode())
    return path


def check_writable(place: torch.device, folder: Path = RESULTS) -> None:
    """Raise OSError where this machine's result files cannot be written: before minutes of work, not after."""
    (folder / machine_name(place)).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder / machine_name(place)):
        pass


def read(path: Path) -> dict[str, Any]:
    """What a result file holds.

    Raises:
        ArgumentError: it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"{path} must be a result file in JSON, got {error} (remove it, or take it from git)") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"{path} must be a result file, an object in JSON, got {type(data).__name__}")
    return data


def extend(name: str, rows: list[Row], place: torch.device, folder: Path = RESULTS) -> Path:
    """Write a result file that keeps the rows of other cases that this commit measured before on this machine."""
    measured = cases(rows)
    kept = [row for row in measured_before(name, place, folder) if case_of(row) not in measured]
    return save(name, [*kept, *rows], place, folder)


def measured_before(name: str, place: torch.device, folder: Path = RESULTS) -> list[Row]:
    """The rows of a result file, if this commit wrote it on this machine."""
    path, now = folder / machine_name(place) / f"{name}.json", about(place)
    if not path.is_file():
        return []
    before = read(path)
    return before["rows"] if all(before.get(key) == value for key, value in now.items() if key != "date") else []


class ParityError(AssertionError):
    """A result missed the error budget, so nothing was timed."""


def check_parity(what: str, actual: Any, same_dtype: Any, truth: Any, dtype: torch.dtype) -> None:
    """Raise ParityError unless every tensor is within budget."""
    for index, (found, expected, exact) in enumerate(zip(actual, same_dtype, truth, strict=True)):
        verdict = budget.within_budget(found, expected, exact, dtype)
        if not verdict.ok:
            raise ParityError(f"{what}, output {index}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")


def compiled(function: Callable, *args: Any) -> tuple[Callable | None, Row]:
    """torch.compile of a function, called once: the result and how long that took, or why it is missing."""
    rivals.forget_compiled()
    start = time.perf_counter()
    try:
        with rivals.COMPILE.settings():
            run = torch.compile(function, dynamic=False)
            run(*args)
    except Exception as error:  # the rival's own failure, of whatever type, is a row of the result
        return None, {"missing": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    return run, {"wait_s": time.perf_counter() - start}


def rows_of(
    common: Row, calls: Mapping[str, Callable], extra: Mapping[str, Row], place: torch.device, base: str = FASTRES,
    **options: Any,
) -> list[Row]:  # fmt: skip
    """Time calls in turns: one row each, with its ratio to fastres, and GB/s and GFLOP/s where ``bytes`` and ``flops`` are
    given.

    Args:
        common: what all rows share.
        calls: fastres and its rivals by name.
        extra: further entries of each row; a rival that is only here is missing.
        base: the rival to which ratios are taken.
    """
    times = timing.interleaved(calls, place, **{"seconds": SECONDS, **options})
    rows = []
    for name in dict.fromkeys((*calls, *extra)):
        row = {key: value for key, value in common.items() if key not in ("bytes", "flops")}
        row |= {"rival": name, **extra.get(name, {})}
        if name in times:
            measured = times[name]
            row |= {**measured.to_dict(), "ratio": measured.median / times[base].median}
            if "bytes" in common:
                row |= {
                    "gb_per_s": common["bytes"] / measured.median / 1e9,
                    "gflop_per_s": common["flops"] / measured.median / 1e9,
                }
        rows.append(row)
    return rows


def copy_peak(place: torch.device) -> float:
    """GB/s of a large copy, read and written: the memory peak that bandwidth-bound kernels are held against."""
    return timing.copy_peak(place, 1 << (30 if place.type == "cuda" else 28), 1.0) / 1e9


def matmul_peak(place: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large product: the peak that compute-bound kernels are held against."""
    return timing.matmul_peak(place, dtype, 8192 if place.type == "cuda" else 1024, 1.0) / 1e9


def rotated(run: Callable, args: tuple, place: torch.device) -> Callable[[], Any]:
    """The call on copies of its arguments in turn; on a GPU, more than its cache holds, so that none is found there."""
    size = sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor))
    cache = torch.cuda.get_device_properties(place).L2_cache_size if place.type == "cuda" else 0
    copies = [args]
    for _ in range(min(3 * cache // max(size, 1), MOST_COPIES - 1)):
        copies.append(tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
    turn = itertools.cycle(copies)
    return lambda: run(*next(turn))


def clocks(place: torch.device) -> dict[str, str] | None:
    """A GPU's clocks, power and temperature as its driver reports them; None where there is no GPU."""
    if place.type != "cuda":
        return None
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={place.index or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return None
    return dict(zip(fields.split(","), done.stdout.strip().split(", "), strict=False))


def refuse_wrong(rows: list[Row]) -> None:
    """Fail if fastres itself was refused for its error, or did not run."""
    for row in rows:
        if row["rival"] == FASTRES and "median_s" not in row:
            reason = row.get("missing") or f"error {row['error']:.3g}, allowed {row['allowed']:.3g}"
            raise ParityError(f"{row['name']} {row['pass']}: {reason}")


def show(benchmark: Any, subject: Subject, *, training: bool = False) -> None:
    """Run the optimised model a few times more for pytest-benchmark's own table."""
    model = copy.deepcopy(subject.model).train(training)
    run, x = rivals.OPTIMIZED.prepare(model, subject.x)
    with torch.set_grad_enabled(training):
        call = training_step(run, model, x) if training else lambda: run(x)
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
