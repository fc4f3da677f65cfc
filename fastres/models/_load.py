"""The ``weights=`` of the builders: a local file, or torchvision's enums where torchvision can be imported.

A file is read without running code (safetensors, or ``torch.load(weights_only=True)``) and loaded into the model only after
every name and shape was checked, so that a refused one changes nothing.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastres.errors import ArgumentError, UnsupportedError, must, must_type

Model = TypeVar("Model", bound=nn.Module)
_SHOWN = 3  # names listed in a message


def from_torchvision(name: str, weights: Any) -> Any:
    """The member of torchvision's enum for network ``name`` that ``weights`` is, or names; None for a file.

    Raises:
        UnsupportedError: weights names a member and torchvision cannot be imported.
    """
    if weights is None or isinstance(weights, os.PathLike):
        return None
    if isinstance(weights, str) and not re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", weights):
        return None
    if not isinstance(weights, str) and not hasattr(weights, "get_state_dict"):
        raise must_type(
            f"models.{name}", "weights", "None, a path, or torchvision's weights or their name", weights
        )
    try:
        from torchvision.models import get_model_weights
    except Exception as error:  # built for another torch, it fails with other errors than ImportError
        raise UnsupportedError(
            f"fastres.models.{name}: weights={str(weights)!r} names weights of torchvision, which cannot be"
            f" imported ({type(error).__name__}: {error}); install the torchvision that belongs to torch"
            f" {torch.__version__}, or give a file"
        ) from error
    members = get_model_weights(name)
    if isinstance(weights, str):
        found = members.__members__.get(weights.rpartition(".")[2])
        if found is None or not weights.startswith((f"{members.__name__}.", found.name, "DEFAULT")):
            raise must(
                f"models.{name}", "weights", f"a file or one of {list(members.__members__)}", repr(weights)
            )
        return found
    return members.verify(weights)


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str = "load_weights") -> None:
    """Load a checkpoint file into a model, whole or not at all.

    Equivalent to ``model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))``.

    Args:
        model: any module.
        path: ``*.safetensors``, or else a file of ``torch.save(model.state_dict(), path)``.
        name: what messages call the caller.

    Raises:
        ArgumentError: no such file, a corrupt one, or one of another network.
    """
    state = _read(path, name)
    expected = model.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # older checkpoints have none
    missing = [key for key in expected if key not in state and key not in counters]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        got = f"{path}, {len(missing)} missing {_some(missing)}, {len(unexpected)} extra {_some(unexpected)}"
        raise must(f"models.{name}", "weights", "a state dict of this network", got, _advice(state))
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    wrong = [key for key in state if tuple(state[key].shape) != shapes[key]]
    if wrong:
        key = wrong[0]
        got = f"{path} where {key} has {tuple(state[key].shape)} ({len(wrong)} such)"
        advice = "pass num_classes" if all(k.startswith(("fc.", "classifier.")) for k in wrong) else ""
        raise must(f"models.{name}", "weights", f"of this network's shapes, {key} {shapes[key]}", got, advice)
    model.load_state_dict(state)


def _read(path: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    """The tensors of a file, or an ArgumentError that says what is wrong with it."""
    file = Path(path)
    if not file.is_file():
        raise must(f"models.{name}", "weights", "an existing file", path)
    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the readers raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        what = "a safetensors file or one of torch.save(model.state_dict(), path)"
        raise must(f"models.{name}", "weights", what, f"{path}, which cannot be read ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        got = f"{path}, which holds a {type(state).__name__}"
        raise must(f"models.{name}", "weights", "a state dict", got)
    for key, value in state.items():
        fault = _why_not_value(value)
        if fault is not None:
            got = f"{path}, where {key} {fault}"
            raise must(f"models.{name}", "weights", "a state dict of tensors", got, _advice(state))
    return state


def _why_not_value(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.is_meta or value.layout is not torch.strided or value.is_nested or value.is_quantized:
        return f"is not a plain tensor but {value.layout} on {value.device}"
    return "is complex" if value.is_complex() else None


def _advice(state: dict[str, Any]) -> str:
    for key in ("state_dict", "model", "model_state", "module"):
        if isinstance(state.get(key), dict):
            return f"it is a training checkpoint: save its {key!r} alone"
    if state and all(key.startswith("module.") for key in state):
        return "it was saved from a wrapper: strip 'module.' from the names"
    return ""


def _some(names: list[str]) -> str:
    return f"{names[:_SHOWN]}".replace("]", ", ...]") if len(names) > _SHOWN else f"{names}"


def expect(kwargs: dict[str, Any], parameter: str, value: int) -> None:
    """Set a builder's own argument, or refuse another value with torchvision's error."""
    if kwargs.setdefault(parameter, value) != value:
        raise ArgumentError(
            f"The parameter '{parameter}' expected value {value} but got {kwargs[parameter]} instead."
        )


def build(
    make: Callable[..., Model], name: str, weights: Any, progress: bool, kwargs: dict[str, Any]
) -> Model:
    """``make(**kwargs)`` with these weights, as torchvision's builders do it.

    Raises:
        ArgumentError: as ``load_weights``; or ``num_classes`` is not what torchvision's weights have.
    """
    member = from_torchvision(name, weights)
    if member is None:
        return build_from_file(make, name, weights, kwargs)
    expect(kwargs, "num_classes", len(member.meta["categories"]))
    model = make(**kwargs)
    model.load_state_dict(member.get_state_dict(progress=progress, check_hash=True))
    return model


def build_from_file(
    make: Callable[..., Model], name: str, path: str | os.PathLike[str] | None, kwargs: dict[str, Any]
) -> Model:
    """``make(**kwargs)`` with the weights of a file, or as initialised where path is None."""
    model = make(**kwargs)
    if path is not None:
        load_weights(model, path, name)
    return model
