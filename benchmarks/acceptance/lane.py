"""What runs besides the tasks: the build, the tests of a lane, the kernels under compute-sanitizer."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import benchmarks
from benchmarks.acceptance.run import OUT_OF_TIME, Budget, say
from fastres.experiments.compare import Row

ROOT = benchmarks.ROOT
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
GRACE_S = 20.0  # for pytest to write its report once it is interrupted
TEST_S = 150.0  # of one test: some compile a kernel for every tile; a process that needs longer is replaced


def build(place: torch.device, budget: Budget) -> list[Row]:
    """Build the CUDA library for this GPU where it is missing or older than its sources."""
    library = ROOT / "fastres" / "_cuda.so"
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    if library.is_file() and library.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return []
    major, minor = torch.cuda.get_device_capability(place)
    arch = f"{major}{minor}{'a' if major == 9 else ''}"  # as among csrc/toolchain.py's defaults
    say(f"building the CUDA kernels for sm_{arch}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTRES_BUILD": "cuda", "FASTRES_CUDA_ARCHS": arch}
    return [{"name": "build", **outcome(command, environment, budget)}]


def tests(lane: str, budget: Budget, where: tuple[str, ...] = ("tests",)) -> list[Row]:
    """pytest on one lane: how many tests passed, were skipped, and the names of those that failed."""
    row: Row = {"name": f"tests of the lane {lane}"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *where, "-m", lane, "-q", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:  # most of the time goes to compiling what is tested
            command += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
            if importlib.util.find_spec("pytest_timeout") is not None:  # no interrupt reaches who waits for a kernel
                command += ["--timeout", f"{TEST_S:.0f}", "--timeout-method", "thread"]
        row |= outcome([*command, f"--junitxml={report}", "--tb=line"], dict(os.environ), budget)
        if not report.is_file():
            return [row | {"ok": False}]
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [f"{c.get('classname')}.{c.get('name')}" for c in cases if {e.tag for e in c} & {"failure", "error"}]
    skipped = sum(any(e.tag == "skipped" for e in c) for c in cases)
    passed = len(cases) - len(failed) - skipped
    return [row | {"ok": row["ok"] and passed > 0, "passed": passed, "skipped": skipped, "failed": failed}]


def sanitized(budget: Budget) -> list[Row]:
    """A few calls of every kernel under each tool of compute-sanitizer; a missing tool is a row."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    rows: list[Row] = []
    for tool in TOOLS:
        row: Row = {"name": f"compute-sanitizer {tool}"}
        if program is None:
            rows.append(row | {"missing": "compute-sanitizer is not installed"})
            continue
        command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.acceptance.smoke"]
        # Without torch's cache every tensor has an allocation of its own, whose ends are checked.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        rows.append(row | outcome(command, environment, budget.share(1 / (len(TOOLS) - TOOLS.index(tool)))))
    return rows


def outcome(command: list[str], environment: dict[str, str], budget: Budget) -> Row:
    """Run a program for as long as the time allows: whether it succeeded, else the end of its output."""
    say(f"{budget.left():4.0f} s left: {' '.join(command[:4])} ...")
    pipes: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes) as program:
        try:
            said, _ = program.communicate(timeout=max(budget.left(), 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGINT)  # the whole group, of which some leave a report behind
            try:
                said, _ = program.communicate(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                said, _ = program.communicate()
            return {"ok": False, "failure": OUT_OF_TIME}
    words = said.strip().splitlines()
    return {"ok": True} if program.returncode == 0 else {"ok": False, "failure": " / ".join(words[-3:])[-400:]}
