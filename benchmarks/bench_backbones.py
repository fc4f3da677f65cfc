"""Networks that return several maps: a feature pyramid, and a segmentation network of which only parts have plans; both in
evaluation, compared with PyTorch's modules.
"""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import fastres
from fastres import models, timing
from fastres.budget import within_budget
from fastres.experiments.rivals import FASTRES
from fastres.experiments.twin import torch_twin

SECONDS = 12.0
IMAGES = (1, 3, 320, 320)
CHANNELS = (256, 512, 1024, 2048)  # of the stages of ResNet-50


class Maps(nn.Module):
    """The maps of a ResNet-50's four stages."""

    def __init__(self):
        super().__init__()
        self.body = torch_twin(models.resnet50())

    def forward(self, x):
        body, maps = self.body, []
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    """Lin et al., *Feature Pyramid Networks for Object Detection* (2017), without its coarsest map."""

    def __init__(self):
        super().__init__()
        self.backbone = Maps()
        self.inner = nn.ModuleList(nn.Conv2d(channels, 256, 1) for channels in CHANNELS)
        self.outer = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in CHANNELS)

    def forward(self, x):
        maps, found = self.backbone(x), OrderedDict()
        top = self.inner[-1](maps[-1])
        found["3"] = self.outer[-1](top)
        for index in (2, 1, 0):
            value = self.inner[index](maps[index])
            top = value + F.interpolate(top, value.shape[-2:])
            found[str(index)] = self.outer[index](top)
        return found


class Segmenter(nn.Module):
    """Classes of pixels from the last map, as large as the image: no plan does that."""

    def __init__(self):
        super().__init__()
        self.backbone = Maps()
        conv, bn = nn.Conv2d(CHANNELS[-1], 512, 3, padding=1, bias=False), nn.BatchNorm2d(512)
        self.head = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(512, 21, 1))

    def forward(self, x):
        return F.interpolate(self.head(self.backbone(x)[-1]), x.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("network", [Pyramid, Segmenter])
def test_backbones(benchmark, record, network):
    torch.manual_seed(0)
    eager, x = network().eval(), torch.randn(IMAGES)
    last, exact = copy.deepcopy(eager).to(memory_format=torch.channels_last), copy.deepcopy(eager).double()
    optimized = fastres.optimize(copy.deepcopy(eager))
    x_last = x.contiguous(memory_format=torch.channels_last)
    calls = {FASTRES: lambda: optimized(x), "eager": lambda: eager(x), "eager channels_last": lambda: last(x_last)}
    with torch.no_grad():
        for y, same, truth in zip(*map(tree_leaves, (optimized(x), eager(x), exact(x.double()))), strict=True):
            assert within_budget(y, same, truth, torch.float32).ok
        found = timing.interleaved(calls, torch.device("cpu"), seconds=SECONDS)
        name = f"resnet50, {network.__name__.lower()}"
        common = {"name": name, "shape": list(IMAGES), "dtype": "float32", "pass": "inference"}
        ratios = {rival: timed.median / found[FASTRES].median for rival, timed in found.items()}
        record([{**common, "rival": rival, "ratio": ratios[rival], **timed.to_dict()} for rival, timed in found.items()])
        benchmark.pedantic(optimized, args=(x,), rounds=3, warmup_rounds=1)
