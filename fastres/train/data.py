"""Images to train on, as data sets for ``torch.utils.data`` whose items are named by (epoch, index).

The random augmentation of an image depends only on the seed, the epoch and the image's number: it is the same for any number of
workers or processes, and after resuming.
"""

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastres import terminal
from fastres.errors import ArgumentError
from fastres.train import cifar, images

Key = tuple[int, int]  # epoch, index
TEST_SHARE = 0.2
DIGITS_SIDE = 8


@dataclass(frozen=True)
class Data:
    """A training and a test set; ``fingerprint`` tells whether a resumed run has the same images."""

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    channels: int
    size: int
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> tuple[int, int]:
        return len(self.train), len(self.test)  # type: ignore[arg-type]


class Arrays(Dataset[Any]):
    """Images held in memory, standardised as they are taken.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        mean, deviation: (1, C, 1, 1), of the training images.
        shift: most pixels by which an image is moved at random, padded with zeros (section 4.2 of the paper: 4); 0 for none.
        flips: mirror half of the images.
        seed: for both.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor,
        shift: int = 0, flips: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.images, self.labels, self.mean, self.deviation = images, labels, mean, deviation
        self.shift, self.flips, self.seed = shift, flips, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([index for _, index in keys])
        batch = (self.images[chosen].float() - self.mean) / self.deviation
        if self.shift or self.flips:
            batch = torch.stack([self._augmented(x, key) for x, key in zip(batch, keys, strict=True)])
        return batch, self.labels[chosen]

    def _augmented(self, x: Tensor, key: Key) -> Tensor:
        chance = images.chance(self.seed, key)
        top, left = chance.randint(0, 2 * self.shift), chance.randint(0, 2 * self.shift)
        height, width = x.shape[1:]
        x = F.pad(x, (self.shift,) * 4)[:, top : top + height, left : left + width]
        return x.flip(2) if self.flips and chance.random() < 0.5 else x


def batches(count: int, batch: int, *, seed: int, epoch: int, skip: int = 0, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """This process's share of every batch of an epoch after the first ``skip``; a last batch that is not full is dropped."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    whole = [order[start : start + batch] for start in range(skip * batch, count - batch + 1, batch)]
    return [[(epoch, index) for index in each[rank::world]] for each in whole]


def in_order(count: int, batch: int, *, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """This process's share of a test set, in batches."""
    mine = [(0, index) for index in range(rank, count, world)]
    return [mine[start : start + batch] for start in range(0, len(mine), batch)]


def loader(dataset: Dataset[Any], chosen: list[list[Key]], workers: int, pinned: bool) -> DataLoader[Any]:
    return DataLoader(
        dataset, batch_sampler=chosen, num_workers=workers, collate_fn=_as_it_is, pin_memory=pinned,  # type: ignore[arg-type]
        generator=torch.Generator(),  # of its own: the loader draws a seed, which must not move the model's
    )  # fmt: skip


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def digits(size: int = DIGITS_SIDE, channels: int = 1, seed: int = 0) -> Data:
    """scikit-learn's 1797 scans of 8x8 pixels, a fifth of them held out by a fixed draw; no augmentation."""
    (datasets,) = terminal.need("--data digits", "sklearn.datasets", extra="train")
    scans = datasets.load_digits()
    pictures = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 16.0
    if size != DIGITS_SIDE:
        pictures = F.interpolate(pictures, size=(size, size), mode="bilinear")
    pictures, labels = pictures.expand(-1, channels, -1, -1).contiguous(), torch.tensor(scans.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = round(TEST_SHARE * len(labels))
    test, train = order[:held_out], order[held_out:]
    halves = (pictures[train], labels[train]), (pictures[test], labels[test])
    return _in_memory("digits", halves, tuple("0123456789"), seed=seed)


def cifar10(path: Path, seed: int = 0) -> Data:
    """CIFAR-10 in torchvision's or the binary layout, moved by up to 4 pixels and mirrored (section 4.2)."""
    *halves, classes = cifar.read(path)
    return _in_memory("cifar10", (halves[0], halves[1]), classes, shift=4, flips=True, seed=seed)


def folder(path: Path, size: int = 224, strict: bool = False, seed: int = 0) -> Data:
    """A folder of images: ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``), or just ``CLASS/*``, a fifth of it held out.

    Raises:
        ArgumentError: no images, one class, a class without test images; with strict, an image that cannot be read.
        UnsupportedError: Pillow is not installed.
    """
    terminal.need("--data folder", "PIL", extra="train")
    found = images.scan(path, TEST_SHARE, strict)
    train = images.Files(found.train, size, augment=True, seed=seed)
    test = images.Files(found.test, size, augment=False, seed=seed)
    names = [(str(file.relative_to(path)), label) for file, label in (*found.train, *found.test)]
    notes = {"skipped": [str(file.relative_to(path)) for file in found.skipped]}
    return Data("folder", train, test, found.classes, 3, size, _digest(repr(names).encode()), notes)


def _in_memory(
    name: str, halves: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], classes: tuple[str, ...], **augment: Any
) -> Data:
    (train, labels), (test, test_labels) = halves
    floats = train.float()
    mean, deviation = floats.mean((0, 2, 3), keepdim=True), floats.std((0, 2, 3), keepdim=True)
    if not bool((deviation > 0).all()):
        raise ArgumentError(f"--data {name}: a colour channel has the same value in all pixels of all images")
    digest = _digest(b"".join(part.numpy().tobytes() for part in (train, labels, test, test_labels)))
    return Data(
        name, Arrays(train, labels, mean, deviation, **augment), Arrays(test, test_labels, mean, deviation),
        classes, train.shape[1], train.shape[2], digest,
    )  # fmt: skip


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
