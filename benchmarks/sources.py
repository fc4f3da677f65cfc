"""The source of one op's kernels on one backend, and a hash of it: a result holds for the source that it was measured on."""

import ast
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import benchmarks
from fastres.dispatch import family

ROOT = benchmarks.ROOT
CSRC, PACKAGE = ROOT / "csrc", ROOT / "fastres"
ROOMS = {
    "cuda": CSRC / "cuda",
    "cuda_wide": CSRC / "cuda",
    "cuda_cluster": CSRC / "cuda",
    "triton": PACKAGE / "kernels" / "triton",
    "cudnn": PACKAGE / "ops",
}
STEMS = {"cuda_wide": "conv_wide", "cuda_cluster": "bn_cluster"}  # of the files of backends that several ops share


def fingerprint(op: str, backend: str) -> str:
    """A hash over the files of ``files(op, backend)`` and their names."""
    digest = hashlib.sha256()
    for path in files(op, backend):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def files(op: str, backend: str) -> list[Path]:
    """Everything in this repository that decides what the backend's kernels of an op compute, in order."""
    if backend in STEMS:
        found = closure([ROOMS[backend] / f"{STEMS[backend]}.cpp"], included)
    elif backend == "cuda":
        stem = module(op).replace("_add_conv_bn", "")  # one kernel: what it adds is optional
        stems = (stem, "conv") if stem == "conv_bn_act" else (stem,)  # which has the kernels for few input channels
        found = closure([ROOMS["cuda"] / f"{name}.cpp" for name in stems], included)
    else:
        name = "_conv_cudnn.py" if backend == "cudnn" else f"{module(op)}.py"
        found = closure([ROOMS[backend] / name], imported)
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise LookupError(f"no source of {op} on {backend}: {missing}")
    return sorted(found)


def module(op: str) -> str:
    """The stem of the files of an op: that of its forward; both convolutions share one, and so do both chains of them."""
    shared = {"conv_bn_add_act": "conv_bn_act", "conv_bn_act_conv_bn_add_act_conv_bn_act": "conv_bn_act_conv_bn_add_act"}
    return shared.get(family(op), family(op))


def closure(start: list[Path], leads_to: Callable[[Path], list[Path]]) -> set[Path]:
    """The files and all that they lead to."""
    found: set[Path] = set()
    waiting = list(start)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += leads_to(path)
    return found


def included(path: Path) -> list[Path]:
    """What a C++ file includes of this repository; the header of launchers leads to their kernels."""
    names = re.findall(r'^#include "(.+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    found = [CSRC / name for name in names]
    stems = [header.stem for header in found if header.parent == ROOMS["cuda"]]
    names = [name for stem in stems for name in (stem, f"{stem}_backward", f"sm90_{stem}")]
    kernels = [ROOMS["cuda"] / f"{name}_kernel.cu" for name in names]
    return found + [kernel for kernel in kernels if kernel.is_file()]


def imported(path: Path) -> list[Path]:
    """What a module imports of the folder that it lies in."""
    room = ".".join(path.parent.relative_to(ROOT).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(room):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            paths = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
            found += [p for p in paths if p.parent == path.parent and p.is_file()]
    return found
