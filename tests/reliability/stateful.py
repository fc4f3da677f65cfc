"""R10: random sequences of what a user does to a model; an optimised one never differs from an untouched twin."""

# ruff: noqa: E501

import copy
import pickle
import random

import torch
from _modules import lively
from torch import nn

import fastres
from fastres import models
from fastres import nn as fnn
from fastres.budget import errors
from reliability.board import Tally, scored

LENGTH = 8


class Small(nn.Sequential):
    """A stem, a block with a projection, a block without, a classifier."""

    def __init__(self) -> None:
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            models.resnet.BasicBlock(8, 16, 2, down) if hasattr(models.resnet, "BasicBlock") else fnn.BasicBlock(8, 16, 2, down),
            fnn.BasicBlock(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


class Pair:
    """The optimised model and its twin, to which the same is done; float64, where both agree to a hair."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.twin = lively(Small()).double()
        self.ours = fastres.optimize(copy.deepcopy(self.twin), channels_last=False)
        self.done: list[str] = []
        self.fired = [0, 0]
        self.rounded = False  # whether its values have been float32

    def both(self):
        return enumerate((self.ours, self.twin))

    def images(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.draw.randint(0, 1000))
        return torch.randn(self.draw.choice((2, 3)), 3, 9, 9, generator=generator, dtype=torch.float64)

    def choose(self) -> None:
        name = self.draw.choice([name for name in dir(self) if name.startswith("do_")])
        self.done.append(name[3:])
        getattr(self, name)()
        self.compare()

    def compare(self) -> None:
        x, dtype = self.images(), self.twin[0].weight.dtype
        with torch.no_grad():
            own, theirs = self.ours(x.to(dtype)), self.twin(x.to(dtype))
        self.close(own, theirs, "output")
        ours, twins = self.ours.state_dict(), self.twin.state_dict()
        assert list(ours) == list(twins), "keys"
        for key in twins:
            self.close(ours[key], twins[key], key)
        assert self.fired[0] == self.fired[1], f"hooks fired {self.fired}"
        assert [m.training for m in self.ours.modules()] == [m.training for m in self.twin.modules()], "modes"

    def close(self, own: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
        assert (own.dtype, own.shape) == (theirs.dtype, theirs.shape), what
        if own.dtype.is_floating_point:
            allowed = 1e-3 if self.rounded or own.dtype == torch.float32 else 1e-7
            assert own.isfinite().all() == theirs.isfinite().all(), what
            assert errors(own, theirs)["max"] <= allowed, f"{what}: {errors(own, theirs)['max']:.3g} apart"
        else:
            assert torch.equal(own, theirs), what

    def do_train(self) -> None:
        for _, model in self.both():
            model.train()

    def do_eval(self) -> None:
        for _, model in self.both():
            model.eval()

    def do_part_eval(self) -> None:
        index = self.draw.randrange(len(self.twin))
        for _, model in self.both():
            model[index].eval()

    def do_step(self) -> None:
        x, rate = self.images(), self.draw.choice((0.01, 0.05))
        for _, model in self.both():
            optimizer = torch.optim.SGD(model.parameters(), rate)
            model(x.to(model[0].weight.dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def do_load(self) -> None:
        torch.manual_seed(self.draw.randint(0, 1000))
        state = lively(Small()).state_dict()
        for _, model in self.both():
            model.load_state_dict(state)

    def do_float(self) -> None:
        self.rounded = True
        for _, model in self.both():
            model.float()

    def do_double(self) -> None:
        for _, model in self.both():
            model.to(torch.float64)

    def do_channels_last(self) -> None:
        for _, model in self.both():
            model.to(memory_format=torch.channels_last)

    def do_deepcopy(self) -> None:
        self.ours, self.twin = copy.deepcopy(self.ours), copy.deepcopy(self.twin)

    def do_pickle(self) -> None:
        if not self.fired_hooks():
            self.ours = pickle.loads(pickle.dumps(self.ours))

    def fired_hooks(self) -> bool:
        return any(m._forward_hooks for m in self.twin.modules())

    def do_restore(self) -> None:
        fastres.restore(self.ours)

    def do_optimize(self) -> None:
        fastres.optimize(self.ours, channels_last=False)

    def do_freeze(self) -> None:
        """A frozen network is a copy: what it computes stays, and the model does not notice."""
        modes = [m.training for m in self.ours.modules()]
        x = self.images().float()
        model = copy.deepcopy(self.ours).float()
        frozen = fastres.freeze(model, x)
        self.close(frozen(x), copy.deepcopy(self.twin).float().eval()(x).detach(), "frozen output")
        assert modes == [m.training for m in self.ours.modules()]

    def do_hook(self) -> None:
        index = self.draw.randrange(len(self.twin))
        for who, model in self.both():

            def count(*_, who=who):
                self.fired[who] += 1

            model[index].register_forward_hook(count)

    def do_unhook(self) -> None:
        for _, model in self.both():
            for module in model.modules():
                module._forward_hooks.clear()

    def do_in_place(self) -> None:
        name = self.draw.choice([name for name, _ in self.twin.named_parameters()])
        with torch.no_grad():
            for _, model in self.both():
                model.get_parameter(name).mul_(1.25)

    def do_data(self) -> None:
        """A write that nothing can see, and the call that tells of it."""
        name = self.draw.choice([name for name, _ in self.twin.named_parameters()])
        for _, model in self.both():
            model.get_parameter(name).data.add_(0.125)
            fastres.refresh(model)  # the twin's blocks fold too

    def do_buffer(self) -> None:
        with torch.no_grad():
            for _, model in self.both():
                model[1].running_var.mul_(1.5)

    def do_swap_parameter(self) -> None:
        for _, model in self.both():
            model[0].weight = nn.Parameter(model[0].weight.detach().clone() * 0.5)

    def do_ema(self) -> None:
        """The average of a model is a model."""
        x = self.images().to(self.twin[0].weight.dtype)
        found = []
        for _, model in self.both():
            average = torch.optim.swa_utils.AveragedModel(model)
            average.update_parameters(model)
            average.eval()
            found.append(average(x).detach())
        self.close(*found, "average")

    def do_sync_bn(self) -> None:
        """Converted, a copy still computes the same in evaluation."""
        x = self.images().to(self.twin[0].weight.dtype)
        found = [
            nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()(x).detach() for _, model in self.both()
        ]
        self.close(*found, "SyncBatchNorm")

    def do_freeze_bn(self) -> None:
        for _, model in self.both():
            model[1].eval()
            model[1].weight.requires_grad_(False)

    def do_inference_mode(self) -> None:
        x = self.images().to(self.twin[0].weight.dtype)
        found = []
        for _, model in self.both():
            with torch.inference_mode():
                found.append(model(x).clone())
        self.close(*found, "inference mode")


@scored("R10", "random sequences of eight things done to a model and to its twin", full=2000, short=30)
def sequences(tally: Tally, count: int) -> None:
    for seed in range(count):
        pair = Pair(seed)
        with tally.case(f"seed {seed}"):
            try:
                for _ in range(LENGTH):
                    pair.choose()
            except Exception as error:
                raise AssertionError(f"after {' '.join(pair.done)}: {type(error).__name__}: {error}") from error
