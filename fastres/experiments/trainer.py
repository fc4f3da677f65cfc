"""``fastres train``: a network by name, trained on a user's images; logs and final weights."""

import csv
import io
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import fastres
from fastres import info, terminal
from fastres.errors import ArgumentError
from fastres.experiments import subject
from fastres.experiments.twin import torch_twin
from fastres.models import resnet
from fastres.nn import PlainBlock, PlainBottleneck
from fastres.train import Data, Settings, Trainer, checkpoint, schedule
from fastres.train import data as datasets
from fastres.train.processes import Processes, started


@dataclass(frozen=True)
class Request:
    """What ``fastres train`` was asked for."""

    model: str
    out: Path
    data: str = "digits"
    path: Path | None = None
    size: int | None = None
    settings: Settings = field(default_factory=Settings)
    blocks: str = "fastres"
    zero_init: bool = False
    strict: bool = False
    device: str = "cpu"
    logs: tuple[str, ...] = ("csv",)

    @property
    def small(self) -> bool:
        return self.model.startswith("cifar.")


def run(request: Request, *, quiet: bool = False) -> dict[str, Any]:
    """Train, from the last checkpoint in ``out`` if there is one; writes logs and ``model.safetensors`` there."""
    if "tensorboard" in request.logs:
        terminal.need("--log tensorboard", "tensorboard", extra="train")
    build = subject.builder(request.model)
    request.out.mkdir(parents=True, exist_ok=True)  # or fail now
    with ExitStack() as stack:
        processes, device = stack.enter_context(started(request.device))
        quiet = quiet or processes.rank > 0
        if device.type == "cuda":
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        data = load(request)
        if (skipped := data.notes.get("skipped")) and not quiet:
            terminal.note(f"{len(skipped)} images cannot be read and are left out, {skipped[0]} first")
        log = stack.enter_context(_Log(request, quiet))
        trainer = make(request, build, data, device, processes, log)
        if not quiet:
            terminal.note(_about(request, trainer))
        log.begin(trainer)
        history = trainer.run()
        if processes.rank == 0:
            _save(request.out, trainer)
    result = {
        **info.versions(), **info.machine(), "model": request.model, "blocks": request.blocks,
        "rank": processes.rank, "processes": processes.world,
        "data": {"name": data.name, "classes": len(data.classes), "images": list(data.counts()), **data.notes},
        "settings": asdict(trainer.settings), "history": history, "seconds": trainer.seconds,
    }  # fmt: skip
    if processes.rank == 0:
        checkpoint.write_json(request.out / "train.json", result)
    return result


def load(request: Request) -> Data:
    """The images that were asked for, in the size and the colours that the network takes."""
    seed = request.settings.seed
    if request.data == "digits":
        return datasets.digits(request.size or (8 if request.small else 32), 1 if request.small else 3, seed)
    if request.path is None:
        raise ArgumentError(f"--data {request.data} needs the path of the images: --data {request.data} PATH")
    if request.data == "cifar10":
        return datasets.cifar10(request.path, seed)
    return datasets.folder(request.path, request.size or (32 if request.small else 224), request.strict, seed)


def make(
    request: Request, build: Callable[[int, int], nn.Module], data: Data, device: torch.device, processes: Processes,
    log: "_Log",
) -> Trainer:  # fmt: skip
    """The network, as its blocks were wished, in a trainer."""
    torch.manual_seed(request.settings.seed)
    model = build(len(data.classes), data.channels)
    if request.zero_init:
        zero_last_norms(model)
    model = torch_twin(model) if request.blocks == "torch" else fastres.optimize(model)
    name = f"{request.model} of {request.blocks}{', last norms 0' if request.zero_init else ''}"
    return Trainer(
        model, data, request.settings, out=request.out, device=device, processes=processes, name=name, told=log.row
    )  # fmt: skip


def _about(request: Request, trainer: Trainer) -> str:
    """What is trained on what, and whether it begins, goes on or is finished."""
    data, settings = trainer.data, trainer.settings
    where = "scikit-learn's digits (--data names others)" if request.data == "digits" else f"{request.data} {request.path}"
    training, test = data.counts()
    size = f"{data.channels}x{data.size}x{data.size}"
    images = f"{training} training and {test} test images of {size}, {len(data.classes)} classes"
    length = f"{settings.epochs} epochs of {trainer.steps} steps on {trainer.device.type}"
    state = "" if not trainer.step else f"; continues in {request.out} after step {trainer.step}"
    if len(trainer.history) == settings.epochs:
        state = f"; {request.out} holds this run, finished"
    return f"{request.model} on {where}: {images}; {length}{state}"


def zero_last_norms(model: nn.Module) -> None:
    """``resnet.zero_last_norms``, for networks that it suits."""
    if any(isinstance(module, (PlainBlock, PlainBottleneck)) for module in model.modules()):
        raise ArgumentError("--zero-init needs shortcuts: it would stop every signal in a plain network")
    if not resnet.zero_last_norms(model):
        raise ArgumentError("--zero-init needs a network of fastres's blocks that end in a batch norm")


def warmup(model: str) -> float:
    """The paper's: an epoch, about 400 of its steps, for CIFAR networks of 110 layers and more."""
    found = subject.CIFAR.fullmatch(model)
    return 1.0 if found and int(found[2]) >= schedule.DEEP else 0.0


def _save(out: Path, trainer: Trainer) -> None:
    """The trained weights, for ``fastres.models.load_weights`` and ``weights=``."""
    networks = {"model": trainer.model} | ({} if trainer.average is None else {"average": trainer.average.module})
    for name, network in networks.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        checkpoint.write(out / f"{name}.safetensors", safetensors.torch.save(tensors))


class _Log:
    """Tells every epoch: progress on stderr, ``log.csv``, TensorBoard."""

    def __init__(self, request: Request, quiet: bool) -> None:
        self.request, self.quiet = request, quiet
        self.progress = terminal.Progress("train", request.settings.epochs, quiet=quiet)
        self.board: Any = None
        self.trainer: Trainer | None = None

    def __enter__(self) -> "_Log":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        if self.board is not None:
            self.board.close()

    def begin(self, trainer: Trainer) -> None:
        self.trainer, self.progress.done = trainer, len(trainer.history)
        if trainer.processes.rank == 0 and "tensorboard" in self.request.logs:
            (tensorboard,) = terminal.need("--log tensorboard", "torch.utils.tensorboard", extra="train")
            # What a stopped run logged after its checkpoint is dropped.
            self.board = tensorboard.SummaryWriter(str(self.request.out / "tensorboard"), purge_step=len(trainer.history) + 1)

    def row(self, row: dict[str, Any]) -> None:
        assert self.trainer is not None
        shown = (f"{key.replace('_', ' ')} {_shown(value)}" for key, value in row.items() if key != "step")
        self.progress.step(", ".join(shown))
        if self.trainer.processes.rank:
            return
        if "csv" in self.request.logs:
            checkpoint.write(self.request.out / "log.csv", _csv(self.trainer).encode())
        if self.board is not None:
            for key in row.keys() - {"epoch", "step"}:
                if row[key] is not None:
                    self.board.add_scalar(key, row[key], row["epoch"])


def _csv(trainer: Trainer) -> str:
    """The whole history: what a resumed run writes is what an undisturbed one would have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*trainer.history[0], "seconds"], lineterminator="\n")
    writer.writeheader()
    for row, seconds in zip(trainer.history, trainer.seconds, strict=True):
        writer.writerow({**row, "seconds": f"{seconds:.3f}"})
    return text.getvalue()


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
