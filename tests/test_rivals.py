"""The ways to run a model that comparisons time: what each does to the model and its input, and what holds meanwhile."""

import copy
import os

import pytest
import torch
from torch import nn

from fastres.experiments import rivals

pytestmark = pytest.mark.none
COMPILED = (rivals.COMPILE, rivals.CUDA_GRAPHS, rivals.FREEZING, rivals.MAX_AUTOTUNE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


FROZEN = pytest.param(rivals.FROZEN, marks=pytest.mark.cpu)


@pytest.mark.parametrize("rival", [*rivals.INFERENCE, FROZEN], ids=lambda rival: rival.name)
def test_every_way_computes_the_same(model, monkeypatch, rival):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad(), rival.settings():
        expected = model(x)
        run, given = rival.prepare(copy.deepcopy(model), x)
        torch.testing.assert_close(run(given), expected, rtol=1e-4, atol=1e-4)
    layout = torch.channels_last if rival.layout == "channels_last" else torch.contiguous_format
    assert given.is_contiguous(memory_format=layout) and torch.equal(given, x)


def test_mixed_precision_keeps_weights_and_computes_in_the_inputs_dtype(model):
    run, x = rivals.AMP.prepare(model.bfloat16(), torch.randn(2, 3, 9, 9, dtype=torch.bfloat16))
    assert model[0].weight.dtype == torch.float32 and run(x).dtype == torch.bfloat16


def test_no_compilation_gets_what_another_one_left(model, monkeypatch):
    """Of two models alike, each has its own code object, and so its own compilation."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append((function, dynamic)) or function)
    for _ in range(2):
        rivals.COMPILE.prepare(copy.deepcopy(model), torch.randn(1, 3, 9, 9))
    (first, dynamic), (second, _) = compiled
    assert first.__code__ is not second.__code__ and first.__code__.co_name != second.__code__.co_name
    assert dynamic is False


@pytest.mark.parametrize("rival", COMPILED, ids=lambda rival: rival.name)
def test_what_holds_while_a_way_compiles_ends_with_it(rival):
    inductor, dynamo = torch._inductor.config, torch._dynamo.config

    def state():
        options = {name: _value(inductor, name) for name in ("force_disable_caches", *rival.options)}
        return options | {"limit": dynamo.recompile_limit, "fails": dynamo.fail_on_recompile_limit_hit}

    before = state()
    with pytest.raises(KeyError), rival.settings():
        wished = {"force_disable_caches": True, **rival.options, "limit": 64, "fails": True}
        assert state() == wished
        raise KeyError
    assert state() == before


def _value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_compilers_get_every_core_for_a_while(monkeypatch):
    before = os.sched_getaffinity(0)
    one = {min(before)}
    os.sched_setaffinity(0, one)
    try:
        with rivals.all_cores():
            assert os.sched_getaffinity(0) >= before
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.delattr(os, "sched_setaffinity")
    with rivals.all_cores():
        assert os.sched_getaffinity(0) == before
    monkeypatch.undo()


def test_ways_that_compile_nothing_change_nothing():
    before = torch._dynamo.config.recompile_limit, torch._inductor.config.force_disable_caches
    with rivals.EAGER.settings():
        assert (torch._dynamo.config.recompile_limit, torch._inductor.config.force_disable_caches) == before
