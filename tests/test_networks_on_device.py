"""Whole networks on the kernels of one backend, in training and in evaluation, on the device that has them."""

import itertools

import pytest
import torch

from fastres import dispatch, info, tune
from fastres.experiments.subject import load
from fastres.experiments.verify import verify
from fastres.ops import REGISTRY

GPU = [
    pytest.param("cuda", *case, marks=pytest.mark.cuda)
    for case in itertools.product(dispatch.GPU_KERNELS, ("resnet18", "resnet50"), ("fp32", "fp16", "bf16"))
]
CPU = pytest.param("cpu", "cpu", "resnet18", "fp32", marks=pytest.mark.cpu)


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Of the kernels for GPUs only those of one backend count as validated, and so are chosen; the others never are."""

    def allow(device, backend):
        monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
        ops = [name for name, op in REGISTRY.items() if any(b.name == backend for b in op.backends)]
        others = {name: list(REGISTRY) for name in dispatch.GPU_KERNELS if name != backend}
        tune.store(torch.device(device), {backend: ops}, {}, others)
        dispatch.forget()

    yield allow
    monkeypatch.undo()
    dispatch.forget()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("device", "backend", "name", "dtype"), [CPU, *GPU])
def test_a_network_keeps_the_budget_and_comes_back(only, device, backend, name, dtype, training):
    if not info.live(backend):
        pytest.skip(f"{backend} does not run here")
    only(device, backend)
    found = verify(load(name, batch=4, size=64, dtype=dtype, device=device), training=training)
    assert found["ok"], found
