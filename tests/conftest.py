"""Lanes: which are live here, and how many cases each one skipped and why."""

import collections
import contextlib
import ctypes
import gc
import os
from pathlib import Path

# Threads of OpenMP that wait for work sleep: where more processes run than there are cores, as in `make test`, those that
# turn round instead take the time of the others. Before torch, which starts them, and for all programs that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fastres import env
from fastres.kernels import native

MOST = 2 << 30  # bytes that the process may hold before what tests left behind is looked for
GROWTH = 1 << 29  # and how many more than then remained, before it is again: it takes a third of a second
ALLOWED = pytest.StashKey[int]()
FAILED = pytest.StashKey[bool]()
LANES = ("none", "cpu", "triton_interpreter", "compile", "cuda")


def _lanes() -> dict[str, str]:
    """Per lane ``live`` or the reason it is not."""
    interpreted = env.triton_interpret()
    elsewhere = "TRITON_INTERPRET=1 is set, this run is the interpreter's"
    return {
        "none": elsewhere if interpreted else "live",
        "cpu": elsewhere if interpreted else native.why_not_cpu() or "live",
        "triton_interpreter": "live" if interpreted else "runs by itself with TRITON_INTERPRET=1",
        "compile": elsewhere if interpreted else "live",
        "cuda": "live" if torch.cuda.is_available() else "no CUDA device",
    }


def pytest_configure(config: pytest.Config) -> None:
    if env.triton_interpret():
        with contextlib.suppress(ImportError):  # without Triton its tests are skipped
            import _interpreter

            _interpreter.hasten()
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other; tests of threading set their own


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"lane {name}: {state}" for name, state in _lanes().items()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lanes = _lanes()
    for item in items:
        for name in LANES:
            if item.get_closest_marker(name) and lanes[name] != "live":
                item.add_marker(pytest.mark.skip(reason=f"lane {name}: {lanes[name]}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # modules and thousands of tests stay to the end: no collection need walk them again
    gc.set_threshold(10_000, 10, 10)  # nor as often as by default what many networks leave, most of which stays


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What large networks leave in cycles and in the allocator, ten gigabytes in the end, goes back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # neither Linux nor glibc
        if resident() > item.config.stash.get(ALLOWED, MOST):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            item.config.stash[ALLOWED] = max(MOST, resident() + GROWTH)


def is_lost() -> bool:
    """Whether a kernel broke the CUDA context, and with it all that follows in this process."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """With pytest-xdist another process goes on behind a test that broke the context."""
    stash = item.config.stash
    stash[FAILED] = call.excinfo is not None or (call.when != "setup" and stash.get(FAILED, False))
    if call.when == "teardown" and stash[FAILED] and "PYTEST_XDIST_WORKER" in os.environ and is_lost():
        os._exit(1)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons: collections.Counter = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
