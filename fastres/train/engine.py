"""The training loop: every step a function of the settings, the data and its own number, so that it can be resumed
at any of them with the same bits.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastres.errors import ArgumentError, DivergenceError
from fastres.train import checkpoint, schedule
from fastres.train.data import Data, batches, in_order, loader
from fastres.train.processes import Processes, synchronized

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
FREE = ("workers", "save_steps")  # settings that change nothing in the result


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        epochs, batch: length of the training; images of a step, over all processes.
        rate, momentum, weight_decay: of SGD.
        schedule, warmup: see ``schedule.factor``; the warm-up here in epochs.
        smoothing: of the labels (Szegedy et al. 2016).
        ema: decay of the moving average of the weights that is evaluated and saved beside them; None for none.
        amp: ``"bf16"`` or ``"fp16"``; None is float32.
        channels_last, sync_bn: memory format; batch norm over all processes.
        seed: of the order of the images, their augmentation and whatever the model draws.
        workers, save_steps: processes that load images; steps between checkpoints within an epoch.
    """

    epochs: int = 90
    batch: int = 128
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"
    warmup: float = 0.0
    smoothing: float = 0.0
    ema: float | None = None
    amp: str | None = None
    channels_last: bool = True
    sync_bn: bool = False
    seed: int = 0
    workers: int = 0
    save_steps: int | None = None


class Trainer:
    """Trains a model on data, resuming what ``out`` holds of the same run.

    Args:
        model: gives a logit for each class; trained in place.
        data: images and labels.
        settings: how.
        out: directory of the checkpoint; None keeps nothing.
        device, processes: where this process computes, and with which others.
        name: tells apart what settings and data do not: which network this is.
        told: called with each epoch's row, ``model`` in its state then.
    """

    def __init__(
        self, model: nn.Module, data: Data, settings: Settings, *, out: Path | None = None, device: torch.device | None = None,
        processes: Processes | None = None, name: str = "", told: Callable[[dict[str, Any]], object] = lambda row: None,
    ) -> None:  # fmt: skip
        self.data, self.settings, self.out, self.told = data, settings, out, told
        self.device, self.processes = device or torch.device("cpu"), processes or Processes()
        self.steps = _steps(data, settings, self.processes.world)
        self.identity = {"network": name, "data": [data.name, data.fingerprint], "size": data.size, **_decisive(settings)}
        model = model.to(self.device)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        across = settings.sync_bn and self.processes.world > 1
        self.model = synchronized(model, self.device) if across else model
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
        ) if settings.ema is not None else None  # fmt: skip
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.rate, settings.momentum, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []  # of each epoch: of the part since a resumption, where there was one
        self.sums = [0.0, 0.0, 0.0]  # of this epoch so far: loss, wrong answers, images
        self._resume()
        self.running = self.processes.wrap(self.model, self.device)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; a row for each epoch.

        Raises:
            DivergenceError: the loss is not finite; the last checkpoint stands.
            OSError: a checkpoint cannot be written; the one before stands.
        """
        while len(self.history) < self.settings.epochs:
            row = self.epoch()
            self.save()
            self.told(row)
        return self.history

    def epoch(self) -> dict[str, Any]:
        """The rest of this epoch, its test, and the row that both come to."""
        start = time.perf_counter()
        self._train()
        row = self._row()
        self.history.append(row)
        self.seconds.append(time.perf_counter() - start)
        self.sums = [0.0, 0.0, 0.0]
        return row

    def _train(self) -> None:
        """The steps that are left of this epoch."""
        settings = self.settings
        epoch, skip = divmod(self.step, self.steps)
        world = {"rank": self.processes.rank, "world": self.processes.world}
        chosen = batches(self.data.counts()[0], settings.batch, seed=settings.seed, epoch=epoch, skip=skip, **world)
        self.model.train()
        for images, labels in loader(self.data.train, chosen, settings.workers, self.device.type == "cuda"):
            self._one_step(images, labels)
            if settings.save_steps and self.step % settings.save_steps == 0 and self.step % self.steps:
                self.save()

    def _one_step(self, images: Tensor, labels: Tensor) -> None:
        settings = self.settings
        torch.manual_seed(_mixed(settings.seed, self.step, self.processes.rank))
        done, warmup = self.step / (self.steps * settings.epochs), settings.warmup / settings.epochs
        errors = [row["test_error"] for row in self.history]
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * schedule.factor(settings.schedule, done, warmup, errors)
        images, labels = self._placed(images), labels.to(self.device, non_blocking=True)
        logits = self._forward(self.running, images)
        self._check_width(logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
        found = torch.stack([loss.detach() * len(labels), (logits.argmax(1) != labels).sum(), loss.new_tensor(len(labels))])
        sums = self.processes.sum(found).tolist()
        if not math.isfinite(sums[0]):
            raise DivergenceError(f"the loss is {sums[0] / sums[2]} at step {self.step + 1}: training stops, {self._kept()}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.step += 1

    def _kept(self) -> str:
        if self.out is None or not (self.out / checkpoint.STATE).is_file():
            return "no checkpoint was written yet; a lower rate may help"
        return f"the last good checkpoint stays in {self.out}; a lower rate may help"

    def _placed(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else images

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        kind = AMP.get(self.settings.amp or "")
        with torch.autocast(self.device.type, kind or torch.bfloat16, enabled=kind is not None):
            return model(images).float()

    def _check_width(self, logits: Tensor) -> None:
        expected = len(self.data.classes)
        if logits.dim() != 2 or logits.shape[1] != expected:
            raise ArgumentError(f"the network must give {expected} logits, one for each class, got {tuple(logits.shape[1:])}")

    def _row(self) -> dict[str, Any]:
        """What this epoch came to: losses, and errors as shares; the training ones over the epoch's own steps."""
        loss, wrong, count = self.sums
        row = {
            "epoch": len(self.history) + 1, "step": self.step, "rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count, "train_error": wrong / count,
        }  # fmt: skip
        row["test_loss"], row["test_error"] = self._test(self.model)
        if self.average is not None:
            row["average_test_loss"], row["average_test_error"] = self._test(self.average.module)
        return row

    @torch.no_grad()
    def _test(self, model: nn.Module) -> tuple[float | None, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        world = {"rank": self.processes.rank, "world": self.processes.world}
        each = max(1, self.settings.batch // self.processes.world)
        chosen = in_order(self.data.counts()[1], each, **world)
        model.eval()
        for images, labels in loader(self.data.test, chosen, self.settings.workers, self.device.type == "cuda"):
            labels = labels.to(self.device)
            logits = self._forward(model, self._placed(images))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) != labels).sum(), loss.new_tensor(len(labels))])
        loss, wrong, count = self.processes.sum(sums).tolist()
        return (loss / count if math.isfinite(loss) else None), wrong / count

    def save(self) -> None:
        """Write the checkpoint, in the first process; the others wait, so that none runs ahead of what is kept."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise DivergenceError(f"a weight is not finite after step {self.step}: training stops, {self._kept()}")
        if self.out is not None and self.processes.rank == 0:
            state = {
                "step": self.step, "sums": self.sums, "history": self.history, "seconds": self.seconds,
                "identity": self.identity, "scaler": self.scaler.state_dict(),
            }  # fmt: skip
            checkpoint.save(self.out, self._tensors(), state)
        self.processes.wait()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for index, parameter in enumerate(self.model.parameters()):
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{index}"] = buffer
        return tensors

    def _resume(self) -> None:
        found = checkpoint.load(self.out) if self.out is not None else None
        if found is None:
            return
        tensors, state = found
        wrong = sorted(key for key, value in self.identity.items() if state["identity"].get(key) != value)
        if wrong:
            had = ", ".join(f"{key}={state['identity'].get(key)}" for key in wrong)
            why = "; a run cannot be made longer, because its rates depend on the number of epochs" if "epochs" in wrong else ""
            raise ArgumentError(f"{self.out} holds another run ({had}): give the same settings, or another directory{why}")
        try:
            self.model.load_state_dict(_part(tensors, "model."))
        except RuntimeError as error:  # of a file of the user's, which makes another network now
            reason = " ".join(str(error).split())
            raise ArgumentError(f"{self.out} holds a run of another network ({reason}): give another directory") from error
        if self.average is not None:
            self.average.load_state_dict(_part(tensors, "average."))
        momenta = _part(tensors, "momentum.")
        for index, parameter in enumerate(self.model.parameters()):
            if (saved := momenta.get(str(index))) is not None:  # laid out as the parameter, as the optimizer's own is
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.sums = state["step"], state["sums"]
        self.history, self.seconds = state["history"], state["seconds"]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _decisive(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if key not in FREE}


def _steps(data: Data, settings: Settings, world: int) -> int:
    """Steps in an epoch."""
    count = data.counts()[0]
    if settings.batch > count:
        raise ArgumentError(f"batch must be at most {count}, the training images of {data.name}, got {settings.batch}")
    if settings.batch % world:
        raise ArgumentError(f"batch must be a multiple of the {world} processes, got {settings.batch}")
    return count // settings.batch


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")
