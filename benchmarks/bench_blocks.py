"""Residual blocks against plain PyTorch, eager and compiled, in evaluation and as a training step."""

import pytest
import torch
from torch import nn

from benchmarks import harness
from fastres import nn as fnn
from fastres.experiments import rivals
from fastres.experiments.compare import compare
from fastres.experiments.subject import Subject, enliven
from fastres.experiments.twin import torch_twin

WAYS = (rivals.OPTIMIZED, rivals.CHANNELS_LAST, rivals.COMPILE)
BLOCKS = {
    "BasicBlock 64": (lambda: fnn.BasicBlock(64, 64), 64),
    "Bottleneck 256": (lambda: fnn.Bottleneck(256, 64), 256),
    "Bottleneck 256 to 512, stride 2": (
        lambda: fnn.Bottleneck(256, 128, 2, fnn.shortcut("B", 256, 512, 2)), 256,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(benchmark, record, name, mode):
    run(benchmark, record, name, mode, (8, 56), torch.float32, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_cuda(benchmark, record, name, mode):
    run(benchmark, record, name, mode, (256, 56), torch.bfloat16, torch.device("cuda"))


def run(benchmark, record, name, mode, size, dtype, device):
    """A block followed by what turns its output into the logits that a comparison judges."""
    make, channels = BLOCKS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    enliven(model)
    batch, side = size
    x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    subject = Subject(name, torch_twin(model).to(device, dtype), x, dtype)
    rows = compare(subject, WAYS, training=mode == "training", seconds=3 * harness.SECONDS)
    harness.refuse_wrong(rows)
    record(rows)
    harness.show(benchmark, subject, training=mode == "training")
