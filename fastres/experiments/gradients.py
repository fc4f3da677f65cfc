"""The mathematics of identity shortcuts on a real network, and the gradient that reaches each block.

With pre-activation blocks x_L = x_l + Σ F(x_i) (He et al. 2016b, equation 4), so the gradient at x_l is the gradient at x_L
plus what comes through the sum (equation 5): the first term passes every block unchanged. Where option A changes the size,
"unchanged" means its own linear map.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import terminal
from fastres.errors import ArgumentError
from fastres.experiments import report
from fastres.experiments.degradation import PLAIN, RESIDUAL, Study, network
from fastres.models import cifar
from fastres.train import Data, Trainer, checkpoint

DEPTH = 56
PREACT = "pre-activation"
ROUNDING = 1e-10  # of float64 through a few hundred layers, relative to the largest value
BATCH = 64


def run(study: Study, *, quiet: bool = False) -> dict[str, Any]:
    """Check the identities, measure the gradients before and during training; writes ``gradients.json`` and ``.png``."""
    if study.family != "cifar":
        raise ArgumentError("--gradients needs the CIFAR family, whose pre-activation networks have identity shortcuts")
    terminal.need("--gradients", "matplotlib")
    images = study.load()
    study.out.mkdir(parents=True, exist_ok=True)
    keys = [(0, index) for index in range(min(BATCH, images.counts()[0]))]
    batch = images.train.__getitems__(keys)  # type: ignore[attr-defined]
    networks = (PLAIN, RESIDUAL, PREACT)
    with terminal.Progress("gradients", 3 * study.settings.epochs + 1, quiet=quiet) as progress:
        progress.step("the unrolled sum and its gradient")
        identities = verify(make(PREACT, images), *batch)
        norms = {kind: _during_training(study, images, kind, batch, progress) for kind in networks}
    result = {"depth": DEPTH, "seed": study.seeds[0], "identities": identities, "norms": norms, "ok": identities["ok"]}
    checkpoint.write_json(study.out / "gradients.json", result)
    plot(study.out / "gradients.png", result)
    if not quiet:
        _print(result)
        print(f"wrote {study.out / 'gradients.json'} and {study.out / 'gradients.png'}")
    return result


def make(kind: str, images: Data, depth: int | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    depth = depth or DEPTH
    if kind == PREACT:
        return cifar.preact_resnet(depth, len(images.classes), "A", images.channels, bottleneck=False)
    return network(kind, depth, "cifar", len(images.classes), images.channels)


def verify(model: Any, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Check both equations on a pre-activation network of two-layer blocks, in float64, from its first block on.

    The branches F are computed from their layers, independently of the blocks that the network runs.
    """
    model = copy.deepcopy(model).double().train()
    found = blocks(model)
    states = [model.conv1(x.double()).detach().requires_grad_()]
    for block in found:
        states.append(block(states[-1]))
    first, last = states[0], states[-1]
    logits = model.fc(torch.flatten(model.avgpool(model.relu(model.bn(last))), 1))
    at_first, at_last = torch.autograd.grad(F.cross_entropy(logits, labels), (first, last))
    carried, branches = first, torch.zeros_like(first)  # x_l, and the sum of F(x_i), both in the size of the block
    for block in found:
        branches = identity(block, branches) + branch(block, carried + branches)
        carried = identity(block, carried)
    (kept,) = torch.autograd.grad(carried, first, at_last, retain_graph=True)
    (through,) = torch.autograd.grad(branches, first, at_last)
    forward, backward = _distance(last, carried + branches), _distance(at_first, kept + through)
    return {
        "blocks": len(found), "sum error": forward, "gradient error": backward, "must be at most": ROUNDING,
        "gradient at the last block": float(at_last.norm()), "identity term at the first": float(kept.norm()),
        "gradient at the first block": float(at_first.norm()), "ok": max(forward, backward) <= ROUNDING,
    }  # fmt: skip


def blocks(model: nn.Module) -> list[Any]:
    return [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]  # type: ignore[union-attr]


def identity(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def branch(block: Any, x: Tensor) -> Tensor:
    """F(x) of a pre-activation block of two layers, with batch statistics, in plain PyTorch."""
    out = x
    for norm, convolution in ((block.bn1, block.conv1), (block.bn2, block.conv2)):
        out = F.relu(F.batch_norm(out, None, None, norm.weight, norm.bias, training=True, eps=norm.eps))
        out = F.conv2d(out, convolution.weight, None, convolution.stride, convolution.padding)
    return out


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


def norms(model: nn.Module, x: Tensor, labels: Tensor) -> list[float]:
    """The norm of the loss's gradient at the output of every block."""
    model = copy.deepcopy(model).train()
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for block in blocks(model):
        block.register_forward_hook(keep)
    F.cross_entropy(model(x), labels).backward()
    return [float(output.grad.norm()) for output in outputs if output.grad is not None]


def _during_training(
    study: Study, images: Data, kind: str, batch: tuple[Tensor, Tensor], progress: terminal.Progress
) -> dict[str, list[float]]:
    """The norms by epoch: before training, after the first epoch, half-way, and at the end."""
    epochs, seed = study.settings.epochs, study.seeds[0]
    model = make(kind, images, seed=seed)
    found = {"0": norms(model, *batch)}

    def told(row: dict[str, Any]) -> None:
        progress.step(f"{kind} {DEPTH}, epoch {row['epoch']}: training error {row['train_error']:.1%}")
        if row["epoch"] in (1, epochs // 2, epochs):
            found[str(row["epoch"])] = norms(trainer.model, *batch)

    trainer = Trainer(model, images, replace(study.settings, seed=seed), told=told)
    trainer.run()
    return found


def _print(result: dict[str, Any]) -> None:
    checked = result["identities"]
    state = "ok    " if checked["ok"] else "FAILED"
    print(
        f"{state} over {checked['blocks']} blocks the unrolled sum is the forward pass but for {checked['sum error']:.1e},"
        f" and the gradient at the first block holds the identity term but for {checked['gradient error']:.1e}"
    )
    for kind, by_epoch in result["norms"].items():
        for epoch, values in by_epoch.items():
            print(f"{kind}, epoch {epoch}: gradient at the first block {values[0]:.2e}, at the last {values[-1]:.2e}")


def plot(path: Path, result: dict[str, Any]) -> None:
    """The gradient's norm at every block, a panel for each kind of network, a line for each epoch."""
    pyplot = report.plotter()
    figure, axes = pyplot.subplots(1, len(result["norms"]), figsize=(12, 3.8), layout="constrained", sharey=True)
    draw: Callable[[float], Any] = pyplot.get_cmap("plasma")
    for axis, (kind, by_epoch) in zip(axes, result["norms"].items(), strict=True):
        for number, (epoch, values) in enumerate(by_epoch.items()):
            label = "before training" if epoch == "0" else f"after epoch {epoch}"
            axis.plot(range(1, len(values) + 1), values, color=draw(0.8 * number / max(1, len(by_epoch) - 1)), label=label)
        axis.set(yscale="log", xlabel="block")
        axis.set_title(f"{kind}, {result['depth']} layers", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("norm of the loss's gradient")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
