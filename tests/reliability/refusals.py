"""R7: wrong inputs to everything public. Each must raise, naming the parameter and what it must be; none returns."""

# ruff: noqa: E501

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import test_functional
import torch
from _modules import BAD_INPUTS
from torch import nn

import fastres
import fastres.functional as FF
import fastres.nn as fnn
from fastres import models
from reliability.board import Tally, scored

Case = tuple[str, Callable[[], object], tuple[type, ...], str]
OURS = (fastres.ArgumentError, fastres.ArgumentTypeError)


def of_functions() -> Iterator[Case]:
    """Every wrong value in every place of every function."""
    for name, training in test_functional.CASES:
        for parameter, value in test_functional.arguments(name, training).items():
            for index, wrong in enumerate(test_functional.wrong_values(parameter, value)):
                if wrong is None and training and parameter.startswith("running"):
                    continue  # both may be None there

                def call(name=name, training=training, parameter=parameter, wrong=wrong) -> object:
                    return getattr(FF, name)(**test_functional.arguments(name, training) | {parameter: wrong})

                yield f"{name}({parameter}: wrong value {index}, training={training})", call, OURS, parameter


def of_blocks() -> Iterator[Case]:
    for make in (
        lambda: fnn.BasicBlock(16, 16),
        lambda: fnn.Bottleneck(16, 4),
        lambda: fnn.PreActBasicBlock(16, 16),
        lambda: fnn.ConvBNAct2d(16, 8),
    ):
        for name, x in BAD_INPUTS.items():
            yield f"{type(make()).__name__} of {name}", lambda make=make, x=x: make()(x), (Exception,), ""
    for name, make, word in (
        ("shortcut D", lambda: fnn.shortcut("D", 16, 16), "option"), ("shortcut A to fewer", lambda: fnn.shortcut("A", 16, 8), "planes"),
        ("stride 0", lambda: fnn.ZeroPadShortcut(16, 32, 0), "stride"), ("act gelu", lambda: fnn.ConvBNAct2d(16, 16, act="gelu"), "act"),
        ("plain block with a shortcut", lambda: fnn.PlainBlock(16, 16, 1, nn.Identity()), "downsample"),
        ("plain(7)", lambda: models.plain(7), "depth"), ("cifar.resnet(21)", lambda: models.cifar.resnet(21), "depth"),
        ("cifar.resnet(0)", lambda: models.cifar.resnet(0), "depth"), ("weights of no file", lambda: models.resnet18(weights="/none.pth"), "weights"),
        ("weights as a number", lambda: models.resnet18(weights=3), "weights"), ("weights that do not fit", lambda: models.resnet18(weights={"a": torch.zeros(1)}), "weights"),
        ("weights of tensors in lists", lambda: models.resnet18(weights={"conv1.weight": [1]}), "weights"),
    ):  # fmt: skip
        yield name, make, (ValueError, TypeError, fastres.UnsupportedError), word


def of_optimize() -> Iterator[Case]:
    model, x = lambda: models.cifar.resnet(8).eval(), torch.randn(1, 3, 16, 16)
    for name, call, word in (
        ("optimize(None)", lambda: fastres.optimize(None), "model"), ("optimize(tensor)", lambda: fastres.optimize(x), "model"),
        ("optimize(verify=3)", lambda: fastres.optimize(model(), verify=3), "verify"), ("optimize(verify='x')", lambda: fastres.optimize(model(), verify="x"), "verify"),
        ("optimize(dtype=int8)", lambda: fastres.optimize(model(), dtype=torch.int8), "dtype"), ("optimize(dtype='fp16')", lambda: fastres.optimize(model(), dtype="fp16"), "dtype"),
        ("optimize(memory='lo')", lambda: fastres.optimize(model(), memory="lo"), "memory"), ("optimize(skip=3)", lambda: fastres.optimize(model(), skip=3), "skip"), ("restore(None)", lambda: fastres.restore(None), "model"),
        ("refresh(3)", lambda: fastres.refresh(3), "model"), ("explain(None)", lambda: fastres.explain(None), "target"),
        ("explain('none')", lambda: fastres.explain("none"), "target"), ("explain of too few", lambda: fastres.explain("add_act", x), "args"),
        ("explain of a function without ops", lambda: fastres.explain(torch.relu, x), "target"),
        ("use of no op", lambda: fastres.use(none="cpu").__enter__(), "op"), ("use of no backend", lambda: fastres.use(add_act="none").__enter__(), "backend"),
        ("use('none')", lambda: fastres.use("none").__enter__(), "backend"),
    ):  # fmt: skip
        yield name, call, (ValueError, TypeError, fastres.UnsupportedError), word


def of_freeze() -> Iterator[Case]:
    model, x = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU()).eval(), torch.randn(2, 16, 8, 8)
    frozen = fastres.freeze(model, x)
    calibration = fastres.Calibration
    for name, wrong in {
        **{k: v for k, v in BAD_INPUTS.items() if k not in ("no height",)},
        "no images": x[:0],
        "requires grad": x.clone().requires_grad_(),
        "no height": x[:, :, :0],
    }.items():
        if name not in ("requires grad", "float16 channels"):
            yield f"freeze(example: {name})", lambda wrong=wrong: fastres.freeze(model, wrong), (Exception,), ""
        if name != "no images":
            yield f"frozen({name})", lambda wrong=wrong: frozen(wrong), (ValueError, TypeError), "x"
    quantize = {
        "number": 7, "tensor": x, "nothing": [], "text": ["x"], "channels": [x[:, :2]], "NaN": [x * float("nan")], "infinity": [x / 0], "constant": [torch.ones(1, 16, 8, 8)],
        "integers": [x.long()], "float labels": [(x, torch.ones(2))], "three labels": [(x, torch.ones(3).long())], "sparse": [x.to_sparse()], "complex": [x.to(torch.complex64)],
        "accuracy 2": calibration([x], accuracy=2.0), "accuracy text": calibration([x], accuracy="x"), "agreement -1": calibration([x], agreement=-1.0),
        "error NaN": calibration([x], error=float("nan")), "error text": calibration([x], error="x"), "accuracy without labels": calibration([x], accuracy=0.5),
        "other device": [x.to("meta")], "rank": [x[0]],
    }  # fmt: skip
    for name, wrong in quantize.items():
        yield (
            f"freeze(quantize: {name})",
            lambda wrong=wrong: fastres.freeze(model, x, quantize=wrong),
            (ValueError, TypeError),
            "quantize",
        )
    for name, call, word in (
        ("freeze(model: None)", lambda: fastres.freeze(None, x), "model"), ("freeze(frozen)", lambda: fastres.freeze(frozen, x), "model"),
        ("freeze(dtype float16)", lambda: fastres.freeze(model, x, torch.float16), "dtype"), ("freeze(dtype text)", lambda: fastres.freeze(model, x, "float32"), "dtype"),
        ("freeze(int8 without images)", lambda: fastres.freeze(model, x, torch.int8), "quantize"), ("freeze(bfloat16 and images)", lambda: fastres.freeze(model, x, torch.bfloat16, [x]), "dtype"),
        ("frozen.train()", frozen.train, "train"), ("frozen.half()", frozen.half, "cast"), ("frozen.save of float32", lambda: frozen.save("/tmp/none"), "quantised"),
        ("explain(frozen, None's shape)", lambda: fastres.explain(frozen, x[:0]), "x"), ("freeze of meta weights", lambda: fastres.freeze(nn.Conv2d(3, 4, 1, device="meta"), x), "model"),
        ("load_frozen(None)", lambda: fastres.load_frozen(None), "path"), ("load_frozen(3)", lambda: fastres.load_frozen(3), "path"),
        ("load_frozen of nothing", lambda: fastres.load_frozen("/none"), "path"), ("load_frozen of a folder", lambda: fastres.load_frozen("/"), "path"),
    ):  # fmt: skip
        yield name, call, (ValueError, TypeError, fastres.UnsupportedError), word


COMMANDS = (
    "", "none", "bench", "bench none", "bench resnet50 --batch 0", "bench resnet50 --batch -1", "bench resnet50 --batch x", "bench resnet50 --size 0",
    "bench resnet50 --dtype fp8", "bench resnet50 --mode none", "bench resnet50 --device tpu", "bench resnet50 --seconds 0", "bench resnet50 --seconds nan",
    "bench resnet50 --seconds x", "verify", "verify none", "verify torchvision:none", "verify timm:none", "verify none.py:f", "verify /none.py", "tune",
    "tune none", "explain none", "explain resnet50 --size x", "info --require none", "info more", "demo --epochs 0", "demo --epochs x", "verify resnet18:none", "verify :",
)  # fmt: skip


def of_commands() -> Iterator[Case]:
    """The command line: one line on stderr, exit code 2; run in this process, where nothing is imported anew."""
    from fastres import cli

    for command in COMMANDS:

        def call(command=command) -> None:
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    code = cli.main(command.split())
                except SystemExit as ended:
                    code = ended.code
            text = said.getvalue().strip()
            assert code == 2, f"exit code {code}"
            assert text and "\n" not in text and "Traceback" not in text, text
            raise ValueError(text)

        yield f"fastres {command}", call, (ValueError,), "fastres"


def of_environment() -> Iterator[Case]:
    """Wishes in the environment, each in a process of its own."""
    script = "import torch, fastres; fastres.functional.add_act(torch.ones(4), torch.ones(4))"
    for wish in ("none", "add_act=none", "none=cpu", "add_act=cpu=cpu"):

        def call(wish=wish) -> None:
            environment = {**os.environ, "FASTRES_BACKEND": wish}
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 1, f"exit code {done.returncode}"
            raise ValueError(done.stderr.strip().splitlines()[-1])

        yield f"FASTRES_BACKEND={wish}", call, (ValueError,), "FASTRES_BACKEND must be|must be one of"


def distinct() -> list[Case]:
    makers = (of_functions, of_blocks, of_optimize, of_freeze, of_commands, of_environment)
    return [case for make in makers for case in make()]


@scored(
    "R7",
    "wrong inputs to functions, blocks, builders, optimize, freeze, files, commands: all refused in words",
    full=900,
    short=120,
)
def wrong_inputs(tally: Tally, count: int) -> None:
    import re

    cases = distinct()
    rest = [case for case in cases if not case[0].startswith("FASTRES_BACKEND")]
    for name, call, kinds, word in (
        cases if count >= len(cases) or count >= 900 else rest[:: max(1, len(rest) // count)]
    ):
        with tally.case(name):
            try:
                result = call()
            except kinds as error:
                assert re.search(word, str(error)), f"does not name {word}: {error}"
            else:
                raise AssertionError(f"returned {type(result).__name__}")
