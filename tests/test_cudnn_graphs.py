"""What the acceptance run asks of cuDNN's graphs, by a stand-in for its frontend: numbers, refusals, rows, tasks."""

import importlib.util
import json
import sys

import _fake_cudnn
import pytest
import torch

from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import cudnn_graphs, run, tasks

pytestmark = pytest.mark.none
CPU = torch.device("cpu")


@pytest.fixture
def frontend(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", _fake_cudnn)
    monkeypatch.setattr(_fake_cudnn, "refusal", None)
    monkeypatch.setattr(_fake_cudnn, "wrong", (0, 1.0))
    monkeypatch.setattr(cudnn_graphs, "SECONDS", 0.01)
    return _fake_cudnn


def task(name, dtype="bf16", convolution=(16, 24, 3, 2, 9)):
    shape = [3, convolution[0], convolution[4], convolution[4]]
    return {"do": "cudnn", "name": name, "rival": "cudnn graph", "dtype": dtype, "shape": shape, "convolution": [*convolution]}


@pytest.mark.parametrize("convolution", [(16, 24, 3, 2, 9), (8, 16, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", cudnn_graphs.PATTERNS)
def test_a_graph_is_judged_then_timed_beside_fastres(frontend, name, dtype, convolution):
    rows = tasks.Worker(CPU).perform(task(name, dtype, convolution))
    rivals = {row["rival"]: row for row in rows}
    assert set(rivals) == {"fastres", "cudnn graph"} | ({"fastres, made again"} if name.endswith("wgrad") else set())
    assert rivals["cudnn graph"]["ok"] and all(row["ratio"] > 0 and row["do"] == "cudnn" for row in rows)
    c, k, kernel, stride, _ = convolution
    assert {row["name"] for row in rows} == {f"{name} {kernel}x{kernel}/{stride} {c}→{k}"}
    assert all((row["dtype"], row["frontend"], row["cudnn"]) == (dtype, "0", "9") for row in rows)


@pytest.mark.parametrize(("name", "output"), [
    *((name, 0) for name in cudnn_graphs.PATTERNS), ("conv-genstats", 1), ("conv-genstats", 2), ("conv-sums", 2),
    ("dgrad-drelu-sums", 1), ("dgrad-drelu-sums", 2),
])  # fmt: skip
def test_a_graph_with_wrong_numbers_is_not_timed(frontend, monkeypatch, name, output):
    monkeypatch.setattr(frontend, "wrong", (output, 1.05))
    (row,) = tasks.Worker(CPU).perform(task(name, "fp16"))
    assert not row["ok"] and row["failure"].startswith(f"output {output} has error") and "median_s" not in row


@pytest.mark.parametrize("stage", cudnn_graphs.STAGES)
def test_a_refusal_is_a_row_with_stage_and_reasons(frontend, monkeypatch, stage):
    text = "No valid engine configs\nWarning: X; Reason: bf16 is not taken\nWarning: X; Reason: bf16 is not taken\n"
    monkeypatch.setattr(frontend, "refusal", (stage, text))
    (row,) = tasks.Worker(CPU).perform(task("conv-genstats"))
    assert row["missing"] == f"{stage}: No valid engine configs; bf16 is not taken" and row["rival"] == "cudnn graph"
    monkeypatch.setattr(frontend, "refusal", (stage, "\n"))
    (row,) = tasks.Worker(CPU).perform(task("conv-genstats"))
    assert row["missing"] == f"{stage}: cudnnGraphNotSupportedError"


def test_tasks_come_for_every_graph_and_dtype(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = list(tasks.graphs_of_cudnn())
    assert len({tasks.label(each) for each in found}) == len(found) == 2 * len(cudnn_graphs.PATTERNS) * len(cudnn_graphs.SIZES)
    assert json.loads(json.dumps(found)) == found
    assert {(each["name"], each["dtype"]) for each in found[: 2 * len(cudnn_graphs.PATTERNS)]} == {
        (name, dtype) for name in cudnn_graphs.PATTERNS for dtype in ("fp16", "bf16")
    }


def test_without_the_frontend_one_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    (only,) = tasks.graphs_of_cudnn()
    with pytest.raises(ImportError):
        tasks.Worker(CPU).perform(only)
    (row,) = tasks.missing(only, "No module named 'cudnn'")
    assert row["rival"] == "cudnn graph" and row["shape"] == only["shape"]


def test_the_part_comes_last_and_takes_what_is_left(monkeypatch):
    asked = []

    def perform_all(found, budget, place):
        asked.append(([each["do"] for each in found], budget.left()))
        return [{"do": "cudnn", "name": "a", "rival": "cudnn graph", "missing": "no"}]

    monkeypatch.setattr(acceptance, "perform_all", perform_all)
    kept = []
    rows, promises = acceptance.gpu_parts(CPU, ["cudnn"], run.Budget(1000.0), kept.append, None)
    ((dos, left),) = asked
    assert set(dos) == {"cudnn"} and left <= acceptance.CUDNN_S and kept == [rows] and not promises
    assert list(acceptance.PARTS)[-1] == "cudnn" and acceptance.PART_OF["cudnn"] == "cudnn"
