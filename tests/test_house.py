"""The rules of CONTRIBUTING.md that a machine can check: sizes, layers, names, smells."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAPS = {".py": 400, ".cu": 600, ".cpp": 400, ".h": 250, ".cuh": 250}
FUNCTION_CAP = 60
SETUP_CAP = 180


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def python_files(*folders):
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_files_can_be_read_in_one_sitting():
    long = []
    for path in tracked():
        cap = SETUP_CAP if relative(path) == "setup.py" else CAPS.get(path.suffix)
        if cap is not None and (lines := len(path.read_text().splitlines())) > cap:
            long.append(f"{relative(path)}: {lines} lines, at most {cap}")
    assert not long, "\n".join(long)


def test_functions_fit_a_screen():
    long = []
    for path in python_files("fastres", "benchmarks", "tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_CAP:
                    long.append(f"{relative(path)}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_CAP}")
    assert not long, "\n".join(long)


LAYERS = {
    # room: what it may not import
    "fastres/kernels": ("fastres.ops", "fastres.functional", "fastres.dispatch", "fastres.nn", "fastres.optimize"),
    "fastres/dispatch.py": ("fastres.ops", "fastres.functional", "fastres.nn", "fastres.models", "fastres.optimize"),
    "fastres/tune.py": ("fastres.ops", "fastres.functional", "fastres.dispatch", "fastres.nn", "fastres.optimize"),
    "fastres/ops": ("fastres.functional", "fastres.nn", "fastres.models", "fastres.optimize"),
    "fastres/functional.py": ("fastres.nn", "fastres.models", "fastres.optimize"),
    "fastres/nn": ("fastres.models", "fastres.optimize"),
    "fastres/models": ("fastres.optimize",),
    "fastres/train": ("fastres.optimize", "fastres.experiments"),
    "fastres": ("benchmarks", "tests"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", list(LAYERS))
def test_layers_import_downward(room):
    wrong = []
    for path in python_files("fastres"):
        if relative(path) == room or relative(path).startswith(f"{room}/"):
            for name in imports(path):
                if any(name == lower or name.startswith(f"{lower}.") for lower in LAYERS[room]):
                    wrong.append(f"{relative(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_include_no_torch_header():
    kernels = [
        p for p in tracked() if p.name.endswith(("_kernel.cu", "_kernel.cpp")) or "csrc/cuda/device" in relative(p)
    ]
    wrong = [relative(p) for p in kernels if re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())]
    assert kernels and not wrong, wrong


SMELLS = {
    "a silenced import": r"except (ImportError|ModuleNotFoundError):\s*\n\s*pass",
    "a bare except": r"except:\s",
    "equal_nan": "equal_" + "nan=True",
    "unfinished work": r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
    "fast math": "use_fast_" + "math",
    "a machine path": r"/(home|root|work)/",
}


@pytest.mark.parametrize("smell", list(SMELLS))
def test_no_smells(smell):
    pattern = re.compile(SMELLS[smell])
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh", ".toml", ".md", ""}
    found = [
        f"{relative(path)}: {match.group(0).strip()!r}"
        for path in tracked()
        if path.suffix in suffixes and path.name not in ("test_house.py", "LICENSE")
        for match in [pattern.search(path.read_text(errors="replace"))]
        if match
    ]
    assert not found, "\n".join(found)


def test_the_environment_is_read_in_one_place():
    readers = [relative(p) for p in python_files("fastres") if re.search(r"os\.(environ|getenv)", p.read_text())]
    assert readers == ["fastres/env.py"]


def test_no_file_is_called_by_nothing():
    assert not [relative(p) for p in tracked() if p.stem in ("utils", "util", "helpers", "misc")]


def test_an_op_has_its_stem_in_every_room():
    from fastres.dispatch import family
    from fastres.ops import REGISTRY

    for op in REGISTRY.values():
        stem = family(op.name)
        assert (ROOT / f"fastres/ops/{stem}.py").is_file()
        names = {backend.name for backend in op.backends}
        for backend, room in (("cpu", f"csrc/cpu/{stem}.cpp"), ("cuda", f"csrc/cuda/{stem}_kernel.cu")):
            room = room.replace("_add_act_conv_bn_act", "_add_act")  # one kernel, what follows is optional
            shared = room.replace("_add_conv_bn", "").replace("_add_", "_")  # as is what it adds
            alone = [path.replace("cuda/", "cuda/sm90_") for path in (room, shared)]  # for one architecture
            if backend in names:
                assert any((ROOT / path).is_file() for path in (room, shared, *alone)), f"{op.name}: {room} is missing"


def test_importing_is_light():
    code = (
        "import sys, fastres; print([m for m in ('triton', 'torchvision', 'timm', 'fastres._C') if m in sys.modules])"
    )
    import sys

    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]" and not shown.stderr
