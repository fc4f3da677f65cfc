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
from fastres.ops.pool_int8 import POOL_INT8
from fastres.ops.quantize_int8 import QUANTIZE_INT8

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
OPS = (CONV_INT8, POOL_INT8, QUANTIZE_INT8)
ALL = ((0, 0), (1, 1), (0, 0), False)
WINDOWS = {  # a stem's; more than a line of memory; a network's last one; what fills no tile
    "stem": ((16, 64, 112, 112), ((3, 3), (2, 2), (1, 1), False)),
    "many channels": ((4, 512, 15, 13), ((3, 3), (2, 2), (1, 1), False)),
    "all pixels": ((16, 2048, 7, 7), ALL),
    "one pixel": ((5, 64, 1, 1), ALL),
    "tails": ((3, 20, 13, 11), ((4, 5), (2, 3), (2, 1), True)),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def frozen_of(model, x):
    with fastres.use(**forced(x)):
        return fastres.freeze(model.eval().to(DEVICE), x, quantize=quiet([x]))


def forced(x):
    """All kernels, but for images of many channels."""
    return {op.name: "torch" if op is QUANTIZE_INT8 and x.shape[1] > 4 else "triton" for op in OPS}


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "real"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_gives_the_integers_of_the_definition(name, integers):
    shape, weight, geometry = SHAPES[name]
    for pad in (-128, -37):
        args = conv_int8.drawn(shape, weight, geometry, name in ("1x1 with a residual", "tails"), integers, DEVICE, pad)
        for config in (None, *KERNEL.configs(*args)):
            run = KERNEL.load() if config is None else KERNEL.load(config)
            assert tuner.judge(CONV_INT8, run, args) is None, config


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(16, 3, 224, 224), (3, 3, 41, 50), (2, 1, 28, 28), (2, 4, 33, 7), (3, 2, 1, 1)], ids=str)
def test_images_become_the_integers_of_the_definition(shape, layout):
    """Of each device: next to half way a value that is rounded twice falls to the other side."""
    x = 3 * draw(*shape).contiguous(memory_format=layout)
    x[0, 0, 0] = ((torch.arange(shape[3]) + 0.5).double() / 57.3 - 1.0).float().to(DEVICE)
    x[-1, -1, -1, -1] = torch.nan
    run = QUANTIZE_INT8.backends[0].load()
    for given in (x, x.clone().fill_(torch.inf), torch.full_like(x, -0.0)):
        for rest in ((57.3, 118, 4, (0, 0)), (57.3, 118, 4, (3, 3)), (0.5, 0, 4, (0, 1)), (4000.0, 255, 4, (2, 0))):
            y, strange = run(given, *rest)
            for there in (DEVICE, torch.device("cpu")):
                expected, finite = QUANTIZE_INT8.reference(given.to(there), *rest)
                assert torch.equal(y, expected.to(DEVICE)) and torch.equal(strange.isnan(), finite.isnan().to(DEVICE))
            assert y.is_contiguous(memory_format=torch.channels_last) and not strange.signbit()[~strange.isnan()].any()


@pytest.mark.parametrize("scaled", [(None, None), (1.37, -20.5), (60.3, -5000.0)], ids=["largest", "mean", "steep mean"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_have_the_integers_of_the_definition(name, scaled):
    shape, window = WINDOWS[name]
    x = conv_int8.whole(shape, torch.Generator(DEVICE).manual_seed(0))
    args = (x, *window, *scaled)
    y = POOL_INT8.backends[0].load()(*args)
    assert torch.equal(y, POOL_INT8.reference(*args))
    assert torch.equal(y.cpu(), POOL_INT8.reference(x.cpu(), *args[1:]))


def test_the_definition_is_the_same_on_both_devices():
    for op in OPS:
        for sample in op.samples(torch.device("cpu"), torch.float32):
            there = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in sample.args]
            both = op.reference(*there), op.reference(*sample.args)
            pairs = zip(*(found if isinstance(found, tuple) else (found,) for found in both), strict=True)
            assert all(torch.equal(a.cpu(), b) for a, b in pairs), sample.label


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
    with fastres.use(**forced(x)):  # for the size that is planned here
        for given in (x, x[:1], 3 * x, draw(*shape, seed=5)):
            assert torch.equal(frozen(given).cpu(), plan(given.cpu()))
    kernels = {step.call.op.name: step.choice.kernel for step in frozen.plan(tuple(shape)).steps if step.call.op is not None}
    assert kernels == {name: kernel for name, kernel in forced(x).items() if name in kernels} and len(kernels) >= 2


def test_batches_files_and_copies(tmp_path):
    x = draw(6, 3, 32, 32)
    frozen = frozen_of(small(), x)
    whole = frozen(x)
    frozen.save(tmp_path / "network")
    with fastres.use(**forced(x)):
        assert all(torch.equal(frozen(x[:n]), whole[:n]) for n in range(1, 7))
        for other in (copy.deepcopy(frozen), fastres.load_frozen(tmp_path / "network", x)):
            assert torch.equal(other(x), whole) and other.quality == frozen.quality
    with fastres.use("torch"):
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
