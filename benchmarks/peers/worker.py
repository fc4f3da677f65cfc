"""The process of one way: makes it ready, judges its first result, then times calls whenever it is told to.

It gets its order as JSON on the command line. Its first line on stdout says what became of that; then it answers every line on
stdin with what a batch of calls took. What libraries print goes to stderr.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.peers.ways import DTYPES, Task
from fastres import budget, terminal
from fastres.experiments.subject import Subject, load

CALIBRATION_IMAGES = 32
INT8_ALLOWED = 1.5e-2  # relative to the root mean square of the logits; PyTorch has no int8 result to be held against
SETTLE_S = 0.01  # of calls before the clock starts: threads are asleep, and the caches hold another way's weights
LONG_S = 0.3  # a call so long that this does not matter
BATCH_S = 0.05  # a batch lasts about as long, or is one call


def answers() -> TextIO:
    """The real stdout; from now on what is printed goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def main() -> None:
    channel, order = answers(), json.loads(sys.argv[1])
    with torch.no_grad():
        try:
            call, row = ready(order)
        except Exception as error:  # a peer's own failure, of whatever type, is a row of the result
            print(json.dumps({"missing": reason(error)}), file=channel)
            return
        estimate = timed(call, 1)
        calls = max(1, math.floor(BATCH_S / estimate))
        print(json.dumps({**row, "calls": calls, "estimate_s": estimate}), file=channel)
        for _ in sys.stdin:
            print(json.dumps(batch(call, calls, estimate)), file=channel)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def ready(order: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The call, and the row so far: seconds for imports, seconds from the model to the first result, parity."""
    start = time.perf_counter()
    terminal.need(order["way"], *order["packages"], extra="bench")
    module, _, maker = order["maker"].partition(":")
    make = getattr(importlib.import_module(module), maker)
    imported = time.perf_counter() - start
    subject = load(order["model"], batch=order["batch"], size=order["size"], device="cpu")
    dtype = DTYPES[order["dtype"]]
    batches = calibration(subject) if dtype == torch.int8 else []
    task = Task(subject.model, subject.x, dtype, torch.get_num_threads(), batches)
    start = time.perf_counter()
    call, result = make(task)
    row: dict[str, Any] = {"import_s": imported, "wait_s": time.perf_counter() - start}
    found = torch.as_tensor(result).double().clone()
    return call, {**row, **judge(found, torch.load(order["truth"], weights_only=True), order["dtype"])}


def calibration(subject: Subject) -> list[Tensor]:
    """Batches of images other than those that are timed."""
    generator = torch.Generator().manual_seed(3)
    count = math.ceil(CALIBRATION_IMAGES / len(subject.x))
    return [torch.randn(subject.x.shape, generator=generator) for _ in range(count)]


def judge(actual: Tensor, reference: dict[str, Tensor], dtype: str) -> dict[str, Any]:
    """Error against float64, and that of eager PyTorch at the same dtype where it has one."""
    truth = reference["truth"]
    if dtype in reference:
        verdict = budget.within_budget(actual, reference[dtype], truth, DTYPES[dtype])
        beside = {"torch_rms": budget.error(reference[dtype], truth)}
    else:
        same = actual.shape == truth.shape and budget.same_classes(actual, truth)
        error = budget.error(actual, truth) if same else math.inf
        verdict, beside = budget.Verdict(error <= INT8_ALLOWED, error, INT8_ALLOWED), {}
    rms = budget.error(actual, truth) if actual.shape == truth.shape else math.inf
    return {"ok": verdict.ok, "error": verdict.error, "allowed": verdict.allowed, "rms": rms, **beside}


def batch(call: Callable[[], Any], calls: int, estimate: float) -> dict[str, float]:
    """Seconds per call of one batch, after calls that nobody times; and the cores that others kept busy meanwhile."""
    start = time.perf_counter()
    while estimate < LONG_S and time.perf_counter() - start < SETTLE_S:
        call()
    everyone, own = busy(), time.process_time()
    seconds = timed(call, calls)
    others = busy() - everyone - (time.process_time() - own)
    return {"seconds": seconds, "others": others / (seconds * calls)}


def timed(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def busy() -> float:
    """Seconds that the machine's cores have worked for anyone, or were taken by other machines; NaN where it does not
    tell.
    """
    listing = Path("/proc/stat")
    if not listing.is_file():
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, listing.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
