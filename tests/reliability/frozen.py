"""F: random networks, frozen and optimised, against the same modules run one by one."""


import copy
import random

import torch
import torch.nn.functional as F
from _integers import emulated
from _modules import lively
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

import fastres
from fastres.budget import within_budget
from reliability.board import Tally, scored

STEPS = ("conv", "conv", "conv bn", "conv bn", "relu", "bn", "residual", "max", "average", "pad", "twice", "groups")
REAL_STEPS = (*STEPS, "enlarge", "gate", "beside", "parts", "activation")


class Random(nn.Module):
    """A chain of steps drawn from a seed, some with a residual; it ends in features, a classifier or images. Not for integers:
    convolutions in groups, values that are enlarged, gated, side by side or taken apart, activations, and results of several
    tensors."""

    def __init__(self, seed: int, integers: bool = False) -> None:
        super().__init__()
        self.integers = integers
        draw = self.draw = random.Random(seed)
        self.first = self.channels = draw.choice((1, 3, 4, 8, 16, 20))
        self.steps = nn.ModuleList()
        self.kinds = [draw.choice(STEPS if integers else REAL_STEPS) for _ in range(draw.randint(1, 7))]
        for kind in self.kinds:
            self.steps.append(getattr(self, "_" + kind.split()[0])(kind))
        self.end = draw.choice(("images", "mean", "linear", "flat relu linear"))
        self.taps = [] if integers or draw.random() < 0.7 else draw.sample(self.kinds, 1)
        self.linear = nn.Linear(self.channels, draw.choice((1, 10))) if "linear" in self.end else None

    def _conv(self, kind: str, out: int | None = None, stride: int | None = None) -> nn.Module:
        draw, channels = self.draw, self.channels
        out = out or draw.choice((1, 4, 8, 12, 16, 24, 32, 64))
        kernel = draw.choice((1, 1, 3, 3, 3, (1, 3), 5, 2))
        sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        dilation = draw.choice((1, 1, 1, 2)) if stride is None and kernel != 2 else 1
        padding = tuple(dilation * (k - 1) // 2 for k in sizes)
        conv = nn.Conv2d(
            channels, out, kernel, stride or draw.choice((1, 1, 1, 2)), padding, dilation, bias=draw.random() < 0.5
        )
        self.channels = out
        return nn.Sequential(conv, nn.BatchNorm2d(out)) if "bn" in kind else conv

    def _bn(self, kind: str) -> nn.Module:
        return nn.BatchNorm2d(self.channels, affine=self.draw.random() < 0.7, eps=self.draw.choice((1e-5, 1e-3)))

    def _relu(self, kind: str) -> nn.Module:
        return nn.ReLU(inplace=self.draw.random() < 0.5 and len(self.steps) > 0)  # the images are not written to

    def _residual(self, kind: str) -> nn.Module:
        channels = self.channels
        return nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))

    def _max(self, kind: str) -> nn.Module:
        return nn.MaxPool2d(self.draw.choice((2, 3)), self.draw.choice((1, 2)), 1, ceil_mode=self.draw.random() < 0.3)

    def _average(self, kind: str) -> nn.Module:
        return nn.AvgPool2d(3, self.draw.choice((1, 2)), 1, count_include_pad=False, ceil_mode=self.draw.random() < 0.3)

    def _pad(self, kind: str) -> nn.Module:
        self.channels += 4
        return nn.Identity()

    def _groups(self, kind: str) -> nn.Module:
        own = self.draw.choice([own for own in (2, 4, 6, 8, 12, 16, 20, 24, 40) if self.channels % own == 0] or [self.channels])
        groups = self.channels // own if not self.integers and self.channels >= 16 else 1
        return nn.Conv2d(self.channels, self.channels, 3, self.draw.choice((1, 2)), 1, groups=groups)

    def _twice(self, kind: str) -> nn.Module:
        return nn.Conv2d(self.channels, self.channels, 1)

    def _enlarge(self, kind: str) -> nn.Module:
        return nn.Conv2d(self.channels, self.channels, 3, 2, 1)

    def _gate(self, kind: str) -> nn.Module:
        return nn.Sequential(nn.Conv2d(self.channels, 4, 1), nn.ReLU(), nn.Conv2d(4, self.channels, 1))

    def _beside(self, kind: str) -> nn.Module:
        channels = self.channels
        own = self.draw.choice((1, 4, 12, 32))
        self.channels += own
        return nn.Conv2d(channels, own, 3, 1, 1)

    def _parts(self, kind: str) -> nn.Module:
        return self._bn(kind)

    def _activation(self, kind: str) -> nn.Module:
        in_place = self.draw.random() < 0.5 and len(self.steps) > 0
        choice = self.draw.choice((nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.LeakyReLU, nn.Sigmoid))
        return choice() if choice is nn.Sigmoid else choice(inplace=in_place)

    def forward(self, x):
        """The values behind the tapped kinds of steps too, if there are any, as later steps in place leave them."""
        seen = []
        for kind, step in zip(self.kinds, self.steps, strict=True):
            if kind == "residual":
                x = F.relu(step(x) + x)
            elif kind == "twice":  # one module, two places
                x = step(F.relu(step(x))) + x
            elif kind == "pad":
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))
            elif kind == "enlarge":
                x = x + F.interpolate(step(x), x.shape[2:])
            elif kind == "gate":
                x = x * step(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "beside":
                x = torch.cat([x, step(x)], 1)
            elif kind == "parts":  # two parts change places, and the first is added to the whole
                first, *others = x.split((x.shape[1] + 2) // 3, 1)
                x = torch.cat([*others, F.relu(first)], 1) + step(x)
            else:
                x = step(x)
            seen += [x] if kind in self.taps else []
        return self.last(x) if not self.taps else [*seen, {"end": self.last(x)}]

    def last(self, x):
        if self.end == "images":
            return x
        x = x.mean((2, 3))
        x = F.relu(x) if self.end == "flat relu linear" else x
        return x if self.linear is None else self.linear(x)


def example(seed: int, channels: int, batch: int = 2) -> torch.Tensor:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, draw.randint(5, 24), draw.randint(5, 24), generator=generator)
    return x.contiguous(memory_format=torch.channels_last) if seed % 2 else x


def suits(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the images are large enough for PyTorch."""
    try:
        with torch.no_grad():
            model(x)
    except RuntimeError:
        return False
    return True


def refuses(call) -> None:
    try:
        call()
    except (ValueError, RuntimeError):
        return
    raise AssertionError("images that are too small were taken")


def agrees(frozen: nn.Module, model: nn.Module, x: torch.Tensor, seed: int) -> None:
    """Within budget; of few outputs a single rounding decides, so what misses it is judged over many more images, and then
    over networks of the same layers with other weights: those of one are rounded once, in all images alike.
    """
    exact = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        with torch.no_grad():
            (own, form), (theirs, expected), (truth, _) = map(tree_flatten, (frozen(x), model(x), exact(x.double())))
        kinds = [[(y.shape, y.dtype) for y in ys] for ys in (own, theirs)]
        assert form == expected and kinds[0] == kinds[1], f"{kinds[0]}, not {kinds[1]}"
        if all(within_budget(*ys, x.dtype).ok for ys in zip(own, theirs, truth, strict=True)):
            return
        x = torch.randn(64, *x.shape[1:], generator=generator)
    rows = []
    for other in range(1, 17):
        torch.manual_seed(seed + 100_000 * other)
        model = unmasked(Random(seed)).eval()
        with torch.no_grad():
            found = [tree_leaves(y) for y in (fastres.freeze(model, x)(x), model(x), copy.deepcopy(model).double()(x.double()))]
        scales = [y.abs().max().clamp_min(1e-30) for y in found[2]]
        rows.append([[y.double().flatten() / scale for y, scale in zip(ys, scales, strict=True)] for ys in found])
    for column in zip(*(zip(*row, strict=True) for row in rows), strict=True):  # one output of all networks
        verdict = within_budget(*map(torch.cat, zip(*column, strict=True)), x.dtype)
        assert verdict.ok, f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"


def unmasked(model: nn.Module) -> nn.Module:
    """Batch norms away from their first state, so that folding, gammas of 0 and negative ones all count."""
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d) and child.num_features < 2:
            child.running_mean.fill_(0.1)
            return model
    return lively(model)


@scored("F1", "random networks frozen: other batches, sizes, layouts, copies", full=2000, short=60)
def random_networks(tally: Tally, count: int) -> None:
    for seed in range(count):
        torch.manual_seed(seed)
        model = unmasked(Random(seed)).eval()
        x = example(seed, model.first)
        with tally.case(f"seed {seed}: {model.kinds}, {model.end}, {tuple(x.shape)}"):
            if not suits(model, x):
                refuses(lambda model=model, x=x: fastres.freeze(model, x))
                continue
            frozen = fastres.freeze(model, x)
            agrees(frozen, model, x, seed)
            for other in (example(seed + 1, model.first, 1), example(seed + 2, model.first, 3).transpose(2, 3)):
                if suits(model, other):
                    agrees(frozen, model, other, seed)
                else:
                    refuses(lambda frozen=frozen, other=other: frozen(other))
            copies = zip(tree_leaves(copy.deepcopy(frozen)(x)), tree_leaves(frozen(x)), strict=True)
            assert all(torch.equal(one, other) for one, other in copies), "a copy differs"


@scored("F2", "random networks in 8-bit integers: as their integers say, the same from the file", full=600, short=20)
def random_int8(tally: Tally, count: int) -> None:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            torch.manual_seed(seed)
            model = unmasked(Random(seed, integers=True)).eval()
            x = example(seed, model.first, 4)
            with tally.case(f"seed {seed}: {model.kinds}, {model.end}, {tuple(x.shape)}"):
                if not suits(model, x):
                    refuses(lambda model=model, x=x: fastres.freeze(model, x, quantize=[x]))
                    continue
                frozen = fastres.freeze(model, x, quantize=fastres.Calibration([x], error=None, progress=False))
                y, expected = frozen(x), emulated(frozen, x)
                assert y.shape == model(x).shape and bool(y.isfinite().all())
                # The plan scales in float32: a value next to half way may fall to the other side, by one step.
                apart = (y - expected).abs() / expected.abs().max().clamp_min(1e-30)
                few = (apart > 1e-4).double().mean() < 0.02 and apart.max() < 0.1
                # A step taken early on reaches many values, each by less than a step of its own.
                assert few or apart.max() < 1 / 127, f"{apart.max():.3g} apart"
                frozen.save(path := Path(folder) / "network")
                assert torch.equal(fastres.load_frozen(path)(x), y), "the file's network differs"
