"""Whole networks: fastres.optimize against eager PyTorch and torch.compile, with and without freezing."""

import pytest

from benchmarks import harness
from fastres.experiments import rivals
from fastres.experiments.compare import compare
from fastres.experiments.subject import load

INFERENCE = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST, rivals.FREEZING)
TRAINING = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST)
GPU_WAYS = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST, rivals.COMPILE, rivals.FREEZING)


@pytest.mark.parametrize(("name", "batch"), [("resnet18", 1), ("resnet18", 8), ("resnet50", 1), ("resnet50", 8)])
def test_inference(benchmark, record, name, batch):
    run(benchmark, record, load(name, batch=batch, device="cpu"), INFERENCE, training=False, seconds=12.0)


def test_training(benchmark, record):
    run(benchmark, record, load("resnet18", batch=8, device="cpu"), TRAINING, training=True, seconds=10.0)


@pytest.mark.cuda
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "batch"), [("resnet50", 1), ("resnet50", 256)])
def test_cuda(benchmark, record, name, batch, training):
    ways = rivals.TRAINING if training else GPU_WAYS
    run(
        benchmark,
        record,
        load(name, batch=batch, dtype="bf16", device="cuda"),
        ways,
        training=training,
        seconds=10.0,
    )


def run(benchmark, record, subject, ways, *, training, seconds):
    rows = compare(subject, ways, training=training, seconds=seconds)
    harness.refuse_wrong(rows)
    record(rows)
    harness.show(benchmark, subject, training=training)
