"""Loads the native libraries, once, when first asked for; a failure is a sentence, never a traceback.

``fastres._C`` holds the CPU ops (``fastres_C::cpu_*``), ``_cuda.so`` the CUDA ops (``fastres_C::cuda_*``).
"""

import importlib
import json
import re
import threading
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_OLDEST_TORCH = (2, 11)  # the LibTorch stable ABI the bindings are built for
_lock = threading.Lock()
_refusals: dict[str, str | None] | None = None  # why not, by part; None until load() has run


def load() -> None:
    """Load whatever was built and this torch can run; thread-safe, and only the first call does anything."""
    global _refusals
    if _refusals is None:
        with _lock:
            if _refusals is None:
                _refusals = {"cpu": _load_cpu(), "cuda": _load_cuda()}


def why_not_cpu() -> str | None:
    """Why the native CPU ops cannot run, in one sentence; None where they can."""
    return _why_not("cpu")


def why_not_cuda() -> str | None:
    """Why the native CUDA ops cannot run, in one sentence; None where they are loaded, which takes no GPU."""
    return _why_not("cuda")


def why_not(name: str) -> str | None:
    """Why the native op of this name, ``cpu_add_act``, cannot run; None where ``op(name)`` is there."""
    reason = _why_not("cpu" if name.startswith("cpu_") else "cuda")
    if reason is None and not hasattr(torch.ops.fastres_C, name):
        return f"the native library was built without {name} (build fastres again)"
    return reason


def op(name: str) -> torch._ops.OpOverload:
    """The native op of this name, once ``why_not(name)`` has returned None."""
    return getattr(torch.ops.fastres_C, name).default


def build_info() -> dict:
    """What was built, with what (compiler, CUDA, architectures, torch, git revision), and why not the rest.

    Read from the library where it loads, else from the record that the installation left.
    """
    if why_not_cpu() is None:
        return importlib.import_module("fastres._C").build_info()
    return _record()


def cpu_features() -> dict:
    """The x86-64 ``level`` whose kernels run here, ``bf16_dot`` and ``int8_dot``; once ``why_not_cpu()`` said None."""
    return importlib.import_module("fastres._C").cpu_features()


def _why_not(part: str) -> str | None:
    load()
    assert _refusals is not None
    return _refusals[part]


def _record() -> dict:
    """The record of the build that setup.py leaves beside the package."""
    path = _PACKAGE / "_build_info.json"
    if path.is_file():
        return json.loads(path.read_text())
    reason = "fastres runs from a source folder in which nothing was built (pip install -e . builds there)"
    return {"built": [], "why_not": {"cpu": reason, "cuda": reason}}


def _not_built(part: str) -> str:
    reason = _record()["why_not"].get(part, "its file is missing, install fastres again")
    return f"the native {part.upper()} kernels were not built: {reason}"


def _old_torch() -> str | None:
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= _OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, _OLDEST_TORCH))
    return f"the native kernels need torch {oldest} or newer, got {torch.__version__} (pip install -U torch)"


def _load_cpu() -> str | None:
    if not any(_PACKAGE.glob("_C.*")):  # looked for only here: an editable install elsewhere may offer its own
        return _not_built("cpu")
    if reason := _old_torch():
        return reason
    try:
        importlib.import_module("fastres._C")
    except Exception as error:  # whatever a foreign binary does; the reason is kept and shown
        return _cannot_load("cpu", error)
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    library = _PACKAGE / "_cuda.so"
    if not library.is_file():
        return _not_built("cuda")
    if reason := _old_torch():
        return reason
    try:
        torch.ops.load_library(library)
    except Exception as error:  # as above
        return _cannot_load("cuda", error)
    return None


def _cannot_load(part: str, error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    advice = f"install fastres again, for torch {torch.__version__}"
    return f"the native {part.upper()} library cannot be loaded ({advice}): {first_line}"
