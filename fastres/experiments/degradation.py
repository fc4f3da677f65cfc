"""The degradation study (He et al. 2016, sections 1, 4.1, 4.2): plain and residual networks of growing depth.

Every network of every seed is one run, kept as a checkpoint until it is done and as a file afterwards, so that a study that was
stopped resumes where it was.
"""

import datetime
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastres
from fastres import info, models, terminal
from fastres.errors import ArgumentError
from fastres.experiments import counts, degradation_report
from fastres.experiments.twin import torch_twin
from fastres.models import cifar
from fastres.train import Data, Settings, Trainer, checkpoint, schedule
from fastres.train import data as datasets

PLAIN, RESIDUAL = "plain", "residual"
KINDS = (PLAIN, RESIDUAL)
FILES = {"fastres": "degradation.json", "torch": "degradation-torch.json"}  # by whose blocks are trained
BLOCKS = tuple(FILES)
DEPTHS = {"cifar": (20, 32, 44, 56, 110), "imagenet": (18, 34, 50, 101, 152)}
QUICK_DEPTHS = {"cifar": (20, 110), "imagenet": (18, 34)}
SEEDS = (0, 1, 2)
MARGIN = 3.0  # a clear margin, in multiples of the spread over the seeds
# The digits get 264 steps where the paper has 64,000: at its rate of 0.1 residual networks of 110 layers and more do not
# settle in so few; at 0.02 they do. Data sets with more images use the paper's rate.
DIGITS = Settings(epochs=24, batch=128, rate=0.02)
PAPER = Settings(epochs=164, batch=128, rate=0.1)
QUICK_EPOCHS = 16


@dataclass(frozen=True)
class Study:
    """What is trained: every kind at every depth with every seed."""

    out: Path
    data: str = "digits"
    path: Path | None = None
    family: str = "cifar"
    depths: Sequence[int] = ()
    seeds: Sequence[int] = SEEDS
    blocks: str = "fastres"
    settings: Settings = field(default_factory=lambda: DIGITS)
    size: int | None = None
    device: str = "cpu"
    strict: bool = False

    def networks(self) -> list[tuple[str, int]]:
        return [(kind, depth) for depth in sorted(self.depths) for kind in KINDS]

    def load(self) -> Data:
        """The images, of the size and the number of colours that the networks take."""
        channels = 3 if self.family == "imagenet" else 1
        if self.data == "digits":
            return datasets.digits(self.size or (8 if self.family == "cifar" else 64), channels)
        if self.path is None:
            raise ArgumentError(f"--data {self.data} needs the path of the images: --data {self.data} PATH")
        if self.data == "cifar10":
            return datasets.cifar10(self.path)
        return datasets.folder(self.path, self.size or (32 if self.family == "cifar" else 224), self.strict)


def settings_for(data: str, quick: bool) -> Settings:
    settings = DIGITS if data == "digits" else PAPER
    return replace(settings, epochs=QUICK_EPOCHS) if quick else settings


def network(kind: str, depth: int, family: str = "cifar", classes: int = 10, channels: int = 3) -> nn.Module:
    """A network of the study: shortcuts of option A in the CIFAR family, of B in the ImageNet family."""
    if family == "cifar":
        make = cifar.plain if kind == PLAIN else cifar.resnet
        return make(depth, num_classes=classes, in_channels=channels)
    if depth not in DEPTHS["imagenet"]:
        raise ArgumentError(f"--depths of the ImageNet family must be of {DEPTHS['imagenet']}, got {depth}")
    if kind == PLAIN:
        return models.plain(depth, num_classes=classes)
    return getattr(models, f"resnet{depth}")(num_classes=classes)


def run(study: Study, *, quiet: bool = False) -> dict[str, Any]:
    """Run what is missing of a study; writes ``degradation.json`` and ``.png`` (``degradation-torch`` with torch's blocks) and
    prints a table. Where the study with the other blocks exists too, it also prints how far the two agree.

    The result has the error of every network, epoch and seed, and says whether the effect was there.
    """
    terminal.need("the degradation study", "matplotlib", "rich")
    images = study.load()
    for kind, depth in study.networks():  # refuse depths that do not exist before any work
        with torch.device("meta"):
            network(kind, depth, study.family, len(images.classes), images.channels)
    (study.out / "runs").mkdir(parents=True, exist_ok=True)
    plan = [(seed, kind, depth) for seed in study.seeds for kind, depth in study.networks()]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with terminal.Progress("degradation", len(plan) * study.settings.epochs, quiet=quiet) as progress:
        for seed, kind, depth in plan:
            found.setdefault((kind, depth), []).append(_one(study, images, kind, depth, seed, progress))
    result = _result(study, images, found)
    path = study.out / FILES[study.blocks]
    checkpoint.write_json(path, result)
    degradation_report.plot(path.with_suffix(".png"), result)
    if not quiet:
        degradation_report.show(result)
        (other,) = (study.out / name for blocks, name in FILES.items() if blocks != study.blocks)
        if other.is_file() and (said := degradation_report.agreement(result, json.loads(other.read_text(encoding="utf-8")))):
            print(said)
        print(f"wrote {path} and {path.with_suffix('.png')}")
    return result


def _one(study: Study, images: Data, kind: str, depth: int, seed: int, progress: terminal.Progress) -> dict[str, Any]:
    """One run: read from its file if it is done, else trained, from its last checkpoint if there is one."""
    name = f"{study.blocks}-{study.family}-{kind}{depth}-seed{seed}"
    folder, done = study.out / "runs" / name, study.out / "runs" / f"{name}.json"
    warmup = 1.0 if study.family == "cifar" and depth >= schedule.DEEP else 0.0
    settings = replace(study.settings, seed=seed, warmup=warmup)
    kept = _kept(done)

    def told(row: dict[str, Any]) -> None:
        errors = f"training error {row['train_error']:.1%}, test error {row['test_error']:.1%}"
        progress.step(f"{kind} {depth}, seed {seed}, epoch {row['epoch']}: {errors}")

    def make() -> Trainer:
        torch.manual_seed(seed)
        model = network(kind, depth, study.family, len(images.classes), images.channels)
        model = torch_twin(model) if study.blocks == "torch" else model
        return Trainer(model, images, settings, out=folder, device=torch.device(study.device), name=name, told=told)

    if kept is not None and kept["settings"] == asdict(settings) and kept["fingerprint"] == images.fingerprint:
        progress.done += settings.epochs
        return kept
    if kept is not None:
        raise ArgumentError(f"{done} was made with other settings or images: give another --out, or remove it")
    trainer = make()
    progress.done += len(trainer.history)
    history = trainer.run()
    kept = {
        "seed": seed, "settings": asdict(settings), "fingerprint": images.fingerprint,
        "history": history, "seconds": trainer.seconds,
    }  # fmt: skip
    checkpoint.write_json(done, kept)
    shutil.rmtree(folder)
    return kept


def _kept(done: Path) -> dict[str, Any] | None:
    try:
        return json.loads(done.read_bytes()) if done.is_file() else None
    except ValueError as error:
        raise ArgumentError(f"{done} cannot be read ({error}): remove it to repeat its run") from error


def _result(study: Study, images: Data, found: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    train, test = images.counts()
    shape = (images.channels, images.size, images.size)
    networks = [
        {
            "kind": kind, "depth": depth,
            **counts.beside_paper(kind, depth, study.family, network, shape, len(images.classes)),
            "runs": [_curves(run) for run in runs],
        }
        for (kind, depth), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]  # fmt: skip
    settings = {k: v for k, v in asdict(study.settings).items() if k not in ("seed", "warmup", "workers", "save_steps")}
    checks = effect(networks)
    return {
        **info.versions(), **info.machine(), "fastres": fastres.__version__, "date": datetime.date.today().isoformat(),
        "blocks": study.blocks, "family": study.family,
        "data": {"name": images.name, "training": train, "test": test, "shape": list(shape), **images.notes},
        "settings": settings, "seeds": list(study.seeds), "networks": networks,
        "checks": checks, "ok": all(check["ok"] for check in checks.values()),
    }  # fmt: skip


def _curves(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("train_loss", "train_error", "test_error")
    rows = {key: [round(row[key], 6) for row in run["history"]] for key in keys}
    return {"seed": run["seed"], **rows, "epoch_seconds": [round(second, 3) for second in run["seconds"]]}


def final(entry: dict[str, Any], key: str = "train_error") -> list[float]:
    """The last epoch's value of every seed."""
    return [run[key][-1] for run in entry["runs"]]


def spread(*entries: dict[str, Any], key: str = "train_error") -> float:
    """The widest range over the seeds, of all these networks."""
    return max(max(final(entry, key)) - min(final(entry, key)) for entry in entries)


def effect(networks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind: does the deepest network's training error exceed the shallowest one's, seed by seed?"""
    checks: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        mine = sorted((entry for entry in networks if entry["kind"] == kind), key=lambda entry: entry["depth"])
        if len(mine) < 2 or len(mine[0]["runs"]) < 2:
            continue  # nothing to compare, or no spread to compare it with
        first, last = mine[0], mine[-1]
        rises = [b - a for a, b in zip(final(first), final(last), strict=True)]
        wide, names = spread(first, last), f"{kind} {last['depth']} over {kind} {first['depth']}"
        if kind == PLAIN:
            bound, ok = {"must exceed": MARGIN * wide}, all(rise > MARGIN * wide for rise in rises)
        else:
            bound, ok = {"must be at most": wide}, all(rise <= wide for rise in rises)
        checks[f"training error, {names}"] = {"value": rises, "spread of the seeds": wide, **bound, "ok": ok}
    return checks
