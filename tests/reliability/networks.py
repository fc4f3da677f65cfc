"""R8 and R9: whole networks, ours and torchvision's optimised, against plain PyTorch; their state dicts both ways."""

# ruff: noqa: E501

import copy
import functools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from _modules import _PLAIN, judge, plainly
from torch import nn

import fastres
from fastres import models
from fastres import nn as fnn
from reliability.board import Tally, scored

Kind = tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None, int]
SHORT = ("cifar.resnet20", "cifar.plain20", "preactivation 20", "group norm", "frozen batch norm", "dilated")


def kinds() -> dict[str, Kind]:
    """By name: how ours is built and how torchvision's is, where it has one; the seed of images without a ReLU at its edge."""
    from _torchvision import NETWORKS, torchvision
    from test_models import CLEAR, OPTIONS

    theirs, found = torchvision.models, {}
    for name in NETWORKS:
        both = (partial(getattr(home, name), num_classes=10) for home in (models, theirs))
        found[name] = (*both, CLEAR.get(name, 1))
    titles = {"group norm": "group norm", "frozen": "frozen batch norm"}
    for name, options in OPTIONS.items():
        ours = partial(models.ResNet, fnn.Bottleneck, [1, 1, 1, 1], 10, **options)
        other = partial(theirs.ResNet, theirs.resnet.Bottleneck, [1, 1, 1, 1], 10, **options)
        found[titles.get(name, name)] = (ours, other, 1)
    found |= {f"cifar.resnet{depth}": (partial(models.cifar.resnet, depth), None, 1) for depth in (20, 56)}
    found["cifar.resnet20 with shortcuts B"] = (partial(models.cifar.resnet, 20, shortcut="B"), None, 1)
    found["cifar.plain20"] = (partial(models.cifar.plain, 20), None, 1)
    found["preactivation 20"] = (partial(models.cifar.preact_resnet, 20, bottleneck=False), None, 1)
    found["preactivation 29"] = (partial(models.cifar.preact_resnet, 29), None, 1)
    found["plain 18"] = (partial(models.plain, 18, num_classes=10), None, 1)
    found["vgg16_bn"] = (partial(models.vgg16_bn, num_classes=10), partial(theirs.vgg16_bn, num_classes=10), 1)
    return found


def chosen(count: int) -> dict[str, Kind]:
    every = kinds()
    return {name: every[name] for name in SHORT} if count < len(every) else every


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Of one seed; without dropout, which draws other numbers in other dtypes."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.requires_grad_(False)  # has no effect before batch norm: a gradient of rounding errors
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of the network whose blocks run module by module."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) in _PLAIN:
            module.forward = functools.partial(plainly, module)
    return twin


def images(size: tuple, seed: int) -> torch.Tensor:
    """channels_last, so that all convolve by the same kernels: those of NCHW round less."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).contiguous(memory_format=torch.channels_last)


def trained(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict:
    """One training step: output, gradients, and what the step leaves in buffers."""
    model.zero_grad(set_to_none=True)
    x = x.to(dtype, copy=True).requires_grad_()
    y = model.train()(x)
    y.backward(torch.ones_like(y).cumsum(1))
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return found | {"output": y.detach(), "gradient of x": x.grad} | buffers


def judge_step(model: nn.Module, plain: tuple[nn.Module, nn.Module], size: tuple, seed: int) -> None:
    """A training step, against float32 and float64; on other images where, on this processor, rounding decides a ReLU."""
    start = copy.deepcopy(model.state_dict())
    for trial in (seed, 3, 4):
        for network in (model, *plain):
            network.load_state_dict(start)
        x = images(size, trial)
        with fastres.use("torch"):
            steps = [trained(network, x, dtype) for network, dtype in zip(plain, (torch.float32, torch.float64), strict=True)]
        try:
            judge([(trained(model, x, torch.float32), *steps)], torch.float32)
            break
        except AssertionError:
            if trial == 4:
                raise


def evaluated(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict:
    with torch.no_grad():
        return {"output": model.eval()(x.to(dtype))}


@scored("R8", "networks: a training step, then logits, ours and others' optimised", full=69, short=18)
def networks(tally: Tally, count: int) -> None:
    for name, (make, other, seed) in chosen(count // 3).items():
        ours = built(make)
        theirs = plain_twin(ours) if other is None else built(other)
        exact = copy.deepcopy(theirs).double() if other is not None else plain_twin(copy.deepcopy(ours).double())
        subjects = {"ours": ours, "optimised": fastres.optimize(copy.deepcopy(ours if other is None else theirs), channels_last=False)}
        size = (16, 16) if name.startswith(("cifar", "pre")) else (32, 32) if "vgg" in name else (49, 49)
        for who, model in subjects.items():
            with tally.case(f"{name} {who}: training step"):
                judge_step(model, (theirs, exact), (3, 3, *size), seed)
        state = exact.state_dict()
        fresh = images((6, 3, *size), seed + 1)
        for model in (theirs, exact, *subjects.values()):
            model.load_state_dict(state)
        with fastres.use("torch"):
            logits = [evaluated(m, fresh, d) for m, d in ((theirs, torch.float32), (exact, torch.float64))]
        with tally.case(f"{name}: logits"):
            for model in subjects.values():
                judge([(evaluated(model, fresh, torch.float32), *logits)], torch.float32)


def same_bytes(a: dict, b: dict) -> None:
    assert list(a) == list(b), "names differ"
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@scored("R9", "state dicts of networks both ways, strictly, byte for byte, through files", full=92, short=24)
def states(tally: Tally, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, other, _) in chosen(count // 4).items():
            ours = built(make)
            theirs = built(other) if other is not None else copy.deepcopy(ours)
            torch.manual_seed(1)
            state = {k: torch.randn(v.shape).to(v.dtype) for k, v in theirs.state_dict().items()}
            with tally.case(f"{name}: the weights of a seed"):
                same_bytes(ours.state_dict(), theirs.state_dict())
            with tally.case(f"{name}: theirs to ours"):
                theirs.load_state_dict(state)
                ours.load_state_dict(theirs.state_dict(), strict=True)
                same_bytes(ours.state_dict(), state)
            with tally.case(f"{name}: ours to theirs, optimised"):
                optimized = fastres.optimize(ours, channels_last=False)
                same_bytes(optimized.state_dict(), state)
                theirs.load_state_dict(optimized.state_dict(), strict=True)
                same_bytes(theirs.state_dict(), state)
            with tally.case(f"{name}: through files"):
                paths = Path(folder) / "a.pth", Path(folder) / "a.safetensors"
                torch.save(state, paths[0])
                safetensors.torch.save_file(state, paths[1])
                for path in paths:
                    for value in ours.state_dict().values():
                        value.zero_()
                    models.load_weights(ours, path)
                    same_bytes(ours.state_dict(), state)
