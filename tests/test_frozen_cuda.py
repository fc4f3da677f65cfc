"""Networks frozen on a GPU: what is replayed, who may call it, what it holds."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth
from torch import nn

import fastres
from fastres import timing
from fastres.dispatch import GPU_KERNELS
from fastres.experiments.parity import Reference
from fastres.experiments.subject import DTYPES, load
from fastres.ops import REGISTRY

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def subject(name="cifar.resnet20", batch=4, size=32, dtype="bf16"):
    return load(name, batch=batch, size=size, dtype=dtype, device=DEVICE)


def images(shape, like, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(like).contiguous(memory_format=torch.channels_last)


def judged(frozen, model, x):
    verdict = Reference(copy.deepcopy(model), x).judge({"logits": frozen(x)})
    assert verdict.ok, verdict


def uncaptured(frozen, x):
    """The kernels one after the other, on a full batch."""
    with torch.no_grad():
        ys = frozen.run(frozen.plan(tuple(x.shape)).steps, x.to(frozen.dtype))
    return frozen.network.result(ys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar.preact_resnet20"])
def test_networks(name, dtype):
    given = subject(name, size=64, dtype=dtype)
    frozen = fastres.freeze(given.model, given.x)
    for x in (given.x, given.x[:1], given.x[:3], images((2, 3, 96, 64), given.x)):
        judged(frozen, given.model, x)
    x = given.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(frozen(x), uncaptured(frozen, x))
    assert all(torch.equal(frozen(given.x), frozen(x)) for _ in range(3))  # laid out as it may be


@pytest.mark.parametrize("backend", [b.name for b in REGISTRY["conv_bn_add_act"].backends if b.name in GPU_KERNELS])
def test_one_backend(backend):
    """Of convolutions that it can run; the others take what is fastest."""
    given = subject("resnet50", size=64)
    forced = {"conv_bn_add_act": backend} if backend == "cudnn" else {"conv_bn_act": backend, "conv_bn_add_act": backend}
    model = given.model
    if backend in ("cuda", "cuda_wide"):  # whose channels are whole vectors: behind the stem
        model, given = nn.Sequential(model.layer1, model.layer2), given._replace(x=images((4, 64, 16, 16), given.x))
    with fastres.use(**forced):
        frozen = fastres.freeze(model, given.x)
    judged(frozen, model, given.x)


class Maps(nn.Module):
    """Two maps of a network, the coarse one enlarged and added to the fine one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inner = model, nn.ModuleList(nn.Conv2d(channels, 64, 1) for channels in (64, 128))

    def forward(self, x):
        fine = self.model.layer1(self.model.maxpool(self.model.relu(self.model.bn1(self.model.conv1(x)))))
        coarse = self.inner[1](self.model.layer2(fine))
        return {"fine": self.inner[0](fine) + F.interpolate(coarse, fine.shape[2:]), "coarse": coarse}


def test_several_maps():
    given = subject("resnet18", size=64)
    model = Maps(given.model).to(given.x).eval()
    frozen, exact = fastres.freeze(model, given.x), copy.deepcopy(model).double()
    for x in (given.x, given.x[:1], images((2, 3, 96, 56), given.x)):
        found = frozen(x)
        with torch.no_grad():
            same, truth = model(x), exact(x.double())
        for name in ("fine", "coarse"):
            assert_close_to_truth(found[name], same[name], truth[name], x.dtype, name)
    before = frozen(given.x)["fine"].clone()
    frozen(given.x.flip(0))
    assert torch.equal(before, frozen(given.x)["fine"])


def test_another_dtype_than_the_models():
    given = subject("resnet18", size=64, dtype="fp32")
    for dtype in (torch.bfloat16, torch.float16):
        frozen = fastres.freeze(given.model, given.x, dtype)
        low = copy.deepcopy(given.model).to(dtype)
        with torch.no_grad():
            same, truth = low(given.x.to(dtype)), copy.deepcopy(given.model).double()(given.x.to(dtype).double())
        assert frozen(given.x).dtype == dtype
        assert_close_to_truth(frozen(given.x), same, truth, dtype)


def test_batches_share_what_they_can():
    given = subject(batch=6)
    frozen = fastres.freeze(given.model, given.x)
    whole = frozen(given.x)
    for n in (1, 2, 3, 4, 5, 6, 7):
        judged(frozen, given.model, images((n, 3, 32, 32), given.x, n))
    assert {shape[0] for shape in frozen._plans} == {1, 2, 4, 6, 7}
    assert torch.equal(frozen(given.x), whole)  # after the graphs of other batches used the same memory
    assert torch.equal(frozen(given.x[:5]), whole[:5])


def test_results_are_the_callers_own():
    given = subject()
    frozen = fastres.freeze(given.model, given.x)
    first = frozen(given.x)
    kept = first.clone()
    frozen(given.x * 2)
    assert torch.equal(first, kept)


def test_nan_passes():
    given = subject("resnet18", size=64)
    frozen = fastres.freeze(given.model, given.x)
    x = given.x.clone()
    x[1, 0, 30, 30] = torch.nan
    y = frozen(x)
    assert y[1].isnan().any() and y[[0, 2, 3]].isfinite().all() and frozen(given.x).isfinite().all()


def test_update_reaches_the_graph():
    given = subject("resnet18", size=64)
    frozen = fastres.freeze(given.model, given.x)
    before, small = frozen(given.x), frozen(given.x[:1])
    other = copy.deepcopy(given.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    plans = list(frozen._plans.values())
    fastres.refresh(other)
    frozen.update(other)
    judged(frozen, other, given.x)
    judged(frozen, other, given.x[:1])
    assert list(frozen._plans.values()) == plans and not torch.equal(frozen(given.x), before)
    frozen.update(given.model)
    assert torch.equal(frozen(given.x), before) and torch.equal(frozen(given.x[:1]), small)


def test_the_model_may_change_and_die():
    given = subject()
    frozen, model = fastres.freeze(given.model, given.x), given.model
    before = frozen(given.x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    del model, given
    torch.cuda.empty_cache()
    noise = torch.randn(1 << 26, device=DEVICE)
    assert torch.equal(frozen(subject().x), before) and noise.isfinite().all()


def test_streams_and_threads():
    given = subject(batch=8)
    frozen = fastres.freeze(given.model, given.x)
    inputs = [images((1 + n % 8, 3, 32, 32), given.x, n) for n in range(16)]
    expected = [frozen(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(start):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [(n % 16, frozen(inputs[n % 16])) for n in range(start, start + 200)]
        stream.synchronize()
        wrong.extend(n for n, y in found if not torch.equal(y, expected[n]))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_does_not_grow():
    given = subject(batch=8)
    frozen = fastres.freeze(given.model, given.x)
    for n in range(1, 9):
        frozen(given.x[:n])
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for n in range(500):
        frozen(given.x[: 1 + n % 8])
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held


def test_a_dead_network_gives_its_memory_back():
    x = torch.randn(64, 3, 64, 64, device=DEVICE)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).to(DEVICE).eval()
    fastres.freeze(model, x)(x)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        fastres.freeze(model, x)(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held


def test_a_caller_may_capture_it():
    given = subject()
    frozen = fastres.freeze(given.model, given.x)
    x, expected = given.x.clone(), frozen(given.x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = frozen(x)
    x.copy_(given.x)
    graph.replay()
    assert torch.equal(y, expected)
    measured = timing.interleaved({"frozen": lambda: frozen(given.x)}, given.x.device, seconds=0.2)["frozen"]
    assert measured.method == "graph"
    assert torch.equal(frozen(given.x), expected)
    with pytest.raises(fastres.UnsupportedError, match="call it once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        frozen(given.x[:, :, :24].clone())
    assert torch.equal(frozen(given.x), expected)


def test_explain():
    given = subject("resnet18", batch=8, size=64)
    frozen = fastres.freeze(given.model, given.x)
    told = fastres.explain(frozen, given.x)
    assert told.replay_ms > 0 and all(step.ms > 0 and step.of_peak > 0 for step in told.steps)
    print(told)


def test_under_autocast():
    given = subject(dtype="fp32")
    frozen = fastres.freeze(given.model, given.x)
    with torch.autocast(DEVICE, torch.float16):
        judged(frozen, given.model, given.x[:1])


def test_copies():
    given = subject()
    frozen = fastres.freeze(given.model, given.x)
    judged(copy.deepcopy(frozen), given.model, given.x)


def test_refused():
    given = subject()
    with pytest.raises(ValueError, match="model must be on cuda"):
        fastres.freeze(copy.deepcopy(given.model).cpu(), given.x)
    frozen = fastres.freeze(given.model, given.x)
    with pytest.raises(ValueError, match="x must be on cuda"):
        frozen(given.x.cpu())
