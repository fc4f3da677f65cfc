"""What tuning found: validated architectures and fastest backends, shipped as data and kept in the user's cache."""

import functools
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fastres import env
from fastres.errors import UnsupportedError

FORMAT = 1
_SHIPPED = Path(__file__).parent / "tuned"


def device_name(device: torch.device) -> str:
    """Name of a device as it stands in file names and keys: ``cpu`` or ``nvidia-h200``."""
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


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
    for arg in args:
        if isinstance(arg, torch.Tensor):
            shape = list(arg.shape)
            if len(shape) == 4:
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
    for section in ("validated", "choices"):
        table = data.get(section)
        if not isinstance(table, dict):
            raise ValueError(f"{section} must be an object")
    for name, backends in data["validated"].items():
        if not isinstance(backends, dict):
            raise ValueError(f"validated[{name!r}] must be an object of backend: [ops]")
        for backend, ops in backends.items():
            if not isinstance(ops, list) or not all(isinstance(op, str) for op in ops):
                raise ValueError(f"validated[{name!r}][{backend!r}] must be a list of op names")
    for name, choice in data["choices"].items():
        if not isinstance(choice, dict) or not isinstance(choice.get("backend"), str):
            raise ValueError(f"choices[{name!r}] must be an object with a backend")
    return data


def read(path: Path) -> dict:
    """Read one tuning file, raising ValueError with the reason where it is corrupt."""
    try:
        if path.stat().st_size > 1 << 24:
            raise ValueError("larger than 16 MiB")
        return _check(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a fastres tuning file: {error}") from None


def _read_or_warn(path: Path) -> dict | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        warnings.warn(f"fastres: the tuning cache is ignored: {error} (delete it to tune again)", stacklevel=2)
        return None


@functools.lru_cache(maxsize=16)
def _table(device: torch.device) -> tuple[dict, dict]:
    """Validated backends of the device's architecture and tuned choices, shipped ones first, the user's over them."""
    validated: dict[str, set[str]] = {}
    choices: dict[str, dict] = {}
    arch = architecture(device)
    for path in (_SHIPPED / "validated.json", _SHIPPED / f"{device_name(device)}.json", cache_file(device)):
        data = _read_or_warn(path)
        if data is None or data.get("torch", torch.__version__) != torch.__version__:
            continue
        for backend, ops in data["validated"].get(arch, {}).items():
            validated.setdefault(backend, set()).update(ops)
        choices.update(data["choices"])
    return validated, choices


def forget() -> None:
    """Drop what was read, so that the files are read again at the next choice."""
    _table.cache_clear()


def choice(op: str, args: tuple, device: torch.device) -> str | None:
    """The backend tuning found fastest for these arguments on this device, or None."""
    found = _table(device)[1].get(key(op, args))
    return found["backend"] if found else None


def why_not_validated(op: str, backend: str, device: torch.device) -> str | None:
    """Refuse a GPU kernel by default until a device of this architecture has validated it."""
    if device.type != "cuda" or op in _table(device)[0].get(backend, ()):
        return None
    return (
        f"no {architecture(device)} device has validated this kernel yet "
        f"(validate it here with `fastres tune`, or force it with fastres.use({op}={backend!r}))"
    )


def store(device: torch.device, validated: dict[str, list[str]], choices: dict[str, dict]) -> Path:
    """Merge new results into the user's cache: directory 0700, file replaced atomically, a corrupt file never touched."""
    path = cache_file(device)
    data = {"format": FORMAT, "torch": torch.__version__, "validated": {}, "choices": {}}
    try:
        old = read(path)
        if old.get("torch") == torch.__version__:
            data = old
    except FileNotFoundError:
        pass  # the first result of this device
    except ValueError as error:
        raise UnsupportedError(f"fastres.tune: {error}; it is left as it is (move it away to store results)") from None
    known = data["validated"].setdefault(architecture(device), {})
    for backend, ops in validated.items():
        known[backend] = sorted(set(known.get(backend, ())) | set(ops))
    data["choices"].update(choices)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    forget()
    return path
