"""What runs under a sanitizer (``python -m _under_sanitizer``): ``LIBRARY SUBJECT FIRST COUNT``, or ``LIBRARY planted FAULT``.

Prints each case before it is tried, so that the last line names the one that the sanitizer ended; then how many there were.
"""

import ctypes
import random
from collections.abc import Callable, Iterator

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, assume

import fastres
from fastres.kernels import native
from fastres.ops import REGISTRY
from fastres.ops._conv_cpu import lacks
from reliability import calls, frozen
from reliability.parity import backward, forward

Case = tuple[str, Callable[[], object]]


def of_ops(seed: int, count: int, names: tuple[str, ...] = calls.OPS) -> Iterator[Case]:
    """Calls of all ops in memory that ends where the tensor does, forward and backward, on the native backend."""
    calls._ZONE = 0
    native_ops = {name for name, op in REGISTRY.items() if any(backend.name == "cpu" for backend in op.backends)}
    names = tuple(name for name in names if name in native_ops)
    found: list[calls.Call] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
    )
    @hypothesis.given(calls.calls(names, 8))
    def draw(call: calls.Call) -> None:
        backend = next(b for b in REGISTRY[call.op].backends if b.name == "cpu")
        assume(backend.why_not(*call.arguments()) is None)
        found.append(call)

    draw()
    for call in found[:count]:
        yield str(call), lambda call=call: both(call.op, call.arguments(), call.seed)


def both(name: str, args: list, seed: int) -> None:
    with fastres.use(**{name: "cpu"}):
        forward(REGISTRY[name], args, seed)
    backward(REGISTRY[name], args, seed)  # what the native backward refuses, PyTorch's own does


def of_convolutions(seed: int, count: int) -> Iterator[Case]:
    """Training convolutions that the native kernels take, with both gradients."""
    draw = random.Random(seed)
    for _ in range(count):
        n, channels, filters = draw.randint(2, 5), draw.choice((32, 48, 64, 80)), draw.choice((32, 48, 80, 96))
        size, padding = (draw.randint(8, 19), draw.randint(8, 19)), (draw.randint(0, 2), draw.randint(0, 2))
        dtype = draw.choice((torch.float32, torch.bfloat16))
        x = torch.randn(n, channels, *size).to(dtype, memory_format=torch.channels_last)
        weight, bias = torch.randn(filters, channels, 3, 3).to(dtype), draw.choice((None, torch.randn(filters).to(dtype)))
        args = [x, weight, bias, (1, 1), padding, (1, 1), 1]
        yield f"conv {tuple(x.shape)} {filters} {padding} {dtype} bias={bias is not None}", lambda a=args: train(a)


def train(args: list) -> None:
    x, weight, *rest = args
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = REGISTRY["conv"](x, weight, *rest)
    torch.autograd.grad(y, (x, weight), torch.randn_like(y))


def of_plans(seed: int, count: int) -> Iterator[Case]:
    """Random networks frozen in float32, bfloat16 and, every other one, in 8-bit integers, at two sizes each."""
    for index in range(seed, seed + count):
        torch.manual_seed(index)
        model = frozen.unmasked(frozen.Random(index, integers=index % 2 == 1)).eval()
        x = frozen.example(index, model.first, 4)
        yield f"network {index}: {model.kinds}, {model.end}, {tuple(x.shape)}", lambda m=model, x=x: freeze(m, x)


def freeze(model: torch.nn.Module, x: torch.Tensor) -> None:
    calibration = fastres.Calibration([x], error=None, progress=False)
    for dtype in (torch.float32, torch.bfloat16, *((torch.int8,) if model.integers else ())):
        if lacks(dtype) is None:
            made = fastres.freeze(model, x, dtype, calibration if dtype == torch.int8 else None)
            for images in (x, x[:1].transpose(2, 3).contiguous(), x.bfloat16()):
                made(images)


SUBJECTS = {"ops": of_ops, "convolutions": of_convolutions, "plans": of_plans}


def main(path: str, subject: str, *words: str) -> None:
    assert native.why_not_cpu() is None, native.why_not_cpu()
    if subject == "planted":
        planted(path, words[0])
    else:
        tried = 0
        for name, case in SUBJECTS[subject](int(words[0]), int(words[1])):
            print(name, flush=True)
            case()
            tried += 1
        print(f"tried {tried}", flush=True)


def planted(path: str, fault: str) -> None:
    print(f"planted: {fault}", flush=True)
    ctypes.CDLL(path).fastres_planted(fault.encode())
