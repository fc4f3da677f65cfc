"""8-bit integers on a GPU: the kernel beside its definition, networks beside the CPU's plans of the same file, bit for bit."""

import copy

import pytest
import torch
from test_frozen import small
from test_int8 import CASES, quiet

import fastres
from fastres import dispatch, models, tuner
from fastres.ops import _conv_cpu, conv_int8
from fastres.ops.conv_int8 import CONV_INT8

pytestmark = pytest.mark.cuda
DEVICE, ONE = torch.device("cuda"), (1, 1)
KERNEL = next(backend for backend in CONV_INT8.backends if backend.name == "triton")
# Of ResNet-50 at a size that fills the device, and sizes that fill no tile.
SHAPES = {
    "1x1": ((16, 256, 56, 56), (64, 256, 1, 1), (ONE, (0, 0), ONE)),
    "1x1 with a residual": ((16, 64, 56, 56), (256, 64, 1, 1), (ONE, (0, 0), ONE)),
    "1x1 stride 2": ((16, 512, 28, 28), (1024, 512, 1, 1), ((2, 2), (0, 0), ONE)),
    "3x3": ((16, 512, 7, 7), (512, 512, 3, 3), (ONE, ONE, ONE)),
    "3x3 stride 2": ((16, 128, 56, 56), (128, 128, 3, 3), ((2, 2), ONE, ONE)),
    "stem": ((16, 3, 224, 224), (64, 3, 7, 7), ((2, 2), (3, 3), ONE)),
    "tails": ((3, 70, 13, 11), (90, 70, 3, 3), (ONE, (2, 2), (2, 2))),
    "a linear layer": ((16, 2048, 1, 1), (1000, 2048, 1, 1), (ONE, (0, 0), ONE)),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def frozen_of(model, x):
    with fastres.use(conv_int8="triton"):
        return fastres.freeze(model.eval().to(DEVICE), x, quantize=quiet([x]))


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "real"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_gives_the_integers_of_the_definition(name, integers):
    shape, weight, geometry = SHAPES[name]
    for pad in (-128, -37):
        args = conv_int8.drawn(shape, weight, geometry, name in ("1x1 with a residual", "tails"), integers, DEVICE, pad)
        for config in (None, *KERNEL.configs(*args)):
            run = KERNEL.load() if config is None else KERNEL.load(config)
            assert tuner.judge(CONV_INT8, run, args) is None, config


def test_the_definition_is_the_same_on_both_devices():
    for sample in CONV_INT8.samples(torch.device("cpu"), torch.float32):
        there = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in sample.args]
        assert torch.equal(CONV_INT8.reference(*there).cpu(), CONV_INT8.reference(*sample.args)), sample.label


@pytest.mark.skipif(_conv_cpu.lacks(torch.int8) is not None, reason="this processor has no plans of 8-bit integers")
@pytest.mark.parametrize("name", [*CASES, "resnet50", "pre-activation"])
def test_a_network_gives_the_bits_of_the_cpus_plan(name, tmp_path):
    torch.manual_seed(0)
    networks = {"resnet50": models.resnet50, "pre-activation": lambda: models.cifar.preact_resnet(20)}
    model, shape = (networks[name](), (4, 3, 64, 64)) if name in networks else CASES[name]()
    x = draw(*shape)
    frozen = frozen_of(model, x)
    frozen.save(tmp_path / "network")
    plan = fastres.load_frozen(tmp_path / "network")
    for given in (x, x[:1], 3 * x, draw(*shape, seed=5)):
        assert torch.equal(frozen(given).cpu(), plan(given.cpu()))
    kernels = {step.choice.kernel for step in frozen.plan(tuple(shape)).steps if step.call.op is CONV_INT8}
    assert kernels == {"triton"}


def test_batches_files_and_copies(tmp_path):
    x = draw(6, 3, 32, 32)
    frozen = frozen_of(small(), x)
    whole = frozen(x)
    frozen.save(tmp_path / "network")
    with fastres.use(conv_int8="triton"):
        assert all(torch.equal(frozen(x[:n]), whole[:n]) for n in range(1, 7))
        for other in (copy.deepcopy(frozen), fastres.load_frozen(tmp_path / "network", x)):
            assert torch.equal(other(x), whole) and other.quality == frozen.quality
    with fastres.use(conv_int8="torch"):
        assert torch.equal(fastres.load_frozen(tmp_path / "network", x)(x), whole)
    assert torch.equal(frozen(x.half().float()), frozen(x.half())) and whole.dtype == torch.float32
    told = fastres.explain(frozen, x)
    assert told.replay_ms > 0 and all(step.ms > 0 for step in told.steps)


def test_what_is_not_finite_gives_nan_in_its_image_alone():
    x = draw(4, 3, 32, 32)
    frozen = frozen_of(small(), x)
    y, bad = frozen(x), x.clone()
    bad[2, 1, 5, 5] = torch.nan
    found = frozen(bad)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3]], y[[0, 1, 3]])


def test_without_a_proven_kernel_it_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_proven", lambda op, backend, device: "it is not validated")
    x = draw(2, 3, 32, 32)
    with pytest.raises(fastres.UnsupportedError, match=r"not validated.*fastres\.use"):
        fastres.freeze(small().to(DEVICE), x, quantize=quiet([x.cpu()]))
