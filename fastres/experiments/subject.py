"""The model a command is about: named, built, with inputs of its size."""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres import models
from fastres.errors import ArgumentError, UnsupportedError
from fastres.experiments.twin import torch_twin
from fastres.models import cifar

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CIFAR = re.compile(r"cifar\.(resnet|plain|preact_resnet)(\d+)")
PLAIN = re.compile(r"plain(\d+)")


class Subject(NamedTuple):
    """A model in plain PyTorch with fixed weights and statistics, and an input."""

    name: str
    model: nn.Module
    x: Tensor
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.x.shape))} {str(self.dtype).removeprefix('torch.')}"


def names() -> list[str]:
    """Networks of fastres.models as the command line names them; CIFAR and plain ones take any depth they can
    have.
    """
    found = [name for name in models.__all__ if name.islower() and name not in ("cifar", "load_weights", "plain")]
    return [*found, "plain34", "cifar.resnet20", "cifar.plain20", "cifar.preact_resnet164"]


def load(
    name: str, *, batch: int = 1, size: int | None = None, dtype: str = "fp32", device: str | None = None
) -> Subject:
    """Build a model by name, with the weights of seed 0 and lively batch-norm statistics, and an input for
    it.

    Args:
        name: of ``names()``, ``torchvision:NAME``, ``timm:NAME``, or ``path.py:factory`` (a function of no
            arguments).
        batch: images.
        size: height and width; None is 224, or 32 for a CIFAR network.
        dtype: of ``DTYPES``; parameters and input.
        device: None is cuda where there is one.

    Raises:
        ArgumentError: no such model, or wrong options.
        UnsupportedError: the package it comes from cannot be imported, or there is no such device.
    """
    small = CIFAR.fullmatch(name) is not None
    size = (32 if small else 224) if size is None else size
    for option, value, most in (("batch", batch, 4096), ("size", size, 4096)):
        if not 1 <= value <= most:
            raise ArgumentError(f"--{option} must be between 1 and {most}, got {value}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    torch.manual_seed(0)
    model = _factory(name)()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} must give a torch.nn.Module, got {type(model).__name__}")
    model = torch_twin(model)
    enliven(model)
    model = model.eval().to(place, DTYPES[dtype])
    x = torch.randn(batch, _in_channels(model), size, size, generator=torch.Generator().manual_seed(1))
    return Subject(name, model, x.to(place, DTYPES[dtype]), DTYPES[dtype])


def laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The model with its weights in a memory format."""
    return model.to(memory_format=layout)  # type: ignore[call-overload]


def enliven(model: nn.Module) -> None:
    """Give batch norms the statistics and parameters of a network in use: at their defaults a wrong fold
    would pass.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(like: Tensor, low: float, high: float) -> None:
        like.data.copy_(torch.empty(like.shape).uniform_(low, high, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            draw(module.running_mean, -0.2, 0.2)
            draw(module.running_var, 0.7, 1.4)
            if module.affine:
                draw(module.weight, 0.4, 0.9)
                draw(module.bias, -0.2, 0.2)


def builder(name: str) -> Callable[[int, int], nn.Module]:
    """What builds a network by name, to be trained: for images of so many classes and colours, with new weights.

    It is tried here, before the images are read. A factory of the user's own file is called once only, and as it is.

    Raises:
        ArgumentError, UnsupportedError: as ``load``.
    """
    make: Callable[..., Any] = _factory(name)
    own = name.partition(":")[0].endswith(".py")

    def build(classes: int, channels: int) -> nn.Module:
        if own:
            model = make()
        elif CIFAR.fullmatch(name):
            model = make(num_classes=classes, in_channels=channels)
        else:
            model = make(num_classes=classes)
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{name} must give a torch.nn.Module, got {type(model).__name__}")
        return model

    if not own:
        build(10, 3)
    return build


def _in_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ArgumentError("the model has no nn.Conv2d: there is nothing to optimise")


def _factory(name: str) -> Callable[[], Any]:
    if name.startswith("torchvision:"):
        return _from_package("torchvision.models", "get_model", name)
    if name.startswith("timm:"):
        return _from_package("timm", "create_model", name)
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), function)
    if found := CIFAR.fullmatch(name):
        family, depth = found.groups()
        return functools.partial(getattr(cifar, family), int(depth))
    if found := PLAIN.fullmatch(name):
        return functools.partial(models.plain, int(found[1]))
    if name not in names():
        known = ", ".join((*names(), "torchvision:NAME", "timm:NAME"))
        raise ArgumentError(f"MODEL must be one of {known} or path.py:factory, got {name!r}")
    return getattr(models, name)


def _from_package(module: str, function: str, name: str) -> Callable[[], Any]:
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # built for another torch, torchvision fails with other errors than ImportError
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"{name}: {module} cannot be imported ({type(error).__name__}: {reason})") from error

    def build(**options: Any) -> Any:
        try:
            return make(name.partition(":")[2], **options)
        except (ValueError, RuntimeError) as error:
            raise ArgumentError(f"{name}: {str(error).partition(chr(10))[0]}") from error

    return build


def _from_file(path: Path, function: str) -> Callable[[], Any]:
    """The function of this name in a Python file, which is run: it is the user's own code."""
    if not path.is_file():
        raise ArgumentError(f"MODEL {path}:{function} names a file that does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ArgumentError(f"{path} must define the function {function!r}, which returns the model")
    return getattr(module, function)
