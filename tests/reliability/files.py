"""R22: hostile files. Nothing in one is run, none is overwritten, none is waited for, and none ends the process."""

# ruff: noqa: E501

import contextlib
import copy
import json
import os
import pickle
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastres
from fastres import models, tune
from reliability.board import Tally, scored

_RAN: list[int] = []


class Bomb:
    """A pickle that would tell if it were run."""

    def __reduce__(self):
        return _RAN.append, (1,)


def whole_network(path: Path) -> tuple[dict, dict, bytes]:
    """A quantised network's file in parts: its header, the description in it, its tensors."""
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    x = torch.randn(2, 3, 16, 16)
    fastres.freeze(nn.Sequential(*parts).eval(), x, quantize=fastres.Calibration([x], error=None, progress=False)).save(
        path
    )
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["fastres"]), raw[8 + size :]


def put(path: Path, header: dict, about: object, body: bytes) -> None:
    header = copy.deepcopy(header)
    header["__metadata__"]["fastres"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


VALUES = (
    None,
    -1,
    0,
    1,
    3,
    2**20,
    2**63,
    2**70,
    1.5,
    float("nan"),
    1e308,
    "x",
    "",
    [],
    [0, 0],
    [2**20, 2**20],
    [1, -1],
    {},
    True,
    [[1]],
)


def mutations(about: dict):
    """The description with one entry changed, for every entry and many values."""
    for value in VALUES:
        for key in about:
            yield f"{key}={value!r}"[:40], {**about, key: value}
        for index, row in enumerate(about["layers"]):
            for key in row:
                changed = copy.deepcopy(about)
                changed["layers"][index][key] = value
                yield f"layer {index} {key}={value!r}"[:40], changed
        for key in about["scales"]:
            for scale in (value, [value, 0], [0.5, value]):
                yield f"scale {key}={scale!r}"[:40], {**about, "scales": {**about["scales"], key: scale}}


def network_is_safe(path: Path) -> None:
    """It is refused in words, or is a network whose calls return numbers or are refused in words."""
    try:
        frozen = fastres.load_frozen(path)
    except ValueError as error:
        assert "fastres.load_frozen: path must be" in str(error), error
        return
    for shape in ((2, 3, 16, 16), (1, 3, 5, 4)):
        # a geometry that no image suits, or too large for this machine
        with contextlib.suppress(ValueError, RuntimeError, MemoryError, OSError, fastres.UnsupportedError):
            assert frozen(torch.ones(shape)).dtype == torch.float32


def cache_is_ignored(make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "cache"
        place.mkdir(mode=0o700)
        path = place / "cpu.json"
        make(path)
        before = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        try:
            tune.read(path)
        except (ValueError, OSError):
            pass
        else:
            raise AssertionError("was read")
        assert before is None or path.read_bytes() == before


def checkpoint_is_refused(make: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        make(path)
        try:
            models.resnet18(weights=str(path))
        except (ValueError, TypeError, fastres.UnsupportedError) as error:
            assert "weights must be" in str(error), error
        else:
            raise AssertionError("was loaded")
        assert not _RAN, "the file was run"


GOOD = '{"format": 1, "validated": {}, "failed": {}, "choices": %s}'
CACHES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_text(""), "cut": lambda p: p.write_text('{"format": 1,'), "bytes": lambda p: p.write_bytes(b"\xff\xfe\x00" * 99),
    "nested": lambda p: p.write_text("[" * 1_000_000), "list": lambda p: p.write_text("[]"), "another format": lambda p: p.write_text('{"format": 2}'),
    "choices list": lambda p: p.write_text(GOOD % "[]"), "choice text": lambda p: p.write_text(GOOD % '{"a": "b"}'), "config text": lambda p: p.write_text(GOOD % '{"a": {"backend": "cpu", "config": "x"}}'),
    "config object": lambda p: p.write_text(GOOD % '{"a": {"backend": "cpu", "config": [{}]}}'), "backend number": lambda p: p.write_text(GOOD % '{"a": {"backend": 1}}'),
    "huge": lambda p: (p.touch(), os.truncate(p, 1 << 30)), "long number": lambda p: p.write_text('{"format": ' + "1" * 10_000 + "}"),
    "symlink": lambda p: p.symlink_to("/etc/passwd"), "dangling": lambda p: p.symlink_to("/none"), "folder": lambda p: p.mkdir(), "pipe": lambda p: os.mkfifo(p),
    "writable by others": lambda p: (p.write_text(GOOD % "{}"), p.chmod(0o666)), "in a folder of others": lambda p: (p.write_text(GOOD % "{}"), p.parent.chmod(0o777)),
    "device": lambda p: p.symlink_to("/dev/zero"), "pickle": lambda p: p.write_bytes(pickle.dumps(Bomb())),
}  # fmt: skip
CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "pickle bomb": lambda p: p.write_bytes(pickle.dumps(Bomb())), "torch bomb": lambda p: torch.save(Bomb(), p), "bomb in a state dict": lambda p: torch.save({"conv1.weight": Bomb()}, p),
    "empty": lambda p: p.write_bytes(b""), "cut": lambda p: (torch.save({"a": torch.ones(99)}, p), os.truncate(p, 300)), "text": lambda p: p.write_text("x" * 999), "zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(200)),
    "list": lambda p: torch.save([1], p), "of no tensors": lambda p: torch.save({"conv1.weight": 1}, p), "of another network": lambda p: torch.save({"a": torch.ones(1)}, p),
    "of other shapes": lambda p: torch.save({"conv1.weight": torch.ones(1)}, p), "folder": lambda p: p.mkdir(), "whole module": lambda p: torch.save(nn.Linear(1, 1), p),
    "path that leads out": lambda p: torch.save({"../../conv1.weight": torch.ones(1)}, p), "safetensors cut": lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
}  # fmt: skip


@scored("R22", "hostile caches, checkpoints and quantised files", full=1700, short=100)
def hostile(tally: Tally, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in CACHES.items():
            with tally.case(f"cache: {name}"):
                cache_is_ignored(make)
        for name, make in CHECKPOINTS.items():
            with tally.case(f"checkpoint: {name}"):
                checkpoint_is_refused(make)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        header, about, body = whole_network(path)
        changed = list(mutations(about))
        for name, wrong in changed[:: max(1, len(changed) // max(1, count - tally.tried))]:
            with tally.case(f"network: {name}"):
                put(path, header, wrong, body)
                network_is_safe(path)
        raw = path.read_bytes()
        for index in range(64):
            with tally.case(f"network: cut or changed at {index}/64"):
                at = index * len(raw) // 64
                path.write_bytes(raw[:at] if index % 2 else raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
                network_is_safe(path)
