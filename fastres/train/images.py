"""Image files read with Pillow: scanning a folder, and crops of its images (section 3.4 of He et al. 2016)."""

import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastres.errors import ArgumentError

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, as torchvision's weights expect
SHORTEST, LONGEST = 256 / 224, 480 / 224  # shorter side of a scaled image over the side of a crop; tests use the first
TEST_FOLDERS = ("test", "val")
Item = tuple[Path, int]


class Found(NamedTuple):
    train: list[Item]
    test: list[Item]
    classes: tuple[str, ...]
    skipped: list[Path]


def chance(seed: int, key: tuple[int, int]) -> random.Random:
    """The random numbers for one image in one epoch."""
    return random.Random(f"{seed} {key[0]} {key[1]}")


class Files(Dataset[Any]):
    """Square crops of image files: at a random scale and place and mirrored at random, or from the centre."""

    def __init__(self, items: list[Item], size: int, *, augment: bool, seed: int) -> None:
        self.items, self.size, self.augment, self.seed = items, size, augment, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([self.items[index][1] for _, index in keys])
        return torch.stack([self._crop(key) for key in keys]), labels

    def _crop(self, key: tuple[int, int]) -> Tensor:
        image = _opened(self.items[key[1]][0])
        scale, across, down, mirrored = SHORTEST, 0.5, 0.5, False
        if self.augment:
            drawn = chance(self.seed, key)
            scale = drawn.uniform(SHORTEST, LONGEST)
            across, down, mirrored = drawn.random(), drawn.random(), drawn.random() < 0.5
        side = min(image.size) / scale  # of the crop, in the image's own pixels
        left, top = across * (image.width - side), down * (image.height - side)
        small = image.resize((self.size, self.size), resample=2, box=(left, top, left + side, top + side))  # bilinear
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3)
        x = (pixels.permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
        return x.flip(2) if mirrored else x


def _opened(path: Path) -> Any:
    """The image, decoded in full, in red, green and blue."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255
                raise ValueError(f"pixels of more than 8 bits, of Pillow's mode {image.mode}")
            return image.convert("RGB")


def why_not(path: Path) -> str | None:
    """What is wrong with an image file, in one sentence, or None."""
    try:
        _opened(path)
    except Exception as error:  # whatever a foreign file makes a decoder raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def scan(path: Path, share: float, strict: bool) -> Found:
    """Every image under ``path``; images that cannot be read are left out and listed or, with ``strict``, refused."""
    if not path.is_dir():
        raise ArgumentError(f"--data folder must name a directory, got {path}")
    tests = [path / name for name in TEST_FOLDERS if (path / name).is_dir()]
    split = bool(tests) and (path / "train").is_dir()
    classes = _classes(path / "train" if split else path)
    skipped: list[Path] = []
    train = _items(path / "train" if split else path, classes, strict, skipped)
    if split:
        strangers = sorted(set(_folders(tests[0])) - set(classes))
        if strangers:
            raise ArgumentError(f"{tests[0]} holds {_named(strangers)}, unknown in {path / 'train'}")
        test = _items(tests[0], classes, strict, skipped)
    else:
        train, test = _held_out(train, share)
    for items, part in ((train, "training"), (test, "test")):
        absent = [name for label, name in enumerate(classes) if all(label != found for _, found in items)]
        if absent:
            raise ArgumentError(f"{path} has no {part} image of {_named(absent)}{_left_out(skipped)}")
    return Found(train, test, classes, skipped)


def _folders(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(path: Path) -> tuple[str, ...]:
    names = _folders(path)
    if len(names) < 2:
        found = f"one, {names[0]}" if names else "none"
        raise ArgumentError(f"{path} must hold a folder of images for each of at least two classes, got {found}")
    return tuple(names)


def _items(path: Path, classes: tuple[str, ...], strict: bool, skipped: list[Path]) -> list[Item]:
    items = []
    for label, name in enumerate(classes):
        for file in sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            reason = why_not(file)
            if reason is None:
                items.append((file, label))
            elif strict:
                raise ArgumentError(f"{file} cannot be read ({reason}); without --strict it is left out")
            else:
                skipped.append(file)
    return items


def _held_out(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split class by class, by a draw that is always the same."""
    train: list[Item] = []
    test: list[Item] = []
    for label in sorted({label for _, label in items}):
        mine = [item for item in items if item[1] == label]
        random.Random(f"held out {label}").shuffle(mine)
        count = max(1, round(share * len(mine))) if len(mine) > 1 else 0
        test, train = test + mine[:count], train + mine[count:]
    return sorted(train), sorted(test)


def _named(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most])
    return f"class {shown}" if len(names) == 1 else f"{len(names)} classes ({shown}{', …' * (len(names) > most)})"


def _left_out(skipped: list[Path]) -> str:
    return f" ({len(skipped)} images cannot be read)" if skipped else ""
