"""Trains one small residual network twice from the same weights, in plain PyTorch and with fastres, on scanned digits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import terminal
from fastres.experiments.subject import laid_out
from fastres.experiments.twin import torch_twin
from fastres.models import cifar

SIDE = 16  # pixels; the scans are 8x8, doubled so that three stages have something to stride over
BATCH = 128
TEST_SHARE = 0.2
PEAK_RATE = 0.03


@dataclass
class Curve:
    """One training: the network, the loss of every step, and per epoch the test accuracy and the seconds."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "accuracies": self.accuracies, "epoch_seconds": self.seconds}


@dataclass(frozen=True)
class Digits:
    """The scans of scikit-learn's ``load_digits``, standardised, split with a fixed seed."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> Digits:
    (datasets,) = terminal.need("the demo", "sklearn.datasets")
    scans = datasets.load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 16.0
    images = F.interpolate((images - images.mean()) / images.std(), size=(SIDE, SIDE), mode="bilinear")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(scans.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = round(TEST_SHARE * len(labels))
    test, train = order[:held_out], order[held_out:]
    return Digits((images[train], labels[train]), (images[test], labels[test]))


def train(data: Digits, epochs: int, step: Callable[[str], object]) -> dict[str, Curve]:
    """Train both networks epoch by epoch in turns, so that both meet the machine in the same state.

    Both start from the same weights, see the same batches in the same order, and are laid out in
    channels_last.
    """
    torch.manual_seed(0)
    model = laid_out(cifar.resnet(20, in_channels=1), torch.channels_last)
    curves = {"torch": Curve(torch_twin(model)), "fastres": Curve(model)}
    runs = {name: _Run(curve, data, epochs) for name, curve in curves.items()}
    names = list(curves)
    for epoch in range(epochs):
        for name in names[:: 1 if epoch % 2 == 0 else -1]:
            step(f"epoch {epoch + 1} of {epochs}, {name}")
            runs[name].epoch(epoch)
    return curves


class _Run:
    """The training of one network: SGD with momentum under one cycle of learning rates."""

    def __init__(self, curve: Curve, data: Digits, epochs: int) -> None:
        self.curve, self.data = curve, data
        self.optimizer = torch.optim.SGD(
            curve.model.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        steps = epochs * -(-len(data.train[1]) // BATCH)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK_RATE, total_steps=steps)

    def epoch(self, number: int) -> None:
        images, labels = self.data.train
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(100 + number))
        start = time.perf_counter()
        self.curve.model.train()
        for batch in order.split(BATCH):
            self.optimizer.zero_grad(set_to_none=True)
            x = images[batch].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.curve.model(x), labels[batch])
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.curve.losses.append(loss.item())
        self.curve.seconds.append(time.perf_counter() - start)
        self.curve.accuracies.append(accuracy(self.curve.model, *self.data.test))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class the model finds."""
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()
