"""The commands that train: ``fastres train`` and ``fastres degradation``; their options and what they are turned into."""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastres
from fastres.errors import ArgumentError

DATA = ("digits", "cifar10", "folder")
EPOCHS = {"digits": 24, "cifar10": 164, "folder": 90}
RATES = {"digits": 0.02, "cifar10": 0.1, "folder": 0.1}


def train(arguments: argparse.Namespace) -> int:
    from fastres.experiments import trainer
    from fastres.train import Settings

    name, path = _data(arguments.data, arguments.out)
    settings = Settings(
        epochs=arguments.epochs or EPOCHS[name], batch=arguments.batch or (256 if name == "folder" else 128),
        rate=RATES[name] if arguments.rate is None else arguments.rate, momentum=arguments.momentum,
        weight_decay=arguments.weight_decay, schedule=arguments.schedule,
        warmup=trainer.warmup(arguments.model) if arguments.warmup is None else arguments.warmup,
        smoothing=arguments.label_smoothing, ema=arguments.ema, amp=arguments.amp,
        channels_last=not arguments.contiguous, sync_bn=arguments.sync_bn, seed=arguments.seed,
        workers=arguments.workers, save_steps=arguments.save_steps,
    )  # fmt: skip
    request = trainer.Request(
        arguments.model, arguments.out, name, path, arguments.size, settings, arguments.blocks, arguments.zero_init,
        arguments.strict, _device(arguments.device), tuple(arguments.log or ("csv",)),
    )  # fmt: skip
    _keep_memory()
    result = trainer.run(request, quiet=arguments.json)
    if result["rank"] == 0:
        last = result["history"][-1]
        text = f"training error {last['train_error']:.2%}, test error {last['test_error']:.2%} after {last['epoch']} epochs"
        print(json.dumps(result, indent=1) if arguments.json else f"{text}\nwrote {arguments.out / 'model.safetensors'}")
    return 0


def degradation(arguments: argparse.Namespace) -> int:
    from fastres.experiments import degradation as experiment
    from fastres.experiments import gradients, speed

    name, path = _data(arguments.data, arguments.out)
    settings = experiment.settings_for(name, arguments.quick)
    given = {"epochs": arguments.epochs, "batch": arguments.batch, "rate": arguments.rate, "amp": arguments.amp}
    settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
    depths = experiment.QUICK_DEPTHS if arguments.quick else experiment.DEPTHS
    study = experiment.Study(
        arguments.out, name, path, arguments.family, tuple(sorted(set(arguments.depths or depths[arguments.family]))),
        tuple(range(arguments.seeds)), arguments.blocks, settings, arguments.size, _device(arguments.device), arguments.strict,
    )  # fmt: skip
    what = gradients.run if arguments.gradients else speed.run if arguments.speed else experiment.run
    _keep_memory()
    result = what(study, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


def in_order(words: Sequence[str]) -> list[str]:
    """The words of a command line, --data with its own moved to the end: argparse would give it a MODEL behind them too."""
    words = list(words)
    if "--data" in words:
        start = words.index("--data")
        kind, path = [*words[start + 1 : start + 3], "-", "-"][:2]
        end = start + 1 + (not kind.startswith("-")) + (kind not in ("-", "digits") and not path.startswith("-"))
        words = [*words[:start], *words[end:], *words[start:end]]
    return words


def _data(words: Sequence[str], out: Path) -> tuple[str, Path | None]:
    """``digits``, or the kind and the path of a user's images."""
    name, *rest = words
    if name not in DATA or len(rest) != (name != "digits"):
        raise ArgumentError(f"--data must be digits, cifar10 PATH or folder PATH, got {' '.join(words)}")
    if name == "folder" and out.resolve().is_relative_to(Path(rest[0]).resolve()):
        raise ArgumentError(f"--out must be outside of {rest[0]}, where it would count as a class of images, got {out}")
    return name, Path(rest[0]) if rest else None


def _keep_memory() -> None:
    """A command owns its process: what a step frees serves the next one, where the C library can do that."""
    if platform.libc_ver()[0] == "glibc":
        fastres.reuse_memory()


def _device(name: str | None) -> str:
    import torch

    from fastres.errors import UnsupportedError

    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def add(command: Callable[..., Any], parser: type[argparse.ArgumentParser], positive: Callable[[str], int]) -> None:
    """Add both commands with their options."""
    common = _common(parser, positive)
    training = command(train, "Train a network by name on your own images, or resume a run where it stopped.", common)
    _train_options(training, positive)
    study = command(degradation, "Train plain and residual networks of growing depth: do they degrade?", common)
    option = study.add_argument
    option("--out", type=Path, default=Path("degradation"), help="directory for all results (default: degradation)")
    option("--quick", action="store_true", help="two depths and fewer epochs")
    option("--family", choices=("cifar", "imagenet"), default="cifar", help="6n + 2 layers, or 18 to 152 (default: cifar)")
    option("--depths", type=positive, nargs="+", help="layers (default: 20 32 44 56 110, quick: 20 110)")
    option("--seeds", type=positive, default=3, help="number of seeds, counted from 0 (default: 3)")
    option("--gradients", action="store_true", help="instead: the unrolled sum and the gradient at every block")
    option("--speed", action="store_true", help="instead: time epochs with torch's blocks and fastres's, in turns")


def _common(parser: type[argparse.ArgumentParser], positive: Callable[[str], int]) -> argparse.ArgumentParser:
    about = parser(add_help=False)
    text = "digits (scikit-learn's, the default), cifar10 PATH (unpacked, python or binary), or folder PATH (of images)"
    about.add_argument("--data", nargs="+", default=["digits"], metavar=("KIND", "PATH"), help=text)
    about.add_argument("--size", type=positive, help="height and width of the images (default: the network's usual size)")
    about.add_argument("--strict", action="store_true", help="refuse a folder with images that cannot be read")
    about.add_argument("--epochs", type=positive, help="default: 24 for digits, 164 for cifar10, 90 for a folder")
    about.add_argument("--batch", type=positive, help="images per step, over all processes (default: 128, folders 256)")
    about.add_argument("--rate", type=_number(0, 100), help="learning rate (default: 0.1, digits 0.02)")
    about.add_argument("--amp", choices=("bf16", "fp16"), help="compute in lower precision under autocast")
    about.add_argument("--blocks", choices=("fastres", "torch"), default="fastres", help="default: fastres")
    about.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    return about


def _train_options(training: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    add = training.add_argument
    add("model", metavar="MODEL", help="resnet50, cifar.resnet20, ..., torchvision:NAME, timm:NAME, or path.py:factory")
    add("--out", type=Path, default=Path("train"), help="directory for checkpoint, log and weights (default: train)")
    add("--momentum", type=_number(0, 1), default=0.9, help="default: 0.9")
    add("--weight-decay", type=_number(0, 1), default=1e-4, help="default: 1e-4")
    add(
        "--schedule", choices=("step", "plateau", "cosine"), default="step",
        help="step (default): divide the rate by ten at half and three quarters; plateau: when the test error stops falling",
    )  # fmt: skip
    add("--warmup", type=_number(0, 1e6), help="epochs at a tenth of the rate (default: 1 for CIFAR networks of 110+ layers)")
    add("--label-smoothing", type=_number(0, 1), default=0.0, help="default: 0")
    add("--ema", type=_number(0, 1), help="decay of a moving average of the weights, which is evaluated and saved too")
    add("--zero-init", action="store_true", help="start each residual block as its shortcut")
    add("--contiguous", action="store_true", help="keep the plain memory format instead of channels_last")
    add("--sync-bn", action="store_true", help="batch norm statistics over all processes of torchrun")
    add("--seed", type=_whole(-(2**63), 2**63 - 1), default=0, help="default: 0")
    add("--workers", type=_whole(0, 256), default=0, help="processes that load images (default: 0)")
    add("--save-steps", type=positive, help="also write a checkpoint every so many steps (default: after each epoch)")
    add("--log", action="append", choices=("csv", "tensorboard"), help="may be repeated (default: csv)")


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse
