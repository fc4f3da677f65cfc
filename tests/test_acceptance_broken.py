"""What a kernel may do to the acceptance run: fail, break the context of its process, never end."""

import os
import subprocess
import sys

import pytest
import torch
from test_acceptance import CPU, FAKE, named, own_cache  # noqa: F401  own_cache: a fixture

from benchmarks import harness
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import run, tasks
from benchmarks.acceptance.worker import perform
from fastres import dispatch, tuner
from fastres.ops import REGISTRY

pytestmark = pytest.mark.none


def test_a_broken_context_is_noticed_behind_the_task_that_broke_it(monkeypatch):
    def broken(place):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    about = {"task": {"do": "validate", "name": "add_act", "rival": "torch", "dtype": "bf16"}, "seconds": 9.0}
    workers = tasks.Worker(CPU), tasks.Worker(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(tuner.Session, "on_samples", lambda *args: "it raises RuntimeError: the launch must be accepted")
    assert [perform(each, about)["lost"] for each in workers] == [False, True]


def test_a_kernel_that_never_ends_costs_its_own_time_alone():
    some = [{**task, "patience": 1.0} for task in named("hang", "a")]
    found = {row["name"]: row for row in run.perform_all(some, run.Budget(60.0), CPU, FAKE)}
    assert found["hang"]["missing"] == "no answer in 3 s" and "process" in found["a"]


def test_a_kernel_that_failed_is_not_run_again():
    rows = [
        {"do": "validate", "name": "a", "rival": "cuda_wide", "dtype": "fp16", "ok": True},
        {"do": "validate", "name": "a", "rival": "cuda_wide", "dtype": "bf16", "missing": "no answer in 60 s"},
        {"do": "validate", "name": "b", "rival": "cuda_wide", "ok": False, "failure": "wrong"},
        {"do": "validate", "name": "c", "rival": "cuda_wide", "missing": run.OUT_OF_TIME},
        {"do": "kernel", "name": "d", "rival": "cuda_wide", "missing": "no answer in 60 s"},
    ]
    assert acceptance.broken(rows) == [["a", "cuda_wide"], ["b", "cuda_wide"]]
    every = tasks.kernels(acceptance.broken(rows))
    assert all(task["broken"] == acceptance.broken(rows) for task in every if task["do"] == "kernel")
    task = {"do": "kernel", "name": "add_act-forward", "shape": [2, 16, 6, 6], "dtype": "fp32", "broken": [["add_act", "cpu"]]}
    own = tasks.Worker(CPU)
    own.peaks["fp32"] = 1e9, 1e15
    rows = {row["rival"]: row for row in own.perform(task)}
    assert "median_s" in rows["torch"] and rows["cpu"]["failure"] == "it failed its validation"


@pytest.mark.parametrize("beside", [False, True])
def test_a_process_of_the_lane_ends_behind_a_test_that_broke_its_context(tmp_path, beside):
    """Where others go on, which pytest-xdist starts."""
    (tmp_path / "test_some.py").write_text(
        "import torch\ndef test_a(): assert False\ndef test_b():\n  torch.cuda.is_initialized = lambda: True\n"
        "  def broken(): raise RuntimeError('CUDA error')\n  torch.cuda.synchronize = broken\n  assert False\n"
        "def test_c(): pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(harness.ROOT / "tests"), *sys.path])}
    environment |= {"PYTEST_XDIST_WORKER": "gw0"} if beside else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 1 and ("2 failed, 1 passed" in ran.stdout) == (not beside)


def test_a_kernel_of_many_tiles_is_validated_at_real_sizes(monkeypatch):
    monkeypatch.setattr(tasks, "convolution", lambda task, dtype, place: [task["convolution"]])
    monkeypatch.setattr(tuner, "judge", lambda op, run, args: "wrong" if args == [tasks.MEASURED[-1]] else None)
    found = {}
    for name in ("cuda_wide", "triton"):
        backend = dispatch.Backend(name, lambda *args: None, lambda: None)
        for dtype in ("fp32", "bf16"):
            worker = tasks.Worker(torch.device("cuda"))
            found[name, dtype] = worker.at_real_sizes(REGISTRY[tasks.STATISTICS], backend, dtype)
    assert found.pop(("cuda_wide", "bf16")) == "on 48 images, (256, 1024, 1, 1, 14): wrong" and not any(found.values())
