"""A quantised network in a file: safetensors, with the layers and scales as JSON in its header."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastres import files
from fastres.errors import must, must_type
from fastres.frozen.calibrate import INHERIT, Quality
from fastres.frozen.int8 import LEVELS, MOST_TERMS, Scale
from fastres.frozen.layers import Layer, Network, Output
from fastres.frozen.record import Value

FORMAT = 1
_HEADER = "fastres"
_MOST = 1 << 20  # of any number that describes a layer
_KINDS = {"conv": "weight scale bias", "linear": "weight scale bias", "bn": "weight", "max_pool": "", "avg_pool": "",
          "add": "", "relu": "", "pad": ""}  # fmt: skip
_PAIRS = {"kernel": 0, "stride": 1, "padding": 0, "dilation": 1}  # fields, with the least of their two numbers


def write(
    path: str | os.PathLike[str], network: Network, scales: Mapping[Value, Scale], quality: Quality | None
) -> None:
    """Replace the file whole, or leave it as it was; what a link names, not the link."""
    if not isinstance(path, (str, os.PathLike)):
        raise must_type("freeze", "path", "a str or os.PathLike", path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir() or (target.exists() and not target.is_file()):  # a folder, or a device, as root
        raise must("freeze", "path", "a file, or a new one in a folder", f"{path}, which is neither")
    numbers = {network.x: 0} | {layer.y: index + 1 for index, layer in enumerate(network.layers)}
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(network.layers):
        row = {"kind": layer.kind, "name": layer.name, "x": numbers[layer.x], "relu": layer.relu, "ceil": layer.ceil}
        row |= {field: list(getattr(layer, field)) for field in _PAIRS}
        row |= {"out_channels": layer.out_channels, "expects": layer.expects and list(layer.expects)}
        layers.append(row | {"residual": None if layer.residual is None else numbers[layer.residual]})
        tensors |= {f"{index}.{name}": getattr(layer, name).contiguous() for name in _KINDS[layer.kind].split()}
    about = {
        "format": FORMAT, "name": network.name, "channels": network.channels, "flat": network.form.flat, "layers": layers,
        "scales": {str(number): list(scales[value]) for value, number in numbers.items() if value in scales},
        "quality": None if quality is None else quality.to_dict(),
    }  # fmt: skip
    files.replace(target, save(tensors, {_HEADER: json.dumps(about)}))


def read(path: str | os.PathLike[str]) -> tuple[Network, dict[Value, Scale], Quality | None]:
    """What ``write`` wrote.

    Raises:
        ArgumentError: it is something else; the text says where.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise must_type("load_frozen", "path", "a str or os.PathLike", path)
    if not os.path.isfile(path):  # opening a pipe would block
        raise must("load_frozen", "path", "a file that Frozen.save wrote", f"{path}, which is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if header else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise must("load_frozen", "path", "a file that Frozen.save wrote", f"{path}: {error}") from error
    try:
        if header is None:
            raise _Damaged("no description of a network")
        about = json.loads(header)
        _need(isinstance(about, dict) and about.get("format") == FORMAT, f"another format than {FORMAT}")
        return _Reader(about, tensors).network()
    except (_Damaged, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{path}: {type(error).__name__.strip('_')}: {error}"
        raise must("load_frozen", "path", "a whole file that Frozen.save wrote", what) from error


class _Damaged(Exception):
    """The file does not hold a network."""


def _need(fine: bool, what: str) -> None:
    if not fine:
        raise _Damaged(what)


class _Reader:
    def __init__(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.about, self.tensors = about, tensors
        self.values = [Value(())]

    def network(self) -> tuple[Network, dict[Value, Scale], Quality | None]:
        rows, channels = self.about["layers"], _number(self.about["channels"], 1)
        _need(isinstance(rows, list) and bool(rows), "no layers")
        layers, sizes = [], [channels]
        for index, row in enumerate(rows):
            layers.append(self.layer(index, row, sizes))
            sizes.append(layers[-1].out_channels or sizes[row["x"]])
            self.values.append(layers[-1].y)
        _need(not self.tensors, f"tensors of no layer: {sorted(self.tensors)[:3]}")
        scales = {self.values[index]: self.scale(index) for index in range(len(self.values) - 1)}
        for layer in layers[:-1]:
            _need(not layer.relu or scales[layer.y].zero == 0, f"the scale of {layer.name}")
            _need(layer.kind not in INHERIT or scales[layer.y] == scales[layer.x], f"the scale of {layer.name}")
        _need(layers[-1].kind in ("conv", "linear", "add", "relu") and not layers[-1].relu, "the last layer")
        quality = self.about["quality"]
        form = Output(0, bool(self.about["flat"]))
        found = Network(_text(self.about["name"]), layers, self.values[0], channels, [layers[-1].y], form)
        return found, scales, None if quality is None else _quality(quality)

    def layer(self, index: int, row: dict[str, Any], sizes: list[int]) -> Layer:
        kind, name = row["kind"], _text(row["name"])
        _need(kind in _KINDS, f"a layer of kind {kind!r}"[:80])
        kernel, stride, padding, dilation = (_pair(row[field], least) for field, least in _PAIRS.items())
        residual = row["residual"]
        _need((residual is not None) == (kind == "add") or kind in ("conv", "linear"), f"the residual of {name}")
        layer = Layer(
            kind, name, self.value(row["x"]), Value(()), residual if residual is None else self.value(residual),
            bool(row["relu"]), kernel, stride, padding, dilation, ceil=bool(row["ceil"]),
            out_channels=_number(row["out_channels"], 0),
            expects=None if row["expects"] is None else _pair(row["expects"], 1),
        )  # fmt: skip
        own = {field: self.tensors.pop(f"{index}.{field}") for field in _KINDS[kind].split()}
        _check_tensors(layer, own, sizes[row["x"]])
        if residual is not None:
            _need(sizes[residual] == (layer.out_channels or sizes[row["x"]]), f"the residual of {name}")
        layer.weight, layer.scale, layer.bias = own.get("weight"), own.get("scale"), own.get("bias")
        return layer

    def value(self, number: Any) -> Value:
        return self.values[_number(number, 0, len(self.values) - 1)]

    def scale(self, index: int) -> Scale:
        scale, zero = self.about["scales"][str(index)]
        _need(isinstance(scale, float) and math.isfinite(scale) and scale > 0, f"the scale of value {index}")
        return Scale(scale, _number(zero, 0, LEVELS))


def _check_tensors(layer: Layer, own: dict[str, Tensor], channels: int) -> None:
    """Shapes and dtypes as the layer's kernel reads them."""
    name, weight = layer.name, own.get("weight")
    if layer.kind in ("conv", "linear"):
        assert weight is not None
        shape = (layer.out_channels, channels, *layer.kernel)
        _need(weight.dtype == torch.int8 and weight.shape == shape and weight.numel() > 0, f"the weights of {name}")
        _need(weight[0].numel() <= MOST_TERMS, f"the weights of {name}")
        for field in ("scale", "bias"):
            fine = own[field].dtype == torch.float32 and own[field].shape == shape[:1] and bool(own[field].isfinite().all())
            _need(fine, f"the {field} of {name}")
    elif layer.kind == "bn":
        assert weight is not None
        fine = weight.dtype == torch.float32 and weight.shape == (3, channels) and bool(weight.isfinite().all())
        _need(fine and layer.out_channels == 0, f"the batch norm {name}")
    elif layer.kind == "pad":
        _need(layer.out_channels >= channels, f"the copy {name}")
    else:
        _need(layer.out_channels == 0, f"the channels of {name}")


def _number(value: Any, least: int, most: int = _MOST) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and least <= value <= most, f"a number {value!r}"[:80])
    return value


def _pair(value: Any, least: int) -> tuple[int, int]:
    _need(isinstance(value, list) and len(value) == 2, "a pair of numbers")
    return _number(value[0], least), _number(value[1], least)


def _text(value: Any) -> str:
    _need(isinstance(value, str) and len(value) < 1000, "a name")
    return value


def _quality(found: dict[str, Any]) -> Quality:
    _need(isinstance(found, dict), "the quality")
    fields = {field.name for field in dataclasses.fields(Quality)}
    numbers = all(value is None or isinstance(value, (int, float)) for value in found.values())
    _need(set(found) == fields and numbers, "the quality")
    return Quality(**found)
