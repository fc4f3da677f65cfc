"""Networks frozen by ops, as on a GPU: here over CPU tensors, with the capture replaced by the call itself."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from _modules import lively
from _uncaptured import Uncaptured
from test_frozen import NETWORKS, Odd, check, images, small
from tolerances import assert_close_to_truth
from torch import nn

import fastres
from fastres import nn as fnn
from fastres import timing, tune, tuner
from fastres.dispatch import Backend
from fastres.frozen import base, build, calls, choose, device, make
from fastres.frozen.record import record
from fastres.ops import REGISTRY

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def uncaptured(monkeypatch):
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)


def frozen_of(model, x, dtype=torch.float32):
    return make.by_ops(model, x, dtype)


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    model = with_statistics(model)
    x = images(shape)
    frozen = frozen_of(model, x)
    check(frozen, model, x)
    if shape[0] > 1:
        check(frozen, model, x[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, monkeypatch):
    monkeypatch.setitem(base.DTYPES, "cpu", base.DTYPES["cuda"])
    torch.manual_seed(0)
    model = with_statistics(NETWORKS["resnet18"]()[0])
    x = images((2, 3, 64, 64))
    check(frozen_of(model, x, dtype), model, x.to(dtype), dtype)


def test_batches_are_padded_to_powers_of_two_up_to_the_examples():
    model = small()
    frozen = frozen_of(model, images((6, 3, 32, 32)))
    assert [frozen.bucket(n) for n in range(10)] == [1, 1, 2, 4, 4, 6, 6, 7, 8, 9]
    for n in (1, 3, 4, 5, 6, 7):
        check(frozen, model, images((n, 3, 32, 32), seed=n))
    assert set(frozen._plans) == {(n, 3, 32, 32) for n in (1, 4, 6, 7)}
    assert frozen(images((0, 3, 32, 32))).shape == (0, 10)
    full = images((4, 3, 32, 32))
    y = frozen(full)
    assert torch.equal(frozen(full[:3]), y[:3])  # whatever the other images of its plan are
    y.zero_()
    assert frozen(full).abs().sum() > 0  # results are the caller's own


def test_sizes_and_strides_and_how_many_plans_are_kept(monkeypatch):
    monkeypatch.setattr(device, "_PLANS", 2)
    model = small()
    frozen = frozen_of(model, images((2, 3, 32, 32)))
    wide = images((4, 6, 40, 70))
    for x in (images((2, 3, 17, 40)), wide[:2, ::2, 3:, ::2], wide[:1, :3].expand(2, -1, -1, -1), wide.transpose(2, 3)[:, :3]):
        check(frozen, model, x)
        assert len(frozen._plans) <= 2
    with pytest.raises(ValueError, match="fits layer"):
        frozen_of(Odd(), images((1, 20, 8, 8)))(images((1, 20, 1, 1)))


def test_every_candidate_is_judged_and_the_fastest_of_those_that_pass_runs(monkeypatch):
    """A backend that loses NaN, or is wrong in the last image, is never run, however fast."""
    op, model, x = REGISTRY["conv_bn_act"], small(), images((9, 3, 32, 32))

    def hides_nan(*args):
        return op.reference(*args).nan_to_num()

    def wrong_at_the_end(*args):
        y = op.reference(*args)
        y[-1] += 1
        return y

    bad = [Backend(name, lambda *args: None, lambda run=run: run) for name, run in (("a", hides_nan), ("b", wrong_at_the_end))]
    monkeypatch.setattr(op, "backends", (*bad, *op.backends))
    times = {"a": 1.0, "b": 2.0, "cpu": 9.0, "onednn": 9.0, "torch": 8.0, "torch + bn_act": 5.0}

    def interleaved(given, *_, **__):
        return {name: timing.Timing(times[name], times[name], times[name], 5, 1, "") for name in given}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    frozen = frozen_of(model, x)
    steps = [step for step in frozen.plan(x.shape).steps if step.call.op is op]
    assert steps
    for step in steps:
        found = {c.backend: c for c in step.choice.candidates}
        assert step.choice.kernel == "torch + bn_act" and found["torch"].seconds == 8.0
        assert "error" in found["a"].failure and "error" in found["b"].failure and found["a"].seconds is None


def test_a_kernel_that_is_not_proven_here_is_not_even_tried(monkeypatch):
    """It might not come back; what explain tells of it is why."""
    op, model, x = REGISTRY["conv_bn_act"], small(), images((2, 3, 32, 32))

    def never(*args):
        raise AssertionError("it ran")

    others = (backend for backend in op.backends if backend.name != "cuda_wide")
    monkeypatch.setattr(op, "backends", (Backend("cuda_wide", lambda *args: None, lambda: never), *others))
    monkeypatch.setattr(tune, "why_not_validated", lambda op, backend, device: f"{backend} is not validated here")
    frozen = frozen_of(model, x)
    steps = [step for step in frozen.plan(x.shape).steps if step.call.op is op]
    assert steps
    for step in steps:
        found = {c.backend: c for c in step.choice.candidates}
        assert found["cuda_wide"].failure == "cuda_wide is not validated here" and step.choice.kernel != "cuda_wide"
    with fastres.use(conv_bn_act="cuda_wide"), pytest.raises(AssertionError, match="it ran"):
        frozen_of(model, x)(x)


def test_a_forced_backend_is_the_only_one():
    x = images((2, 3, 32, 32))
    with fastres.use(conv_bn_act="onednn", conv_bn_add_act="onednn"):
        frozen = frozen_of(small(), x)
    kernels = {step.choice.kernel for step in frozen.plan(x.shape).steps if step.call.layer.kind == "conv"}
    assert kernels == {"onednn"}
    with fastres.use(conv_bn_add_act="cudnn"), pytest.raises(fastres.UnsupportedError, match="cudnn"):
        frozen_of(small(), x)


STEM = "conv_bn_act_maxpool"
PROJECTION, CHAIN = "conv_bn_add_conv_bn_act", "conv_bn_act_conv_bn_add_act"
LONG = f"{CHAIN}_conv_bn_act"


def bottlenecks():
    torch.manual_seed(0)
    projected = fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2))
    stem = nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return lively(nn.Sequential(*stem, projected, fnn.Bottleneck(32, 8), fnn.Bottleneck(32, 8))).eval(), images((2, 3, 35, 32))


@pytest.mark.parametrize(
    ("seconds", "joined"),
    [
        ({PROJECTION: 0.5, CHAIN: 2.0, LONG: 2.0, STEM: 0.5}, ["0 max_pool", "3.downsample.0 3.conv3"]),
        ({PROJECTION: 0.5, CHAIN: 0.6, LONG: 2.0}, ["3.downsample.0 3.conv3", "4.conv2 4.conv3", "5.conv2 5.conv3"]),
        ({PROJECTION: 0.6, CHAIN: 0.5, LONG: 2.0}, ["3.conv2 3.conv3", "4.conv2 4.conv3", "5.conv2 5.conv3"]),
        ({PROJECTION: 2.0, CHAIN: 0.5, LONG: 0.5}, ["3.conv2 3.conv3 4.conv1", "4.conv2 4.conv3 5.conv1", "5.conv2 5.conv3"]),
        ({PROJECTION: 2.0, CHAIN: 2.0, LONG: 0.5, STEM: 2.0}, []),
    ],
)
def test_layers_are_joined_where_that_is_faster(monkeypatch, seconds, joined):
    """One kernel takes so long where what it joins, one after the other, takes a second."""
    for name in seconds:
        op = REGISTRY[name]
        monkeypatch.setattr(op, "backends", (Backend(name, lambda *args: None, lambda op=op: op.reference), *op.backends))
    real = timing.interleaved

    def interleaved(given, *args, **options):
        if not seconds.keys() & given.keys():
            return real(given, *args, **options)
        for call in given.values():
            call()  # both ways run
        return {name: timing.Timing(*[seconds.get(name, 1.0)] * 3, 5, 1, "") for name in given}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    model, x = bottlenecks()
    frozen = frozen_of(model, x)
    steps = frozen.plan(x.shape).steps
    assert [" ".join(layer.name for layer in step.call.layers) for step in steps if len(step.call.layers) > 1] == joined
    assert sum(len(step.call.layers) for step in steps) == len(frozen.network.layers)
    check(frozen, model, x)
    told = str(fastres.explain(frozen))
    words = {
        STEM: "conv+relu+max_pool ", PROJECTION: "conv+conv+add+relu ", CHAIN: "conv+relu+conv+add+relu ",
        LONG: "conv+relu+conv+add+relu+conv+relu ",
    }  # fmt: skip
    found = {step.call.op.name for step in steps if step.call.op is not None} & words.keys()
    assert {name for name, text in words.items() if text in told} == found


def test_the_model_is_left_alone_and_later_changes_of_it_do_not_reach_the_plan():
    model, x = small(), images((2, 3, 32, 32))
    model.layer1.train()
    frozen = frozen_of(model, x)
    assert model.layer1.training and not model.training
    y = frozen(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    fastres.refresh(model)
    assert torch.equal(frozen(x), y)
    copied = copy.deepcopy(frozen)(x[:1])  # which measures for itself, and may choose other kernels
    torch.testing.assert_close(copied, frozen(x[:1]), rtol=1e-3, atol=1e-4)
    assert pickle.loads(pickle.dumps(frozen))(x).shape == y.shape
    assert not frozen.state_dict() and not y.requires_grad


def changed(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.01 * (index % 7))
    return model


@pytest.mark.parametrize("freeze", [frozen_of, fastres.freeze])
def test_update_takes_over_the_weights_of_a_model(freeze):
    model, x = small(), images((2, 3, 32, 32))
    frozen = freeze(model, x)
    before, other = frozen(x), changed(model)
    frozen.update(other)
    for batch in (x, x[:1], images((3, 3, 32, 32)), images((2, 3, 40, 40))):
        check(frozen, other, batch)
    assert not torch.equal(frozen(x), before)
    frozen.update(model)
    assert torch.equal(frozen(x), before)
    for bad, word in ((models_of(9), "another structure"), (copy.deepcopy(model).to("meta"), "on the CPU"), (None, "Module")):
        with pytest.raises((ValueError, TypeError), match=word):
            frozen.update(bad)
    assert torch.equal(frozen(x), before)


def models_of(classes):
    return fastres.models.cifar.resnet(8, num_classes=classes).eval()


def test_update_writes_weights_where_the_graph_reads_them():
    """Tensors that a graph reads keep their place, whatever drops folds meanwhile."""
    model, x = small(), images((2, 3, 32, 32))
    with fastres.use("torch"):
        frozen = frozen_of(model, x, torch.bfloat16)
    places = {}

    def note(name):
        for layer, own in frozen._constants.items():
            forms = calls._fold._entries[id(own[0]), id(own[4])].forms if layer.kind in ("conv", "linear") else {"": own[:3]}
            tensors = [t for form in forms.values() for t in form]
            places.setdefault(name, []).extend((t.data_ptr(), t.double().sum().item()) for t in tensors)

    note("before")
    fastres.refresh(model)
    calls._fold.forget()
    frozen.update(changed(model))
    note("after")
    assert len(places["before"]) > 20 and [p for p, _ in places["before"]] == [p for p, _ in places["after"]]
    assert sum(a != b for a, b in zip(places["before"], places["after"], strict=True)) > 20


def test_autocast_around_a_first_call_changes_nothing():
    model, x = small(), images((2, 3, 32, 32))
    frozen = frozen_of(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen(x[:1])
    check(frozen, model, x[:1])
    assert torch.equal(frozen(x[:1]), y)


@pytest.mark.parametrize("freeze", [frozen_of, fastres.freeze])
def test_in_inference_mode(freeze):
    with torch.inference_mode():
        model, x = small(), images((2, 3, 32, 32))
        frozen = freeze(model, x)
        y = frozen(x)
    assert torch.equal(frozen(x.clone()), y)
    frozen.update(changed(model))
    assert not torch.equal(frozen(x.clone()), y)


def test_calls_from_many_threads():
    frozen = frozen_of(small(), images((4, 3, 16, 16)))
    inputs = [images((1 + n % 4, 3, 16, 16), seed=n) for n in range(8)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def work(start):
        for n in range(start, start + 16):
            if not torch.equal(frozen(inputs[n % 8]), expected[n % 8]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_caller_that_captures_gets_the_kernels(monkeypatch):
    frozen, x = frozen_of(small(), images((4, 3, 32, 32))), images((3, 3, 32, 32))
    y = frozen(x)
    monkeypatch.setattr(Uncaptured, "capturing", True)
    assert torch.equal(frozen(x), y)
    with pytest.raises(fastres.UnsupportedError, match="call it once before"):
        frozen(images((3, 3, 24, 24)))


def test_explain_shows_kernels_times_and_peaks(monkeypatch):
    monkeypatch.setattr(timing, "peaks", lambda *_: (1e10, 1e11))
    x = images((2, 3, 32, 32))
    frozen = frozen_of(small(), x)
    plain = fastres.explain(frozen)
    assert all(step.ms is None for step in plain.steps) and plain.shape == (2, 3, 32, 32)
    convs = [step for step in plain.steps if step.op.startswith("conv")]
    assert all(set(step.tried) >= {"torch", step.algorithm} for step in convs)
    told = fastres.explain(frozen, x[:1])
    assert told.shape == (1, 3, 32, 32) and told.replay_ms > 0 and told.peaks == {"copy": 10.0, "matmul": 100.0}
    for step in told.to_dict()["steps"]:
        assert step["ms"] > 0 and step["bound"] in ("copy", "matmul")
        rate, peak = (step["gb_per_s"], 10.0) if step["bound"] == "copy" else (step["gflop_per_s"], 100.0)
        assert abs(step["of_peak"] - rate / peak) < 1e-6
    last = next(step for step in told.steps if step.op == "linear")
    assert last.gflop_per_s * last.ms * 1e6 == pytest.approx(2 * 64 * 10)
    assert "% of copy" in str(told) and "layer3.0.conv2" in str(told)


def test_peaks_are_measured():
    copied, multiplied = timing.peaks.__wrapped__(torch.device("cpu"), torch.float32)
    assert copied > 1e8 and multiplied > 1e8


def test_batch_norm_by_cudnn_is_batch_norm():
    """What PyTorch records on a GPU."""
    torch.manual_seed(0)
    model, x = with_statistics(Odd()), images((1, 20, 11, 8))
    expected, again = build.network("", record(model, x)).layers, record(model, x)
    named = "aten.cudnn_batch_norm.default"
    norms = [dataclasses.replace(o, target=named) if "batch_norm" in o.target else o for o in again.operations]
    again.operations = norms
    assert any(o.target == named for o in again.operations)
    found = build.network("", again).layers
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.kind == other.kind and (one.weight is None or torch.equal(one.weight, other.weight))


def test_refused():
    x = images((1, 3, 32, 32))
    with pytest.raises(fastres.UnsupportedError, match=r"no step for aten\.tanh"):
        frozen_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh()), x)
    frozen = frozen_of(small(), x)
    for bad, word in (((1, 4, 32, 32), "3 channels"), ((3, 32, 32), "4 dimensions"), ((1, 3, 0, 32), "non-empty")):
        with pytest.raises(ValueError, match=word):
            frozen(images(bad))
    with pytest.raises(ValueError, match="without gradient"):
        frozen(x.clone().requires_grad_())
    for call in (frozen.train, frozen.half, lambda: frozen.save("x"), lambda: fastres.freeze(frozen, x)):
        with pytest.raises((fastres.UnsupportedError, ValueError), match=r"frozen|quantised"):
            call()
    with pytest.raises(ValueError, match="on the CPU or a CUDA device"):
        base.check_images("example", x.to("meta"))


def test_truth_is_computed_once_for_all_candidates(monkeypatch):
    op = REGISTRY["conv_bn_act"]
    counted = []
    monkeypatch.setattr(op, "reference", lambda *args, real=op.reference: counted.append(1) or real(*args))
    args = op.samples(torch.device("cpu"), torch.float32)[0].args
    truth = tuner.Truth(op, args)
    assert truth.judge(lambda *a: torch.zeros_like(truth.same[0])) and len(counted) == 2


def test_lively_weights_reach_every_layer():
    """Negative scales and a zero one."""
    model, x = lively(fastres.models.cifar.resnet(8)).eval(), images((2, 3, 32, 32))
    y = frozen_of(model, x)(x)
    with torch.no_grad(), fastres.use("torch"):
        assert_close_to_truth(y, model(x), copy.deepcopy(model).double()(x.double()), torch.float32)
