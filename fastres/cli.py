"""The command line ``fastres`` (= ``python -m fastres``). Exit codes: 0 fine, 1 a check failed, 2 a wrong request.

Results go to stdout, as JSON alone with ``--json``; progress and messages to stderr.
"""

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastres
from fastres import cli_training
from fastres.dispatch import GPU_KERNELS
from fastres.errors import DivergenceError, UnsupportedError, VerificationError

MODES = ("inference", "training")


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (try {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(cli_training.in_order(sys.argv[1:] if argv is None else argv))
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("fastres: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read stdout has gone; Python would complain while it exits
        return 1
    except Exception as error:  # the edge to the user: one line, and where it came from on demand
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"fastres {arguments.command}: {_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, (DivergenceError, VerificationError)) else 2


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    expected = isinstance(error, (ValueError, UnsupportedError, VerificationError, DivergenceError, OSError))
    return text if expected and text else f"{type(error).__name__}: {text} (--debug shows where)"


def info(arguments: argparse.Namespace) -> int:
    from fastres import info

    data = info.collect()
    missing = [backend for backend in arguments.require if not info.live(backend)]
    _show(arguments, data | {"missing": missing}, info.text(data))
    for backend in missing:
        print(f"fastres info: backend {backend} is required and runs no op here", file=sys.stderr)
    return 1 if missing else 0


def demo(arguments: argparse.Namespace) -> int:
    from fastres.experiments import demo

    result = demo.run(arguments.out, epochs=arguments.epochs, quick=arguments.quick, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


def bench(arguments: argparse.Namespace) -> int:
    from fastres import info
    from fastres.experiments import report
    from fastres.experiments.compare import compare
    from fastres.experiments.rivals import INFERENCE, TRAINING

    if not arguments.json:
        report.need_tables()
    if arguments.out is not None:
        report.need_plots()
        arguments.out.mkdir(parents=True, exist_ok=True)  # or fail now
    training = arguments.mode == "training"
    ways, subject = TRAINING if training else INFERENCE, _subject(arguments)
    with _progress(arguments, "bench", len(ways) + 2) as step:
        rows = compare(subject, ways, training=training, seconds=arguments.seconds, step=step)
    data = {"model": subject.label, "mode": arguments.mode, **info.versions(), **info.machine(), "rows": rows}
    if arguments.out is not None:
        data["files"] = report.save(arguments.out, f"bench-{subject.name.replace(':', '-').replace('/', '-')}", data)
    if arguments.json:
        print(json.dumps(data, indent=1))
    else:
        report.table(f"{subject.label}, {arguments.mode}", rows, f"{data['cpu']}, torch {data['torch']}")
        for path in data.get("files", ()):
            print(path)
    return 0 if all(row.get("ok") for row in rows if row["rival"] == "fastres") else 1


def verify(arguments: argparse.Namespace) -> int:
    from fastres.experiments.verify import verify

    subject = _subject(arguments)
    with _progress(arguments, "verify", 4) as step:
        result = verify(subject, training=arguments.mode == "training", step=step)
    state = "passed" if result["ok"] else "FAILED"
    lines = [f"{subject.label}, {arguments.mode}: {state}"]
    own, allowed = f"torch's own {result['torch_error']:.3g}", f"allowed {result['allowed']:.3g}"
    lines.append(f"  error {result['error']:.3g}, {own}, {allowed}")
    lines.append(f"  restore gives back the same bits: {'yes' if result['restored'] else 'NO'}")
    _show(arguments, result, "\n".join(lines))
    return 0 if result["ok"] else 1


def tune(arguments: argparse.Namespace) -> int:
    from fastres import tune, tuner

    subject = _subject(arguments)
    model = fastres.optimize(subject.model.train(arguments.mode == "training"))
    x = _channels_last(subject.x)
    with _progress(arguments, "tune", None) as step:
        session = tuner.tune_model(
            model,
            x,
            seconds=arguments.seconds,
            store=not arguments.dry_run,
            step=step,
        )
    data = session.to_dict() | {"file": None if arguments.dry_run else str(tune.cache_file(x.device))}
    lines = [f"{r.chosen.backend:8} {r.speedup:6.2f}x over torch  {r.key}" for r in session.results]
    for op, backends in data["discarded"].items():
        lines += [f"discarded: {backend} for {op}, {reason}" for backend, reason in backends.items()]
    lines.append("nothing stored (--dry-run)" if arguments.dry_run else f"stored in {data['file']}")
    _show(arguments, data, "\n".join(lines))
    return 1 if data["discarded"] else 0


def _channels_last(x: Any) -> Any:
    """An input in the memory format in which an optimised model is used."""
    import torch

    return x.contiguous(memory_format=torch.channels_last)


def explain(arguments: argparse.Namespace) -> int:
    import torch

    subject = _subject(arguments)
    model = fastres.optimize(subject.model.train(arguments.mode == "training"))
    with torch.set_grad_enabled(model.training):
        report = fastres.explain(model, _channels_last(subject.x))
    _show(arguments, {**report.to_dict(), "model": subject.label}, str(report))
    return 0


def _show(arguments: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data, indent=1) if arguments.json else text)


def _subject(arguments: argparse.Namespace) -> Any:
    from fastres.experiments.subject import load

    return load(
        arguments.model,
        batch=arguments.batch,
        size=arguments.size,
        dtype=arguments.dtype,
        device=arguments.device,
    )


@contextlib.contextmanager
def _progress(arguments: argparse.Namespace, title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Progress of a command, as a function to be called at every step; silent with --json."""
    from fastres.terminal import Progress

    with Progress(title, total, quiet=arguments.json) as progress:

        def step(text: str, total: int | None = None) -> None:
            progress.total = total or progress.total
            progress.step(text)

        yield step


def _parser() -> _Parser:
    parser = _Parser(prog="fastres", description="Residual networks in PyTorch, faster.")
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print only JSON on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    a_model = _about_a_model()

    def command(run: Callable[[argparse.Namespace], int], text: str, *about: _Parser) -> _Parser:
        added = commands.add_parser(run.__name__, help=text, description=text, parents=[*about, common])
        added.set_defaults(run=run)
        return added

    require = command(info, "Show versions, what was built, and which backend runs each op or why not.")
    require.add_argument(
        "--require", action="append", default=[],
        choices=(*GPU_KERNELS, "cpu", "onednn"),
        help="exit with status 1 if this backend runs no op here",
    )  # fmt: skip
    show = command(demo, "Train and run residual networks on real images, in plain PyTorch and with fastres.")
    show.add_argument("--out", type=Path, default=Path(), help="directory for demo.png and demo.json (default: here)")
    show.add_argument("--epochs", type=_positive, default=None, help="epochs of each training")
    show.add_argument("--quick", action="store_true", help="a shorter training and fewer measurements")
    cli_training.add(command, _Parser, _positive)
    measure = command(bench, "Compare parity and speed with eager PyTorch and torch.compile.", a_model)
    measure.add_argument("--out", type=Path, help="directory for a JSON file and a plot")
    measure.add_argument("--seconds", type=_seconds, default=10.0, help="time for the measurement (default: 10)")
    command(verify, "Compare the optimised model's error against float64 with PyTorch's own.", a_model)
    tuning = command(tune, "Validate every backend on this device and keep the fastest for each call.", a_model)
    tuning.add_argument("--seconds", type=_seconds, default=0.5, help="time per call (default: 0.5)")
    tuning.add_argument("--dry-run", action="store_true", help="store nothing")
    command(explain, "Show for each module which kernel runs, or why it was left alone.", a_model)
    return parser


def _about_a_model() -> _Parser:
    about = _Parser(add_help=False)
    text = "of fastres.models (resnet50, cifar.resnet20), torchvision:NAME, timm:NAME, or path.py:factory"
    about.add_argument("model", metavar="MODEL", help=text)
    about.add_argument("--batch", type=_positive, default=1, help="images (default: 1)")
    about.add_argument(
        "--size", type=_positive, default=None, help="height and width (default: 224, CIFAR networks 32)"
    )
    about.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    about.add_argument("--mode", choices=MODES, default="inference", help="default: inference")
    about.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if available")
    return about


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value
