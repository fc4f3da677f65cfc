"""Checkpoints: tensors in a safetensors file, the rest in a JSON file that names it; each is written whole or not at all.

The JSON file is written last and replaces the old one in a single step: at any moment it names a whole file of tensors.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastres import files
from fastres.errors import ArgumentError

STATE = "checkpoint.json"
State = dict[str, Any]


def write(path: Path, content: bytes) -> None:
    """``files.replace``, whose error says that nothing is lost."""
    try:
        files.replace(path, content)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); what was saved before is intact") from error


def write_json(path: Path, data: Any) -> None:
    write(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def save(folder: Path, tensors: dict[str, Tensor], state: State) -> None:
    """Save both under the number of the step, then drop the tensors saved before."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state['step']}.safetensors"
    content = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    write(folder / name, content)
    write_json(folder / STATE, {**state, "tensors": name, "sha256": hashlib.sha256(content).hexdigest()})
    for old in (*folder.glob("step-*.safetensors"), *folder.glob(".step-*")):  # the latter of processes that were killed
        if old.name != name:
            old.unlink()


def load(folder: Path) -> tuple[dict[str, Tensor], State] | None:
    """What was saved last, or None where nothing was.

    Raises:
        ArgumentError: the files were damaged or changed since.
    """
    file = folder / STATE
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_bytes())
        content = (folder / Path(state["tensors"]).name).read_bytes()
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise ValueError(f"{state['tensors']} is not what was saved")
        return safetensors.torch.load(content), state
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"{file} cannot be resumed from ({reason}); remove {folder} to start anew") from error
