"""Reads CIFAR-10 from disk: the Python layout, whose pickles are read without running code, and the binary one.

A pickle may name any function of the machine; this reader knows the five names that CIFAR's files hold, and answers
them with harmless stand-ins of its own.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.errors import ArgumentError

SIDE, CLASSES = 32, 10
PIXELS = 3 * SIDE * SIDE
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYOUTS = {  # folder as unpacked: the training files, the test file
    "cifar-10-batches-py": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    "cifar-10-batches-bin": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
}
Half = tuple[Tensor, Tensor]


def read(path: Path) -> tuple[Half, Half, tuple[str, ...]]:
    """Training images and labels, test images and labels, and the names of the classes.

    Args:
        path: what the archive was unpacked to, or the directory that holds it.

    Raises:
        ArgumentError: a file is missing, or is not one of CIFAR-10.
    """
    for name, (training, test) in LAYOUTS.items():
        for folder in (path, path / name):
            if (folder / test).is_file():
                missing = [file for file in training if not (folder / file).is_file()]
                if missing:
                    raise ArgumentError(f"{folder} must hold {len(training)} training files, {missing[0]} is missing")
                halves = [_read(folder / file) for file in training]
                images, labels = torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])
                return (images, labels), _read(folder / test), NAMES
    raise ArgumentError(
        f"--data cifar10 must name the unpacked archive of CIFAR-10 (python or binary version), got {path},"
        f" which holds neither {' nor '.join(LAYOUTS)}; nothing is downloaded"
    )


def _read(file: Path) -> Half:
    content = file.read_bytes()
    images, labels = _from_binary(file, content) if file.suffix == ".bin" else _from_pickle(file, content)
    if len(labels) != len(images):
        raise ArgumentError(f"{file} must hold a label for each image, got {len(images)} images, {len(labels)} labels")
    if not bool(((labels >= 0) & (labels < CLASSES)).all()):
        raise ArgumentError(f"{file} must hold labels from 0 to {CLASSES - 1}, got {labels.min()} to {labels.max()}")
    return images, labels


def _from_binary(file: Path, content: bytes) -> Half:
    if not content or len(content) % (1 + PIXELS):
        raise ArgumentError(f"{file} must consist of records of {1 + PIXELS} bytes, got {len(content)} bytes")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + PIXELS)
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE).contiguous(), records[:, 0].long()


def _from_pickle(file: Path, content: bytes) -> Half:
    try:
        batch = _Reader(io.BytesIO(content), encoding="bytes").load()
    except ArgumentError:
        raise
    except Exception as error:  # whatever a foreign file makes the unpickler raise
        raise ArgumentError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, _Array) or not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ArgumentError(f"{file} must hold the array 'data' and the list 'labels' of CIFAR-10, got {sorted(batch)}")
    raw = data.content
    if data.dtype not in ("u1", "|u1") or data.fortran or not raw or len(raw) % PIXELS:
        raise ArgumentError(f"{file} must hold images of {PIXELS} bytes, got {len(raw)} bytes of type {data.dtype}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3, SIDE, SIDE), torch.tensor(labels)


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


class _Array:
    """Stands in for a NumPy array: keeps the bytes that it was saved with."""

    dtype, fortran, content = "", False, b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, kind, self.fortran, content = state
        self.dtype, self.content = kind.name, bytes(content)


class _Kind:
    """Stands in for a NumPy dtype."""

    def __init__(self, name: Any, *ignored: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        pass


def _array(*ignored: Any) -> _Array:
    return _Array()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _Reader(pickle.Unpickler):
    """An unpickler of these names and no others."""

    KNOWN: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Kind,
        ("_codecs", "encode"): _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self.KNOWN.get((module, name))
        if found is None:
            raise ArgumentError(f"the file names {module}.{name}, which CIFAR-10 files never contain; refusing to read it")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise ArgumentError("the file refers to another one, which CIFAR-10 files never do; refusing to read it")
