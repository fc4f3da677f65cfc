"""``fastres info``, for bug reports: versions, devices, what was built, and per op and backend whether it runs or why not."""

import functools
import importlib.metadata
import itertools
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastres
from fastres import env, tune
from fastres.dispatch import GPU_KERNELS, Backend
from fastres.kernels import native
from fastres.ops import REGISTRY
from fastres.ops._op import Op


def collect() -> dict[str, Any]:
    """All of it as plain data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "fastres": fastres.__version__,
        **versions(),
        "device": tune.device_name(device),
        "machine": machine(),
        "build": native.build_info(),
        "ops": {name: {b.name: status(op, b) for b in op.backends} for name, op in sorted(REGISTRY.items())},
        "cache": {
            "directory": str(env.cache_dir()),
            "files": [str(p) for p in sorted(env.cache_dir().glob("*.json"))],
        },
        "environment": env.overrides(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, torch, CUDA, driver, nvcc and triton; None for what is not here."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _said("nvidia-smi", ("--query-gpu=driver_version", "--format=csv,noheader"), r"[\d.]+"),
        "nvcc": _said("nvcc", ("--version",), r"release ([\d.]+)"),
        "triton": _triton(),
    }


def machine() -> dict[str, Any]:
    """Processor, threads torch uses, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability() + (" with AMX" if torch.cpu._is_amx_tile_supported() else ""),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": gpus,
    }


@functools.cache
def cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", listing.read_text()) if listing.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def status(op: Op, backend: Backend) -> str:
    """Over the op's samples: ``live`` (and what is missing for it to be chosen), or why the backend cannot run here."""
    cuda = torch.cuda.is_available()
    interpreted = backend.name == "triton" and env.triton_interpret()
    if backend.name in GPU_KERNELS and not cuda and not interpreted:
        missing = {"triton": triton_missing, "cudnn": lambda: None}.get(backend.name, native.why_not_cuda)
        return missing() or "torch sees no CUDA device"
    on_gpu = cuda and not interpreted and backend.name not in ("cpu", "onednn")
    device = torch.device("cuda" if on_gpu else "cpu")
    reasons: list[str | None] = []
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), (lambda arg: arg, _channels_last)):
        reasons += [backend.why_not(*map(layout, sample.args)) for sample in op.samples(device, dtype)]
    if None not in reasons:
        return next(reason for reason in reasons if reason is not None)
    if backend.name in GPU_KERNELS and (unproven := tune.why_not_validated(op.name, backend.name, device)):
        return f"live when forced: {unproven}"
    return "live in the interpreter" if interpreted else "live"


def _channels_last(value: Any) -> Any:
    image = isinstance(value, torch.Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if image else value


def triton_missing() -> str | None:
    return None if _triton() else "the package triton is not installed"


def live(backend: str) -> bool:
    """Whether some op runs on this backend here."""
    found = (status(op, b) for op in REGISTRY.values() for b in op.backends if b.name == backend)
    return any(text.startswith("live") for text in found)


def text(data: dict[str, Any]) -> str:
    """The same for people."""
    build, hardware = data["build"], data["machine"]
    absent = {
        "cuda": "built without CUDA",
        "driver": "no GPU driver",
        "nvcc": "not found",
        "triton": "not installed",
    }
    lines = [f"fastres {data['fastres']}"]
    lines += [f"  {name:9} {data[name] or absent[name]}" for name in ("python", "torch", *absent)]
    lines.append(f"  {'cpu':9} {hardware['cpu']}, {hardware['threads']} threads, {hardware['capability']}")
    lines += [f"  {'gpu':9} {name}" for name in hardware["gpus"] or ["none"]]
    lines.append("native libraries")
    for part in ("cpu", "cuda"):
        built = part in build["built"]
        detail = f"sm {' '.join(build['cuda_archs'])}" if part == "cuda" and built else build.get("compiler") or ""
        lines.append(
            f"  {part:9} " + (f"built ({detail})" if built else f"not built: {build['why_not'].get(part, '')}")
        )
    if build.get("git"):
        lines.append(f"  {'revision':9} {build['git']}")
    lines.append("ops")
    lines += _op_lines(data["ops"])
    lines.append("tuning cache")
    files = ", ".join(Path(path).name for path in data["cache"]["files"])
    lines.append(f"  {data['cache']['directory']}: {files or 'empty'}")
    lines.append("environment")
    lines += [f"  {name}={value}" for name, value in data["environment"].items()] or ["  no variable of fastres is set"]
    return "\n".join(lines)


def _op_lines(ops: dict[str, dict[str, str]]) -> list[str]:
    """A line per op with its live backends, then every reason once, with the ops it holds for."""
    lines: list[str] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, backends in ops.items():
        lines.append(f"  {name:24} " + " ".join(b for b, state in backends.items() if state.startswith("live")))
        for backend, state in backends.items():
            if state != "live":
                reasons.setdefault((backend, _general(state)), []).append(name)
    for (backend, state), names in reasons.items():
        everywhere = len(names) == sum(backend in backends for backends in ops.values())
        lines.append(f"  {backend}{'' if everywhere else ' (' + ', '.join(names) + ')'}: {state}")
    return lines


def _general(state: str) -> str:
    """A reason without the op's own example, so that equal reasons share one line."""
    return re.sub(r", or force it with fastres\.use\([^)]*\)", "", state)


@functools.cache
def _said(program: str, arguments: tuple[str, ...], pattern: str) -> str | None:
    """What the pattern finds in a program's output; None where the program is absent or fails."""
    path = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout) if done.returncode == 0 else None
    return found[1 if found.re.groups else 0] if found else None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
