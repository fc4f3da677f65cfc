"""What machines and requests other than this one's are told: backends, files, models, and what the command line does then."""

import io
import os
import shutil
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch

from fastres import cli, dispatch, functional, info, memory, tune
from fastres.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from fastres.experiments import report, subject
from fastres.kernels import native, triton
from fastres.ops import REGISTRY, _conv, _conv_cpu, conv

pytestmark = pytest.mark.none
CL = torch.channels_last
ONE, ZERO = (1, 1), (0, 0)
ALL = {"level": 4, "bf16_dot": True, "int8_dot": True}


@pytest.fixture
def processor(monkeypatch):
    """Puts another processor, and whether PyTorch uses its AMX, in the place of this one."""

    def put(amx=False, **features):
        monkeypatch.setattr(native, "why_not", lambda name: None)
        monkeypatch.setattr(native, "cpu_features", lambda: ALL | features)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(_conv_cpu, "why_not_amx", lambda: None)

    return put


@pytest.mark.parametrize(
    ("dtype", "lacking", "words"),
    [
        (torch.float32, {}, None),
        (torch.bfloat16, {}, None),
        (torch.int8, {}, None),
        (torch.float32, {"level": 2}, "no AVX2 and FMA"),
        (torch.bfloat16, {"bf16_dot": False}, "no AVX-512 BF16"),
        (torch.int8, {"int8_dot": False}, "no AVX-512 VNNI"),
        (torch.bfloat16, {"amx": True}, None),
        (torch.float64, {}, "no float64 kernel"),
    ],
)
def test_the_native_convolution_tells_what_a_processor_lacks(processor, dtype, lacking, words):
    processor(**lacking)
    found = _conv_cpu.lacks(dtype)
    assert found is None if words is None else words in found


def test_the_native_convolution_tells_what_it_does_not_compute(processor, monkeypatch):
    processor()
    x, weight = torch.empty(1, 32, 8, 8), torch.empty(32, 32, 3, 3)
    refuse = _conv_cpu.why_not
    assert refuse(x, weight, ONE, 1) is None
    assert refuse(x, weight[:, :4], ONE, 8) is None
    assert "32 to 48 channels in 4 groups" in refuse(x, torch.empty(48, 8, 3, 3), ONE, 4)
    assert "without dilation" in refuse(x[:, :3], weight, (1, 2), 1)
    assert "at most 16384 values" in refuse(torch.empty(1, 8192, 1, 1), weight, ONE, 1)
    assert "no float64 kernel" in refuse(x.double(), weight, ONE, 1)
    assert "the tensors are on meta" in refuse(x.to("meta"), weight, ONE, 1)
    monkeypatch.setattr(native, "why_not", lambda name: f"no {name} was built")
    assert refuse(x, weight, ONE, 1) == "no cpu_conv_bn_act was built"


def test_convolutions_of_training_tell_what_they_leave_to_onednn(processor):
    x, grad_y = (torch.empty(8, 64, 28, 28).contiguous(memory_format=CL) for _ in range(2))
    geometry = (ONE, ONE, ONE, 1)
    for amx, dtype in [(False, torch.bfloat16), (True, torch.float32), (True, torch.bfloat16)]:
        processor(amx=amx)
        a, b, weight = x.to(dtype), grad_y.to(dtype), torch.empty(64, 64, 3, 3, dtype=dtype)
        found = [
            conv.why_not(a, weight, None, *geometry),
            conv.why_not_input(b, weight, (28, 28), *geometry),
            conv.why_not_weight(b, a, (3, 3), *geometry),
        ]
        if amx and dtype == torch.bfloat16:
            assert all("oneDNN is faster with fewer than 512 weights a pixel" in reason for reason in found[:2])
            found = found[2:]
        assert not any(found)


def test_onednn_tells_what_it_is_not_used_for(monkeypatch):
    x, weight = torch.empty(1, 8, 8, 8), torch.empty(8, 8, 3, 3)

    def refuse(x, padding=ONE, dilation=ONE):
        return _conv.why_not_onednn(x, None, weight, padding, dilation, 1, "relu")

    assert refuse(x) is None
    assert "the tensors are on meta" in refuse(x.to("meta"))
    assert "got torch.float16" in refuse(x.half())
    assert "wholly in the padding" in refuse(x, padding=(3, 3))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert "no bfloat16 instructions" in refuse(x.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "has no oneDNN" in refuse(x)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "triton_interpret", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_triton_tells_which_device_and_version_it_needs(interpreted, monkeypatch):
    installed = pytest.importorskip("triton", reason="the package triton is not installed")
    refuse, gpu = triton.why_not_device.__wrapped__, torch.device("cuda")
    assert refuse(gpu) is None
    assert "the tensors are on cpu" in refuse(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert refuse(gpu) == "it needs compute capability (8, 0) or newer, got (7, 5)"
    monkeypatch.setattr(installed, "__version__", "3.5.1")
    assert refuse(gpu) == "it needs triton 3.6 or newer, got 3.5.1"
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert refuse(gpu) == "the package triton is not installed"


def test_triton_tells_which_activations_it_takes(monkeypatch):
    monkeypatch.setattr(triton, "why_not_device", lambda device: None)
    x = torch.empty(2, 8, 4, 4)
    assert triton.why_not(x, x) is None
    assert triton.why_not(x.double()) == "it has no float64 kernel"
    assert triton.why_not(x, x.half()) == "the activations must have one dtype, got torch.float32 and torch.float16"
    assert "not all dense" in triton.why_not(x, x.contiguous(memory_format=CL))


WRONG = {
    "a mask of another kind": ("bn_add_act_backward", "mask", lambda mask: 3, TypeError, "a torch.Tensor, got int"),
    "a mask of another size": ("bn_add_act_backward", "mask", lambda mask: mask[1:], ValueError, "of dtype torch.uint8 and"),
    "a mask elsewhere": ("bn_add_act_backward", "mask", lambda mask: mask.to("meta"), ValueError, "on the device of x"),
    "too much padding": ("bn_act_maxpool", "padding", lambda pair: (2, 2), ValueError, "at most half of kernel_size"),
    "too large a window": ("bn_act_maxpool", "kernel_size", lambda pair: (19, 19), ValueError, "at most .* .10, 10., got .19"),
    "a gradient of another size": ("bn_act_maxpool_backward", "grad_y", lambda t: t[:1], ValueError, "of shape"),
    "an output of another size": ("conv_backward_input", "grad_y", lambda t: t[:, :, 1:], ValueError, "of the output's shape"),
    "an output's gradient of another dtype": ("bn_act_backward", "grad_y", lambda t: t.double(), ValueError, "of x's dtype"),
    "a pooled gradient of another dtype": ("bn_act_maxpool_backward", "grad_y", lambda t: t.half(), ValueError, "of x's dtype"),
    "a block's gradient of another kind": ("bn_add_act_backward", "grad_y", lambda t: t.bfloat16(), ValueError, "of x's dtype"),
    "a sparse mask": ("bn_add_act_backward", "mask", lambda mask: mask.to_sparse(), ValueError, "a strided tensor"),
    "no mean": ("bn_act", "mean", lambda t: None, TypeError, "a torch.Tensor, got NoneType"),
    "no var": ("conv_backward_bn_act", "var", lambda t: None, TypeError, "a torch.Tensor, got NoneType"),
    "no mean of the shortcut": ("bn_add_bn_act", "residual_mean", lambda t: None, TypeError, "a torch.Tensor, got NoneType"),
    "no residual in a chain": (
        "conv_bn_act_conv_bn_add_act_conv_bn_act", "residual", lambda t: None, TypeError, "a torch.Tensor, got NoneType"),
    "a negative size": ("conv_backward_input", "size", lambda size: (-1, 1), ValueError, "two whole numbers"),
    "a size that is none": ("conv_backward_input", "size", lambda size: None, TypeError, "a pair of int"),
    "a negative kernel": ("conv_backward_weight", "kernel", lambda size: (-1, 1), ValueError, "two whole numbers"),
    "a flag that is none": ("bn_act_backward", "training", lambda flag: 1, TypeError, "a bool, got int"),
    "a pool's flag that is none": ("bn_act_maxpool_backward", "training", lambda flag: None, TypeError, "a bool"),
    "negative groups": ("conv_backward_input", "groups", lambda groups: -1, ValueError, "at least 1"),
    "no groups": ("conv_backward_weight", "groups", lambda groups: None, TypeError, "an int"),
    "an eps that is no double": ("bn_act", "eps", lambda eps: 2**64, ValueError, "a finite number"),
    "a weight of another dtype": ("conv_backward_input", "weight", lambda t: t.double(), ValueError, "of grad_y's dtype"),
}


def replaced(name, argument, change):
    """The arguments of an op's first sample, one of them changed."""
    names = [each.name for each in getattr(torch.ops.fastres, name).default._schema.arguments]
    args = list(next(iter(REGISTRY[name].samples(torch.device("cpu"), torch.float32))).args)
    args[names.index(argument)] = change(args[names.index(argument)])
    return args


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_of_an_op_are_named(case):
    name, argument, change, kind, words = WRONG[case]
    REGISTRY[name].check(*replaced(name, argument, lambda value: value))
    with pytest.raises(kind, match=rf"fastres\.{name}: {argument} must be {words}"):
        REGISTRY[name].check(*replaced(name, argument, change))


class Subclass(torch.Tensor):
    pass


WRONG_RESIDUALS = {
    "size": (lambda t: t[:1], "shape"), "rank": (lambda t: t[0], "shape"), "device": (lambda t: t.to("meta"), "on the device"),
    "layout": (lambda t: t.to_sparse(), "a strided tensor"), "dtype": (lambda t: t.long(), "of dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_RESIDUALS)
def test_a_subclass_is_checked_at_every_call(case):
    """What is kept of a call that passed must not serve another one of other sizes, dtypes or devices."""
    x, op = torch.randn(2, 3, 4, 4), torch.ops.fastres.add_act
    change, words = WRONG_RESIDUALS[case]
    for kind in (torch.Tensor, Subclass):
        assert torch.equal(op(x, x.as_subclass(kind), "relu"), (x + x).relu())
        with pytest.raises(ArgumentError, match=rf"residual must be .*{words}"):
            op(x, change(x).as_subclass(kind) if case != "layout" else change(x), "relu")
    wider = op(x, x.double().as_subclass(Subclass), "relu")
    assert wider.dtype == torch.float64 and torch.equal(wider, (x + x.double()).relu())


@pytest.mark.parametrize("pair", [(1.0, 1.0), (True, True), (1, 1.0)])
def test_a_pair_that_equals_another_is_checked_too(pair):
    x, weight, one = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.ones(2)
    run = functional.conv_bn_act
    assert run(x, weight, None, one, one, stride=(1, 1)).shape == (1, 2, 2, 2)
    for name in ("stride", "dilation"):
        with pytest.raises(ArgumentTypeError, match=f"{name} must be a pair of int"):
            run(x, weight, None, one, one, **{name: pair})


def test_kernels_tell_which_arguments_they_leave_to_pytorch():
    strided = replaced("bn_add_act_backward", "mask", lambda mask: mask.repeat_interleave(2)[::2])
    mixed = replaced("add_act", "residual", lambda residual: residual.double())
    for name, args, words in (
        ("bn_add_act_backward", strided, "the mask must be contiguous, got stride 2"),
        ("add_act", mixed, "both tensors must have one dtype, got torch.float32 and torch.float64"),
    ):
        choice = REGISTRY[name].explain(*args)
        assert isinstance(choice, dispatch.Choice) and choice.backend.name == "torch"
        if native.why_not_cpu() is None:
            assert choice.refusals["cpu"] == words and f"  cpu: {words}" in str(choice)
        assert choice.to_dict()["refusals"] == choice.refusals


def test_a_gpus_names(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    dispatch.forget()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert tune.device_name(gpu) == "nvidia-h200" and tune.architecture(gpu) == "sm_90"
    assert "not validated on sm_90" in tune.why_not_validated("add_act", "of tomorrow", gpu)
    dispatch.forget()


def test_a_gpu_on_which_no_kernel_is_validated_is_told_of_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda")
    kernel = next(b for b in REGISTRY["add_act"].backends if b.name == "cuda")
    dispatch.forget()
    with pytest.warns(UserWarning, match="validated on sm_80 yet, .* on A GPU; .*fastres tune MODEL"):
        assert "not validated on sm_80" in dispatch.why_not_proven("add_act", kernel, gpu)
    tune.store(gpu, {"triton": ["bn_act"]}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.why_not_proven("add_act", kernel, gpu)  # told before
        monkeypatch.setattr(tune, "_warned", set())
        assert dispatch.why_not_proven("add_act", kernel, gpu)  # some kernels run
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        dispatch.forget()
        assert dispatch.why_not_proven("add_act", replace(kernel, name="cuda_wide"), gpu)
    dispatch.forget()


def test_a_tuning_file_is_a_plain_small_file_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    path = tune.store(torch.device("cpu"), {}, {"k": {"backend": "cpu"}})
    assert tune.read(path)["choices"] == {"k": {"backend": "cpu"}}
    real = os.getuid()
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: real + 1)
        with pytest.raises(ValueError, match="belongs to another user"):
            tune.read(path)
    with open(path, "ab") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(ValueError, match="larger than 16 MiB"):
        tune.read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a plain file"):
        tune.read(path)


def test_what_cannot_be_stored_leaves_no_part(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises((OSError, UnsupportedError), match="no space left"):
        tune.store(torch.device("cpu"), {}, {"k": {"backend": "cpu"}})
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_c_library_that_refuses_is_told(monkeypatch):
    class Library:
        def mallopt(self, parameter, value):
            return 0

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.40"))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library())
    with pytest.raises(UnsupportedError, match=r"mallopt\(M_MMAP_MAX, 0\) was refused"):
        memory.reuse_memory()


def test_memory_of_a_system_without_large_pages(monkeypatch):
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    found = memory.large_pages(5000)
    assert found.shape == (5000,) and found.dtype == torch.uint8 and found.fill_(7).sum() == 35000


def test_programs_that_fail_hang_or_are_absent_say_nothing(monkeypatch):
    ask = info._said.__wrapped__
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "absent" else "/bin/sh")
    assert ask("sh", ("-c", "echo version 12.4"), r"version ([\d.]+)") == "12.4"
    assert ask("sh", ("-c", "echo version 12.4; exit 1"), r"version ([\d.]+)") is None
    assert ask("absent", (), "") is None

    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert ask("sh", (), "") is None


def test_networks_are_built_for_classes_and_colours(tmp_path):
    for name, classes, channels in (("plain18", 10, 3), ("cifar.plain8", 5, 1), ("resnet18", 7, 3)):
        model = subject.builder(name)(classes, channels).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, channels, 32, 32)).shape == (1, classes)
    mine = tmp_path / "mine.py"
    mine.write_text("import torch.nn as nn\ndef make():\n    return nn.Linear(2, 3)\ndef number():\n    return 3\n")
    assert subject.builder(f"{mine}:make")(10, 3).out_features == 3  # as it is
    with pytest.raises(ArgumentError, match=r"must give a torch\.nn\.Module, got int"):
        subject.builder(f"{mine}:number")(10, 3)
    with pytest.raises(ArgumentError, match=r"has no nn\.Conv2d"):
        subject.load(f"{mine}:make")


def test_other_packages_networks_say_what_is_wrong(monkeypatch):
    monkeypatch.setattr(subject.importlib, "import_module", lambda name: (_ for _ in ()).throw(RuntimeError("of\nold")))
    with pytest.raises(UnsupportedError, match=r"timm:resnet18: timm cannot be imported \(RuntimeError: of\)"):
        subject.load("timm:resnet18")

    class Package:
        def get_model(self, name, **options):
            raise ValueError(f"Unknown model {name}\nknown are")

    monkeypatch.setattr(subject.importlib, "import_module", lambda name: Package())
    with pytest.raises(ArgumentError, match=r"torchvision:resnet51: Unknown model resnet51$"):
        subject.load("torchvision:resnet51")


def test_rows_that_were_not_timed_say_why(capsys):
    pytest.importorskip("rich", reason="the package rich is not installed")
    missing = {"rival": "compiled", "missing": "there is no compiler"}
    wrong = {"rival": "fastres", "error": 2.0, "allowed": 0.5}
    report.table("a table", [missing, wrong], "a caption")
    out = capsys.readouterr().out
    assert "compiled is missing: there is no compiler" in out and "wrong: not timed" in out
    assert report.cells(wrong)[-2:] == ["2", "0.5"]


def test_an_interrupt_and_a_reader_that_has_gone(monkeypatch, capsys):
    def fail(error):
        def info(arguments):
            raise error

        monkeypatch.setattr(cli, "info", info)
        return cli.main(["info"])

    assert fail(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "fastres: interrupted\n"
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    assert fail(BrokenPipeError()) == 1 and screen.closed
