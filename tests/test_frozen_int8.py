"""Networks in 8-bit integers as on a GPU: here over CPU tensors, the capture replaced by the call, beside the CPU's plans."""

import copy
import pickle

import pytest
import torch
from _modules import lively
from _uncaptured import Uncaptured
from _weights_once import weights_once  # noqa: F401
from test_frozen import NETWORKS, images, small
from test_int8 import CASES, Steps, Sum, conv, quiet
from torch import nn

import fastres
from fastres import dispatch, timing
from fastres.dispatch import Backend
from fastres.frozen import choose, device, device_int8, make
from fastres.ops import _conv_cpu
from fastres.ops.conv_int8 import CONV_INT8
from fastres.ops.pool_int8 import POOL_INT8
from fastres.ops.quantize_int8 import QUANTIZE_INT8

REASON = _conv_cpu.lacks(torch.int8)
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def uncaptured(monkeypatch):
    monkeypatch.setattr(device, "Graphs", Uncaptured)
    monkeypatch.setattr(choose, "SECONDS", 1e-3)
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)


def both(model, x, **options):
    """The CPU's plan, and the same calibration as calls of ops."""
    model = model.eval()
    return fastres.freeze(model, x, quantize=quiet([x], **options)), make.by_ops(model, x, torch.int8, quiet([x], **options))


def agree(native, by_ops, *batches):
    for x in batches:
        y, expected = by_ops(x), native(x)
        assert y.dtype == torch.float32 and torch.equal(y, expected)


@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_bytes_of_the_cpus_plan(name):
    torch.manual_seed(0)
    model, shape = CASES[name]()
    x = images(shape)
    native, by_ops = both(model, x)
    assert native.scales.values() and list(native.scales.values()) == list(by_ops.scales.values())
    agree(native, by_ops, x, x[:1], 3 * x, images(shape, 5))


READERS = {  # of the images, with the channels and the padding that these are quantised with
    "a stem": (lambda: Steps(conv(3, 8, 3, padding=1), nn.ReLU()), 3, (4, (1, 1))),
    "of five channels": (lambda: Steps(conv(5, 8, (3, 1), padding=(1, 0)), nn.ReLU()), 5, (8, (1, 0))),
    "two of one padding": (lambda: Sum(conv(3, 8, 5, padding=2), conv(3, 8, 5, padding=2)), 3, (4, (2, 2))),
    "two of other paddings": (lambda: Sum(conv(3, 8, 3, padding=1), conv(3, 8, 1)), 3, (4, (0, 0))),
    "a shortcut": (lambda: Sum(conv(3, 3, 3, padding=1)), 3, (3, (0, 0))),
    "a pool": (lambda: Steps(nn.MaxPool2d(3, 2, 1), conv(3, 8, 3, padding=1)), 3, (3, (0, 0))),
    "a batch norm": (lambda: Steps(lively(nn.BatchNorm2d(3)), nn.ReLU(), conv(3, 8, 1)), 3, (3, (0, 0))),
}


@pytest.mark.parametrize("name", READERS)
def test_images_are_quantised_as_who_reads_them_wants(name):
    torch.manual_seed(0)
    make_model, channels, wanted = READERS[name]
    x = images((3, channels, 11, 13))
    native, by_ops = both(make_model(), x)
    agree(native, by_ops, x, x[:1], 3 * x)
    assert by_ops._taken == wanted
    step = by_ops.plan(x.shape).steps[0]
    assert step.call.op is QUANTIZE_INT8 and step.call.rest[2:] == wanted


@pytest.mark.parametrize("name", sorted({n for n in NETWORKS if not n.startswith("in groups")} - {"wide", "timm, gated"}))
def test_networks_give_the_bits_of_the_cpus_plan(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    x = images(shape)
    native, by_ops = both(fastres.restore(lively(model)), x)
    agree(native, by_ops, x, images(shape, 5))
    assert native.quality == by_ops.quality


def test_batches_sizes_and_layouts():
    native, by_ops = both(small(), images((6, 3, 32, 32)))
    wide = images((4, 6, 40, 70))
    given = [images((n, 3, 32, 32), n) for n in (1, 3, 5, 7)]
    agree(native, by_ops, *given, wide[:2, ::2, 3:, ::2], wide.transpose(2, 3)[:, :3], images((2, 3, 32, 32)).bfloat16())
    assert by_ops(wide[:0, :3]).shape == (0, 10)


def test_values_that_are_not_finite_give_nan_in_their_image_alone():
    x = images((5, 3, 32, 32))
    _, by_ops = both(small(), x)
    y = by_ops(x)
    for strange in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[3, 1, 7, 9] = strange
        found = by_ops(bad)
        assert found[3].isnan().all() and torch.equal(found[[0, 1, 2, 4]], y[[0, 1, 2, 4]])
    assert by_ops(x * 1e30).isfinite().all() and torch.equal(by_ops(x * 1e30), by_ops(x * 1e37))


def test_the_gate_is_the_same():
    x = images((4, 3, 32, 32))
    for options, word in (({"error": 1e-6}, "error is"), ({"agreement": 2.0}, "agreement must be")):
        with pytest.raises((fastres.VerificationError, ValueError), match=word):
            make.by_ops(small(), x, torch.int8, quiet([x], **options))
    labels = torch.tensor([0, 1, 2, 3])
    good = make.by_ops(small(), x, torch.int8, quiet([(x, labels)], agreement=0.5))
    assert good.quality.images == 4 and good.quality.agreement >= 0.5 and good.quality.accuracy is not None


def test_files_of_one_device_are_those_of_the_other(tmp_path, monkeypatch):
    x = images((2, 3, 32, 32))
    native, by_ops = both(small(), x)
    native.save(tmp_path / "native")
    by_ops.save(tmp_path / "by ops")
    assert (tmp_path / "native").read_bytes() == (tmp_path / "by ops").read_bytes()
    agree(fastres.load_frozen(tmp_path / "by ops", x), make._loaded_by_ops(tmp_path / "native", x), x, x[:1])
    again = make._loaded_by_ops(tmp_path / "native", x)
    assert again.quality == native.quality
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        agree(native, copied, x)
        assert copied.quality == native.quality
    for load in (fastres.load_frozen, make._loaded_by_ops):
        with pytest.raises(ValueError, match="3 channels"):
            load(tmp_path / "native", images((2, 4, 32, 32)))
    with pytest.raises(TypeError, match="example must be"):
        fastres.load_frozen(tmp_path / "native", "x")


def test_update_is_refused_and_says_what_to_do():
    x = images((2, 3, 32, 32))
    _, by_ops = both(small(), x)
    with pytest.raises(fastres.UnsupportedError, match="freeze the model again"):
        by_ops.update(small())


def test_explain(monkeypatch):
    monkeypatch.setattr(timing, "peaks", lambda device, dtype: (1e10, 1e11))
    x = images((2, 3, 32, 32))
    _, by_ops = both(small(), x)
    told = fastres.explain(by_ops, x)
    assert told.dtype == "int8" and told.peaks["matmul"] == 200.0
    convolutions = [step for step in told.steps if step.op.startswith("conv")]
    assert convolutions and all(step.algorithm == "torch" and step.ms > 0 for step in convolutions)
    assert "linear" in str(told) and "conv+add+relu" in str(told)


def test_a_wrong_kernel_is_not_run_and_a_right_one_is_where_it_is_faster(monkeypatch):
    """Each is held against the definition on the call's shape."""
    ran = []

    def off_by_one(*args):
        y = CONV_INT8.reference(*args)
        return y ^ 1 if y.dtype == torch.int8 else y + 1

    def right(*args):
        ran.append(args)
        return CONV_INT8.reference(*args)

    for name, run in (("wrong", off_by_one), ("right", right)):
        kernel = Backend(name, lambda *args: None, lambda run=run: run)
        monkeypatch.setattr(CONV_INT8, "backends", (kernel, *CONV_INT8.backends))
    times = {"wrong": 1.0, "right": 2.0, "torch": 3.0}

    def interleaved(given, *_, **__):
        return {name: timing.Timing(times[name], times[name], times[name], 5, 1, "") for name in given}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    x = images((2, 3, 32, 32))
    native, by_ops = both(small(), x)
    ran.clear()
    agree(native, by_ops, x)
    steps = [step for step in by_ops.plan(x.shape).steps if step.call.op is CONV_INT8]
    assert {step.choice.kernel for step in steps} == {"right"} and len(ran) == len(steps)
    failures = {c.failure for step in steps for c in step.choice.candidates if c.backend == "wrong"}
    assert any("other integers" in failure for failure in failures)


def test_calls_that_differ_in_values_alone_are_timed_once():
    """A residual's scale is one."""
    model, x = fastres.models.cifar.resnet(20).eval(), images((2, 3, 32, 32))
    _, by_ops = both(model, x)
    calls = [step.call for step in by_ops.plan(x.shape).steps if step.call.op is CONV_INT8]
    added = [call.rest[4] for call in calls if len(call.inputs) == 2]
    timed = [key for key in by_ops._choices if key[0] == CONV_INT8.name]
    assert len(set(added)) == len(added) == 9 and len(timed) <= 11 < len(calls)


def test_without_a_proven_kernel_it_is_refused_on_a_gpu(monkeypatch):
    """And with one, or with a forced one, it is not."""
    args = CONV_INT8.samples(CPU, torch.float32)[0].args
    monkeypatch.setattr(CONV_INT8, "samples", lambda device, dtype: [type("S", (), {"args": args})])
    kernel = Backend("triton", lambda *args: None, lambda: CONV_INT8.reference)
    monkeypatch.setattr(CONV_INT8, "backends", (kernel, CONV_INT8.backends[-1]))
    monkeypatch.setattr(dispatch, "why_not_proven", lambda op, backend, device: f"{backend.name} is not validated on sm_90")
    gpu = torch.device("cuda", 0)
    with pytest.raises(fastres.UnsupportedError, match=r"triton is not validated on sm_90.*fastres\.use\(conv_int8='triton'\)"):
        device_int8.check_kernel(gpu)
    for backend in ("triton", "torch"):
        with fastres.use(conv_int8=backend):
            device_int8.check_kernel(gpu)
    monkeypatch.setattr(dispatch, "why_not_proven", lambda op, backend, device: None)
    device_int8.check_kernel(gpu)
    device_int8.check_kernel(CPU)


def test_calibration_is_not_rounded_to_tf32(monkeypatch):
    from fastres.frozen import calibrate

    seen, real = [], calibrate.result
    setting = torch.backends.cudnn.conv

    def result(*args):
        seen.append(setting.fp32_precision)
        return real(*args)

    monkeypatch.setattr(calibrate, "result", result)
    before = setting.fp32_precision
    both(nn.Sequential(nn.Conv2d(3, 8, 1)), images((1, 3, 4, 4)))
    assert set(seen) == {"ieee"} and setting.fp32_precision == before


X, BYTES = torch.zeros(2, 3, 8, 8), torch.zeros(1, 4, 6, 6, dtype=torch.int8)
STEM, WHOLE = ((3, 3), (2, 2), (1, 1), False), ((0, 0), (1, 1), (0, 0), False)
WRONG = [
    (QUANTIZE_INT8, (X.half(), 1.0, 0, 4, (0, 0)), "x must be float32"),
    (QUANTIZE_INT8, (X[0], 1.0, 0, 4, (0, 0)), r"of shape \(3, 8, 8\)"),
    (QUANTIZE_INT8, ("x", 1.0, 0, 4, (0, 0)), "x must be a torch.Tensor"),
    (QUANTIZE_INT8, (X.to_sparse(), 1.0, 0, 4, (0, 0)), "strided"),
    (QUANTIZE_INT8, (X, 0.0, 0, 4, (0, 0)), "scale must be"),
    (QUANTIZE_INT8, (X, float("nan"), 0, 4, (0, 0)), "scale must be"),
    (QUANTIZE_INT8, (X, 1.0, 256, 4, (0, 0)), "zero must be a byte"),
    (QUANTIZE_INT8, (X, 1.0, 0.0, 4, (0, 0)), "zero must be a byte"),
    (QUANTIZE_INT8, (X, 1.0, 0, 2, (0, 0)), "channels must be those of x, 3"),
    (QUANTIZE_INT8, (X, 1.0, 0, 4, (0, -1)), "padding must be"),
    (POOL_INT8, (BYTES.float(), *STEM, None, None), "x must be int8"),
    (POOL_INT8, (BYTES[:, :0], *STEM, None, None), "x must be int8"),
    (POOL_INT8, (BYTES.to_sparse(), *STEM, None, None), "strided"),
    (POOL_INT8, (BYTES, (0, 3), *STEM[1:], None, None), "kernel must be of at least one pixel"),
    (POOL_INT8, (BYTES, (3, 3), (0, 1), *STEM[2:], None, None), "stride must be"),
    (POOL_INT8, (BYTES, (3, 3), (1, 1), (2, 0), False, None, None), "padding must be at most half"),
    (POOL_INT8, (BYTES, (7, 3), (1, 1), (0, 0), False, None, None), "kernel must be at most"),
    (POOL_INT8, (BYTES, *STEM[:3], 0, None, None), "ceil must be a bool"),
    (POOL_INT8, (BYTES, *WHOLE, 1.0, None), "bias must be given"),
    (POOL_INT8, (BYTES, *WHOLE, None, 1.0), "bias must be given"),
    (POOL_INT8, (BYTES, *WHOLE, float("inf"), 1.0), "scale must be a finite float"),
]


@pytest.mark.parametrize(("op", "args", "word"), WRONG, ids=[f"{op.name}: {word}" for op, _, word in WRONG])
def test_wrong_arguments_are_named(op, args, word):
    with pytest.raises((ValueError, TypeError), match=word):
        op.check(*args)


def test_no_image_and_no_window():
    y, strange = QUANTIZE_INT8(X[:0], 1.0, 0, 4, (1, 2))
    assert y.shape == (0, 4, 10, 12) and strange.shape == (0,)
    assert POOL_INT8(BYTES[:0], *STEM, None, None).shape == POOL_INT8(BYTES[:0], *STEM, 1.0, 0.0).shape == (0, 4, 3, 3)
