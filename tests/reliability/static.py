"""R26: what programs that read code find: ruff with its security rules, mypy, bandit, clang-tidy, pip-audit.

A tool that is not installed is not run, and said so; ``pip install bandit clang-tidy pip-audit`` brings the optional ones.
"""

# ruff: noqa: E501

import ast
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from reliability.board import Tally, scored
from reliability.instrumented import recipes

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "fastres", ROOT / "csrc", ROOT / "setup.py"]
# What bandit may find, and where; everything else fails. Every call of a program is a list of words, without a shell.
ACCEPTED = {
    "B101": None,  # assert: judged by only_narrows below
    "B404": ("setup.py", "toolchain.py", "info.py"),  # imports subprocess: to build, and to ask nvidia-smi and nvcc
    "B603": ("setup.py", "toolchain.py", "info.py"),
    "B311": ("data.py", "images.py"),  # random orders of images, the same again for the same seed: no secrets
    "B403": ("cifar.py",),  # imports pickle: a reader that answers five names with stand-ins and refuses all others
}


def python_files() -> list[Path]:
    return sorted(path for place in SHIPPED for path in ([place] if place.is_file() else place.rglob("*.py")))


def tool(name: str) -> str | None:
    """A program beside the running Python, or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def said(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=1800)


def ruff(tally: Tally) -> None:
    done = said(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", *SHIPPED)
    findings = json.loads(done.stdout)
    tally.tried += len(python_files())
    for found in findings:
        tally.fail(f"ruff: {found['filename']}:{found['location']['row']} {found['code']} {found['message']}")


def only_narrows(tally: Tally) -> None:
    """An assert tells mypy what a value is not, or is; none checks what a user gave, for ``python -O`` leaves it out."""
    for path in python_files():
        with tally.case(f"asserts of {path}"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Assert):
                    narrows = isinstance(node.test, (ast.Compare, ast.BoolOp)) and node.msg is None
                    calls = any(isinstance(part, ast.Call) for part in ast.walk(node.test))
                    assert narrows and not calls, f"line {node.lineno}: {ast.unparse(node.test)}"


def mypy(tally: Tally) -> None:
    done = said(sys.executable, "-m", "mypy", "--no-error-summary")
    tally.tried += len(list((ROOT / "fastres").rglob("*.py")))
    for line in done.stdout.splitlines() or [done.stderr] * (done.returncode != 0):
        tally.fail(f"mypy: {line}")


def bandit(tally: Tally) -> None:
    done = said(sys.executable, "-m", "bandit", "-q", "-r", "-f", "json", *SHIPPED)
    tally.tried += len(python_files())
    for found in json.loads(done.stdout)["results"]:
        places = ACCEPTED.get(found["test_id"], ())
        if places is not None and Path(found["filename"]).name not in places:
            tally.fail(f"bandit: {found['filename']}:{found['line_number']} {found['test_id']} {found['issue_text']}")


def clang_tidy(tally: Tally) -> None:
    """Every source of the CPU library, kernels at the highest level, by the checks of csrc/.clang-tidy."""
    flags = [*recipes().CXX_FLAGS, "-isystem", Path(torch.__file__).parent / "include"]
    for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        level = ["-DFASTRES_CPU_LEVEL=4", "-march=x86-64-v4"] if path.stem.endswith("_kernel") else []
        with tally.case(f"clang-tidy {path.name}"):
            done = said(tool("clang-tidy"), "--quiet", path, "--", *flags, *level)
            found = [line for line in done.stdout.splitlines() if " error: " in line or " warning: " in line]
            assert done.returncode == 0 and not found, "; ".join(found[:3]) or done.stderr[-300:]


def pip_audit(tally: Tally) -> None:
    """Known faults of the versions of what fastres needs."""
    needs = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "safetensors")]
    for need in needs:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-f", "json", "-r", "/dev/stdin"],
            input=need, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        rows = json.loads(done.stdout or "{}").get("dependencies", [])
        if not rows or any("skip_reason" in row for row in rows):
            tally.note(f"pip-audit of {need}: its database cannot be reached")
            continue
        with tally.case(f"pip-audit {need}"):
            assert not any(row["vulns"] for row in rows), done.stdout[:500]


# Tool, what it is called as a module or program, whether the short profile runs it too
TOOLS: list[tuple[str, Callable[[Tally], None], str, bool]] = [
    ("ruff", ruff, "ruff", True), ("asserts", only_narrows, "ast", True), ("bandit", bandit, "bandit", True),
    ("mypy", mypy, "mypy", False), ("clang-tidy", clang_tidy, "clang-tidy", False), ("pip-audit", pip_audit, "pip_audit", False),
]  # fmt: skip


@scored("R26", "static: ruff with security rules, mypy, bandit, clang-tidy, pip-audit", full=300, short=200)
def static(tally: Tally, count: int) -> None:
    for name, tries, module, always in TOOLS:
        if count < 300 and not always:
            continue
        if importlib.util.find_spec(module) or tool(module):
            tries(tally)
        else:
            tally.note(f"{name} is not installed")
