"""The acceptance run, on a CPU: its tasks at small sizes, its time, what dies on the way, what it promises and draws."""

import functools
import json
import shutil
import sys

import pytest
import torch

from benchmarks import bench_overhead, harness, report, sources
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import beside, lane, plot, promises, run, smoke, tasks
from benchmarks.cases import CHAIN
from fastres import dispatch, tuner
from fastres.ops import REGISTRY, _conv_cpu

pytestmark = pytest.mark.none
CPU = torch.device("cpu")
FAKE = "_fake_worker"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "cache"))
    yield
    monkeypatch.undo()
    dispatch.forget()


def test_a_share_leaves_the_rest_to_others():
    now = [0.0]
    budget = run.Budget(100.0, lambda: now[0])
    share = budget.share(0.4)
    now[0] = 30.0
    assert (budget.left(), share.left()) == (70.0, 10.0)
    assert budget.share(0.5).left() == 35.0


def named(*names, do="kernel"):
    return [{"do": do, "name": name, "dtype": "bf16"} for name in names]


def test_a_process_that_dies_takes_only_its_own_task_with_it():
    some = [*named("peaks", do="peaks"), *named("a", "die", "raise", "b", "lost", "c")]
    found = {row["name"]: row for row in run.perform_all(some, run.Budget(60.0), CPU, FAKE)}
    assert "illegal memory access" in found["die"]["missing"] and found["raise"]["missing"] == "ValueError: no"
    assert found["a"]["process"] != found["b"]["process"] and found["b"]["measured"] == ["peaks"]
    assert found["lost"]["process"] == found["b"]["process"] != found["c"]["process"] and found["c"]["measured"] == ["peaks"]


def test_what_time_does_not_allow_is_a_row(monkeypatch):
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    found = {row["name"]: row for row in run.perform_all(named("a", "hang", "b"), run.Budget(2.5), CPU, FAKE)}
    assert "process" in found["a"]
    assert {found[name]["missing"] for name in ("hang", "b")} == {run.OUT_OF_TIME}


def test_a_real_worker_answers():
    task = {"do": "kernel", "name": "conv_bn_add_act", "batch": 1, "convolution": [8, 8, 1, 1, 4], "dtype": "fp32"}
    rows = run.perform_all([{"do": "peaks", "name": "peaks", "dtype": "fp32"}, task], run.Budget(120.0), CPU)
    assert {row["rival"] for row in rows if row["do"] == "kernel"} >= {"torch"}
    assert all(row["of_roof"] > 0 for row in rows if row["do"] == "kernel")


def test_tasks_are_plain_data_and_cover_every_op():
    kernels, networks = list(tasks.kernels()), list(tasks.networks())
    assert json.loads(json.dumps([*kernels, *networks])) is not None
    labels = [tasks.label(task) for task in (*kernels, *networks)]
    assert len(labels) == len(set(labels))
    covered = {op for task in kernels for op in getattr(tasks.CASE_IDS.get(task["name"]), "covers", [task["name"]])}
    on_gpus = {name for name, op in REGISTRY.items() if {backend.name for backend in op.backends} & set(dispatch.GPU_KERNELS)}
    assert covered - {"peaks"} == on_gpus and on_gpus
    cells = {(task["name"], task["dtype"], task["training"], task["batch"]) for task in networks}
    assert len(cells) == 3 * 2 * 5 and ("resnet152", "fp16", True, 64) in cells
    assert all(way in tasks.WAYS for task in networks for way in task["ways"])


def test_a_kernel_is_held_against_what_bounds_it(monkeypatch):
    worker = tasks.Worker(CPU)
    worker.peaks["fp32"] = 1e9, 1e15
    task = {"do": "kernel", "name": "bn_add_act-forward+backward", "shape": [2, 16, 6, 6], "dtype": "fp32"}
    rows = worker.perform(task)
    assert {row["name"] for row in rows} == {"bn_add_act_train", "bn_add_act_backward"}
    for row in rows:
        moved, _ = REGISTRY[row["name"]].cost(torch.empty(row["shape"]))
        assert row["bound"] == "memory" and row["of_roof"] == pytest.approx(moved / 1e9 / row["median_s"])
    monkeypatch.setattr(tuner.Truth, "judge", lambda self, run: "output 0 has error 1")
    wrong = [row for row in worker.perform(task) if row["rival"] != "torch"]
    assert all(row["failure"] == "output 0 has error 1" and "median_s" not in row for row in wrong)


def test_a_convolution_task_is_that_convolution():
    task = {"do": "kernel", "name": "conv_bn_act", "batch": 2, "convolution": [3, 8, 7, 2, 15], "dtype": "fp32"}
    args = tasks.convolution(task, torch.float32, CPU)
    y = REGISTRY["conv_bn_act"](*args)
    assert y.shape == (2, 8, 8, 8)
    assert tasks.named(REGISTRY["conv_bn_act"], args)["name"] == "conv_bn_act 7x7/2 3→8"


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "label"),
    [
        ("conv_bn_add_conv_bn_act", [8, 16, 3, 1, 5, 4, 2], (2, 4, 10, 10), "3x3/1 8→16, 1x1/2 4→16"),
        (CHAIN, [8, 16, 3, 1, 5, 24], (2, 24, 5, 5), "3x3/1 8→16, 1x1/1 16→24"),
        (f"{CHAIN}_conv_bn_act", [8, 16, 3, 1, 5, 24], (2, 24, 5, 5), "3x3/1 8→16, 1x1/1 16→24, 1x1/1 24→8"),
    ],
)
def test_several_convolutions_are_held_against_their_ops(name, sizes, shape, label):
    task = {"do": "kernel", "name": name, "batch": 2, "dtype": "fp32", "convolution": sizes}
    worker = tasks.Worker(CPU)
    worker.peaks["fp32"] = 1e9, 1e12
    rows = worker.perform(task)
    assert {row["rival"] for row in rows} == {"apart", "torch"} and all(row["of_roof"] > 0 for row in rows)
    assert {row["name"] for row in rows} == {f"{name} {label}"}
    op, args = REGISTRY[name], tasks.convolution(task, torch.float32, CPU)
    assert args[1].shape == shape
    for name, run_ in beside.apart(op, args).items():
        assert tuner.judge(op, run_, args) is None, name


def test_a_stem_is_held_against_its_two_ops():
    task = {"do": "kernel", "name": "conv_bn_act_maxpool", "batch": 2, "dtype": "fp32", "convolution": [3, 8, 7, 2, 15]}
    worker = tasks.Worker(CPU)
    worker.peaks["fp32"] = 1e9, 1e12
    rows = worker.perform(task)
    assert {row["rival"] for row in rows} == {"apart", "conv_bn_act, then pool", "torch"}
    assert {row["name"] for row in rows} == {"conv_bn_act_maxpool 7x7/2 3→8"}
    op, args = REGISTRY[task["name"]], tasks.convolution(task, torch.float32, CPU)
    for name, run_ in beside.apart(op, args).items():
        assert tuner.judge(op, run_, args) is None, name


def test_a_convolution_with_statistics_is_held_against_the_pass_it_spares():
    task = {"do": "kernel", "name": tasks.STATISTICS, "batch": 2, "convolution": [8, 16, 3, 2, 7], "dtype": "fp32"}
    worker = tasks.Worker(CPU)
    worker.peaks["fp32"] = 1e9, 1e12
    rows = worker.perform(task)
    assert {row["rival"] for row in rows} == {"apart", "torch"}
    assert {row["name"] for row in rows} == {"conv_statistics 3x3/2 8→16"}
    timed = [{**rows[0], "rival": name, "median_s": time} for name, time in (("apart", 1.0), ("cuda_wide", 2.0))]
    ((promise, kept),) = promises.kernel_promises(timed)
    assert "0.50 times as fast as the best of cuDNN" in promise and not kept


def test_a_gradient_that_goes_on_through_a_batch_norm_is_held_against_the_two():
    task = {"do": "kernel", "name": tasks.GRADIENT, "batch": 2, "convolution": [8, 16, 3, 1, 7], "dtype": "fp32"}
    worker = tasks.Worker(CPU)
    worker.peaks["fp32"] = 1e9, 1e12
    rows = worker.perform(task)
    assert {row["rival"] for row in rows} == {"apart", "torch"}
    assert {row["name"] for row in rows} == {"conv_backward_bn_act 3x3/1 8→16"}
    op, args = REGISTRY[task["name"]], tasks.convolution(task, torch.float32, CPU)
    assert tuner.judge(op, op.fallback, args) is None


def test_a_network_in_integers_is_held_against_their_definition_and_bf16():
    if reason := _conv_cpu.lacks(torch.int8):
        pytest.skip(reason)
    task = next(task for task in tasks.whole() if task["do"] == "integers")
    own, half = tasks.Worker(CPU).perform({**task, "name": "cifar.resnet8", "batch": 8, "size": 16, "seconds": 0.02})
    assert own["ok"] and own["ratio"] == 1.0 and own["error"] < 0.1 and half["rival"] == "fastres.freeze in bf16"
    assert own["shape"] == [8, 3, 16, 16] and own["do"] == "integers" and half["median_s"] > 0


def test_a_convolution_of_integers_is_held_against_twice_the_rate():
    worker = tasks.Worker(CPU)
    worker.peaks[tasks.INT8] = 1e15, 1e9
    size = [8, 16, 3, 2, 7]
    (row,) = worker.perform({"do": "kernel", "name": tasks.INTEGERS, "batch": 2, "convolution": size, "dtype": tasks.INT8})
    assert row["rival"] == "torch" and row["bound"] == "matmul" and row["name"] == "conv_int8 3x3/2 8→16"
    worker.measure_peaks({"dtype": "bf16"}, lambda: 1.0)
    assert worker.peaks[tasks.INT8][1] == 2 * worker.peaks["bf16"][1]


IMAGES = 2 * 16 * 16 * 3 * 4 + 2 * 22 * 22 * 4  # as floats, and in words with their padding


@pytest.mark.parametrize(("name", "moved"), [("quantize_int8", IMAGES), ("pool_int8", 2 * 3 * (16 * 16 + 8 * 8))])
def test_a_step_of_bytes_is_held_against_the_copy(name, moved):
    worker = tasks.Worker(CPU)
    worker.peaks[tasks.INT8] = 1e9, 1e15
    (row,) = worker.perform({"do": "kernel", "name": f"{name}-forward", "shape": [2, 3, 16, 16], "dtype": tasks.INT8})
    assert row["name"] == name and row["rival"] == "torch" and row["bound"] == "memory"
    assert row["of_roof"] == pytest.approx(moved / 1e9 / row["median_s"])


def test_a_validation_is_kept_with_its_source(monkeypatch):
    worker = tasks.Worker(CPU)
    (row,) = worker.perform({"do": "validate", "name": "add_act", "rival": "torch", "dtype": "bf16"})
    assert row["ok"] and "source" not in row
    monkeypatch.setattr(tuner.Session, "on_samples", lambda *args: "wrong")
    (row,) = worker.perform({"do": "validate", "name": "add_act", "rival": "triton", "dtype": "fp16"})
    assert not row["ok"] and row["failure"] == "wrong" and row["source"] == sources.fingerprint("add_act", "triton")


@pytest.mark.parametrize("training", [True, False])
def test_networks_in_turns(training):
    ways = ["fastres", "eager channels_last", *([] if training else ["eager channels_last + AMP"]), "torch.compile"]
    task = {"do": "network", "name": "cifar.resnet8", "size": 16, "batch": 2, "dtype": "bf16", "training": training}
    rows = tasks.Worker(CPU).perform({**task, "ways": ways, "seconds": 0.02, "replay": training}, lambda: 20.0)
    assert [row["rival"] for row in rows] == ways
    assert rows[0]["dtype"] == ("bfloat16 autocast" if training else "bfloat16")
    assert rows[0]["pass"] == ("training" if training else "inference, as called")
    assert "out of time" in rows[-1]["missing"] and all("median_s" in row for row in rows[:-1])


@pytest.mark.cpu
def test_smoke_runs_what_is_here():
    assert smoke.smoke(CPU) > len(REGISTRY)


def test_a_lane_is_counted(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n@pytest.mark.parametrize('n', [1, 2])\ndef test_d(n): pass\n"
    )
    (row,) = lane.tests("not cuda", run.Budget(60.0), (str(file), "--rootdir", str(tmp_path)))
    assert (row["ok"], row["passed"], row["skipped"], len(row["failed"])) == (False, 3, 1, 1)
    assert row["failed"][0].endswith("test_b")


def test_a_lane_that_takes_too_long_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lane, "GRACE_S", 2.0)  # all of which it takes where interrupts are ignored, as in the background
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    (row,) = lane.tests("not cuda", run.Budget(3.0), (str(file), "--rootdir", str(tmp_path)))
    assert not row["ok"] and row["failure"] == run.OUT_OF_TIME


def test_the_sanitizer_where_it_is_and_where_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(lane.shutil, "which", lambda *args, **options: None)
    assert all(row["missing"] for row in lane.sanitized(run.Budget(10.0)))
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ncase "$*" in *racecheck*) echo "1 hazard"; exit 99;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(lane.shutil, "which", lambda *args, **options: str(tool))
    found = {row["name"].split()[1]: row for row in lane.sanitized(run.Budget(10.0))}
    assert found["racecheck"]["failure"] == "1 hazard" and found["memcheck"]["ok"]


def kernel_row(name, rival, median, share=0.9, dtype="bf16"):
    about = {"do": "kernel", "name": name, "shape": [2, 8, 4, 4], "dtype": dtype, "rival": rival}
    return about | {"median_s": median, "of_roof": share, "bound": "memory", "ratio": 1.0}


def test_a_cpu_compares_networks_and_measures_the_overhead_of_a_call(monkeypatch):
    monkeypatch.setattr(acceptance, "load", lambda name, **options: None)
    rows = [{"name": "resnet50", "rival": way.name, "ok": True, "ratio": 2.0} for way in acceptance.CPU_WAYS]
    monkeypatch.setattr(acceptance, "compare", lambda subject, ways, **options: rows)
    few = functools.partial(bench_overhead.add_act_over_eager, batches=5)
    monkeypatch.setattr(bench_overhead, "add_act_over_eager", few)
    kept = []
    found, promised = acceptance.cpu_parts(CPU, ["models"], run.Budget(60.0), kept.append, None)
    assert kept == [found] and len(found) == 2 * len(rows) and all(row["do"] == "network" for row in found)
    overheads = [text for text, _ in promised if text.startswith("add_act")]
    assert len(overheads) == 2 and "without grad" in overheads[0] and "with grad" in overheads[1]


def test_promises_of_kernels():
    rows = [kernel_row("bn_act", "cuda", 1.0, 0.86), kernel_row("bn_act", "torch", 2.0, 0.4)]
    rows += [kernel_row("add_act", "cuda", 1.0, 0.8), kernel_row("add_act", "triton", 0.9, 0.84)]
    rows += [kernel_row("conv_bn_act", name, t) for name, t in (("triton", 1.0), ("cudnn", 0.9), ("torch", 2.0))]
    rows += [kernel_row("conv_bn_add_act", name, t) for name, t in (("triton", 0.8), ("cudnn", 0.9))]
    kept = {text.split()[0]: kept for text, kept in promises.kernel_promises(rows)}
    assert kept == {"bn_act": True, "add_act": False, "conv_bn_act": False, "conv_bn_add_act": True}


def test_promises_of_parity():
    rows = [
        {"do": "validate", "name": "a", "rival": "cuda", "ok": True},
        {"do": "validate", "name": "b", "rival": "cuda", "missing": "out of time"},
        {"do": "lane", "name": "compute-sanitizer memcheck", "missing": "not installed"},
        {"do": "lane", "name": "tests of the lane cuda", "ok": False, "failure": "1 failed"},
    ]
    assert [kept for _, kept in promises.parity_promises(rows)] == [True, False, False]


def network_rows():
    case = {"do": "network", "name": "net", "pass": "inference", "shape": [1, 3, 8, 8], "dtype": "bfloat16"}
    times = {"fastres": 0.01, "eager": 0.02}
    rows = [{**case, "rival": name, "median_s": t, "ratio": t / 0.01} for name, t in times.items()]
    return [*rows, {**case, "rival": "torch.compile", "missing": "out of time"}]


@pytest.mark.parametrize("rows", [[kernel_row("bn_act", "cuda", 1e-3), *network_rows()], network_rows()])
def test_a_picture_lies_beside_the_file(tmp_path, rows):
    pytest.importorskip("matplotlib")
    path = harness.save("acceptance", rows, CPU, tmp_path, clocks={"before": None, "after": None})
    assert json.loads(path.read_text())["clocks"] == {"before": None, "after": None}
    picture = plot.draw(path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name == "acceptance.png"


def test_without_a_gpu_it_says_so_and_does_what_it_can(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["acceptance", "--part", "kernels", "--minutes", "0.2", "--no-record"])
    assert acceptance.main() == 0
    said = capsys.readouterr().out
    assert "no GPU: the kernels for GPUs are not run" in said and "nothing was measured, and no file was written" in said


# ---- the source that a result holds for ---------------------------------------------------------------------


def kernels_of(backend):
    return [name for name, op in REGISTRY.items() if any(b.name == backend for b in op.backends)]


def test_every_kernel_file_belongs_to_an_op():
    for backend, suffix in (("cuda", "*_kernel.cu"), ("triton", "*.py")):
        same = [other for other, room in sources.ROOMS.items() if room == sources.ROOMS[backend]]
        used = {path for other in same for name in kernels_of(other) for path in sources.files(name, other)}
        room = {path for path in sources.ROOMS[backend].glob(suffix) if path.name != "__init__.py"}
        assert room <= used, room - used


def test_a_change_in_any_file_changes_the_hash(monkeypatch, tmp_path):
    for folder in ("csrc", "fastres"):
        shutil.copytree(sources.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ops = {"cuda": "bn_act", "cuda_wide": "conv_bn_act", "cuda_cluster": "bn_act_train", "triton": "bn_act"}
    ops["cudnn"] = "conv_bn_add_act"
    before = {backend: sources.fingerprint(op, backend) for backend, op in ops.items()}
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(sources, "ROOMS", {k: tmp_path / v.relative_to(harness.ROOT) for k, v in sources.ROOMS.items()})
    for backend, op in ops.items():
        for path in sources.files(op, backend):
            text = path.read_text()
            assert sources.fingerprint(op, backend) == before[backend]
            path.write_text(text + "\n")
            assert sources.fingerprint(op, backend) != before[backend], path
            path.write_text(text)


def test_only_the_present_source_counts_as_measured(monkeypatch, tmp_path):
    row = {"do": "validate", "name": "add_act", "rival": "cuda", "ok": True}
    rows = [row | {"source": sources.fingerprint("add_act", "cuda")}, row | {"rival": "triton", "source": "old"}]
    rows += [row | {"name": "bn_act", "ok": False, "source": sources.fingerprint("bn_act", "cuda")}]
    rows += [row | {"name": "gone", "source": "old"}, *network_rows()]
    harness.save("acceptance", rows, CPU, tmp_path)
    found = report.measured_on(tmp_path)
    assert list(found) == [("add_act", "cuda")]
    monkeypatch.setattr(report, "measured_on", lambda: found)
    lines = report.support_matrix().splitlines()
    (line,) = (line for line in lines if line.startswith("| `add_act` "))
    assert "| unmeasured | validated on sm_90 |" in line and f"({found['add_act', 'cuda'][0]})" in lines[-1]
