"""The one place that reads the environment."""

import os
import sys
from pathlib import Path


def forced_backend() -> dict[str, str]:
    """Backends forced by ``FASTRES_BACKEND``: ``{"*": "torch"}`` for ``torch``, ``{"add_act": "cpu"}`` for ``add_act=cpu``.

    The variable is a comma-separated list of ``backend`` (for every op that has it) or ``op=backend``.
    """
    forced = {}
    for entry in filter(None, (part.strip() for part in os.environ.get("FASTRES_BACKEND", "").split(","))):
        op, _, backend = entry.rpartition("=")
        forced[op.strip() or "*"] = backend.strip()
    return forced


def triton_interpret() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def cache_dir() -> Path:
    """Directory of the tuning cache: ``FASTRES_CACHE_DIR``, else ``fastres`` in the user's cache directory."""
    explicit = os.environ.get("FASTRES_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in some containers: nothing is found below this, and storing says so
        home = Path(os.devnull)
    default = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(base) if base else default) / "fastres"


def torchrun() -> tuple[int, int, int] | None:
    """This process's number, how many there are, and its number on this machine, where ``torchrun`` started it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return None
    rank, world, local = (int(os.environ[name]) for name in names)
    return rank, world, local


def overrides() -> dict[str, str]:
    """Every environment variable set now that changes what fastres does, for ``fastres info``."""
    names = ("FASTRES_BACKEND", "FASTRES_CACHE_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME")
    return {name: os.environ[name] for name in names if name in os.environ}
