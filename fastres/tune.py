"""What tuning found: validated architectures and fastest backends, shipped as data and kept in the user's cache."""

import functools
import json
import os
import re
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fastres import env, files
from fastres.errors import UnsupportedError

FORMAT = 1
SECTIONS = ("validated", "failed")  # per architecture and backend, the ops that kept or missed the error budget
_SHIPPED = Path(__file__).parent / "tuned"
_warned: set[str] = set()


def device_name(device: torch.device) -> str:
    """Name of a device as it stands in file names and keys: ``cpu`` or ``nvidia-h200``."""
    if device.type != "cuda":
        return device.type
    return file_safe(torch.cuda.get_device_name(device))


def file_safe(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def architecture(device: torch.device) -> str:
    """Architecture a kernel is validated for: ``sm_90``, or the device type where there is no compute capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def cache_file(device: torch.device) -> Path:
    """The user's tuning file for one device."""
    return env.cache_dir() / f"{device_name(device)}.json"


def key(op: str, args: tuple) -> str:
    """Key of a tuned choice: op, then per argument its dtype, layout and shape (batch in powers of two) or its value."""
    parts = [op]
    batch = next((arg.shape[0] for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 4), None)
    for arg in args:
        if isinstance(arg, torch.Tensor):
            shape = list(arg.shape)
            if len(shape) == 4 and shape[0] == batch:  # an image; weights have as many filters as they have
                shape[0] = 1 << max(shape[0] - 1, 0).bit_length()
            layout = "cl" if arg.dim() == 4 and not arg.is_contiguous() and arg.stride(1) == 1 else "c"
            parts.append(f"{str(arg.dtype).removeprefix('torch.')}:{layout}:{'x'.join(map(str, shape))}")
        else:
            parts.append(repr(list(arg) if isinstance(arg, tuple) else arg))
    return "|".join(parts)


def _check(data: Any) -> dict:
    """Return data if it has the form of a tuning file, else raise ValueError saying what is wrong."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT}")
    data.setdefault("failed", {})
    for section in (*SECTIONS, "choices"):
        if not isinstance(data.get(section), dict):
            raise ValueError(f"{section} must be an object")
    for section in SECTIONS:
        for name, backends in data[section].items():
            if not isinstance(backends, dict):
                raise ValueError(f"{section}[{name!r}] must be an object of backend: [ops]")
            for backend, ops in backends.items():
                if not isinstance(ops, list) or not all(isinstance(op, str) for op in ops):
                    raise ValueError(f"{section}[{name!r}][{backend!r}] must be a list of op names")
    for name, choice in data["choices"].items():
        if not isinstance(choice, dict) or not isinstance(choice.get("backend"), str):
            raise ValueError(f"choices[{name!r}] must be an object with a backend")
        config = choice.get("config", [])
        if not isinstance(config, list) or not all(isinstance(number, (int, float)) for number in config):
            raise ValueError(f"choices[{name!r}]['config'] must be a list of numbers")
    return data


def read(path: Path) -> dict:
    """Read one tuning file; raises ValueError with the reason where it is corrupt or others could have written it."""
    try:
        if path.parent != _SHIPPED:
            _check_ownership(path)
        if path.stat().st_size > 1 << 24:
            raise ValueError("larger than 16 MiB")
        return _check(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a fastres tuning file: {error}") from None


def _check_ownership(path: Path) -> None:
    """Accept only the user's own plain file, in a directory that nobody else can write to."""
    if not hasattr(os, "getuid"):  # no POSIX owners here
        return
    for place in (path.parent, path):
        status = place.lstat() if place is path else place.stat()
        if stat.S_ISLNK(status.st_mode):
            raise ValueError("it is a symbolic link")
        if place is path and not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a plain file")  # opening a pipe would block
        if status.st_uid != os.getuid():
            raise ValueError(f"{place} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"others may write to {place} (chmod go-w)")


def _read_or_warn(path: Path) -> dict | None:
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):  # the latter where the home is a file, such as the null device
        return None
    except (ValueError, OSError) as error:
        _warn_once(f"fastres: the tuning cache is ignored: {error} (delete it to tune again)")
        return None


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


@functools.lru_cache(maxsize=16)
def _table(device: torch.device) -> tuple[dict, dict]:
    """What is validated on the device's architecture, and tuned choices: the shipped ones, overridden by the user's."""
    validated: dict[str, set[str]] = {}
    choices: dict[str, dict] = {}
    arch = architecture(device)
    for path in (_SHIPPED / "validated.json", _SHIPPED / f"{device_name(device)}.json", cache_file(device)):
        data = _read_or_warn(path)
        if data is None or data.get("torch", torch.__version__) != torch.__version__:
            continue
        for backend, ops in data["validated"].get(arch, {}).items():
            validated.setdefault(backend, set()).update(ops)
        for backend, ops in data["failed"].get(arch, {}).items():
            validated.get(backend, set()).difference_update(ops)
        choices.update(data["choices"])
    return validated, choices


def forget() -> None:
    """Drop what was read, so that the files are read again at the next choice."""
    _table.cache_clear()


def choice(op: str, args: tuple, device: torch.device) -> tuple[str | None, tuple | None]:
    """The backend that tuning found fastest for these arguments on this device, and its configuration; None where none."""
    found = _table(device)[1].get(key(op, args))
    if found is None:
        return None, None
    return found["backend"], tuple(found["config"]) if "config" in found else None


def why_not_validated(op: str, backend: str, device: torch.device) -> str | None:
    """Refuse a GPU kernel by default until a device of this architecture has validated it."""
    if device.type != "cuda" or op in _table(device)[0].get(backend, ()):
        return None
    return (
        f"this kernel is not validated on {architecture(device)} "
        f"(validate it here with `fastres tune`, or force it with fastres.use({op}={backend!r}))"
    )


def warn_if_none_is_validated(device: torch.device) -> None:
    """Say once where a GPU runs PyTorch's operations alone, because no kernel is validated on its architecture."""
    if device.type == "cuda" and not _table(device)[0]:
        _warn_once(
            f"fastres: none of its kernels is validated on {architecture(device)} yet, so PyTorch's own operations run on "
            f"{torch.cuda.get_device_name(device)}; validate them once with `fastres tune MODEL` (fastres.explain says more)"
        )


def check_writable(device: torch.device) -> None:
    """Raise now what ``store`` would: UnsupportedError where the user's cache is corrupt, not theirs or read-only."""
    _stored(cache_file(device))


def _stored(path: Path) -> dict:
    """What the cache holds for this version of torch; an empty one where there is none."""
    fresh: dict = {"format": FORMAT, "torch": torch.__version__, "validated": {}, "failed": {}, "choices": {}}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            old = read(path)
    except FileNotFoundError:
        return fresh  # the first result of this device
    except ValueError as error:
        raise UnsupportedError(f"fastres.tune: {error}; it is left as it is (move it away to store results)") from None
    except OSError as error:
        advice = "set FASTRES_CACHE_DIR to a folder of yours"
        raise UnsupportedError(f"fastres.tune: nothing can be stored in {path.parent}: {error} ({advice})") from None
    return old if old.get("torch") == torch.__version__ else fresh


def store(
    device: torch.device,
    validated: dict[str, list[str]],
    choices: dict[str, dict],
    failed: dict[str, list[str]] | None = None,
) -> Path:
    """Merge new results into the user's cache: directory 0700, file replaced atomically, a corrupt file never touched.

    Args:
        validated, failed: ops by backend that kept or missed the error budget on this device; the newest verdict holds.
        choices: ``{key: {"backend": name, ...}}``.

    Raises:
        UnsupportedError: what is there is not a tuning file of this user.
    """
    path = cache_file(device)
    data = _stored(path)
    verdicts = {"validated": validated, "failed": failed or {}}
    for section, other in (SECTIONS, SECTIONS[::-1]):
        for backend, ops in verdicts[section].items():
            _merge(data, architecture(device), section, other, backend, set(ops))
    data["choices"].update(choices)
    files.replace(path, json.dumps(data, indent=1, sort_keys=True).encode(), mode=0o600)
    forget()
    return path


def _merge(data: dict, arch: str, section: str, other: str, backend: str, ops: set[str]) -> None:
    """Put ops under one section, and take them out of the other."""
    table = data[section].setdefault(arch, {})
    table[backend] = sorted(ops | set(table.get(backend, ())))
    former = data[other].get(arch, {})
    if backend in former:
        former[backend] = sorted(set(former[backend]) - ops)
