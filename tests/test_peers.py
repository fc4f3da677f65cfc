"""The peers benchmark: processes that fail are rows, turns are taken by those that do not, and the table tells both."""

import contextlib
import json
import math
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks
from benchmarks import harness, report
from benchmarks.peers import __main__ as program
from benchmarks.peers import cell as cells
from benchmarks.peers import table, worker
from benchmarks.peers.process import Died, Process
from benchmarks.peers.ways import DTYPES, WAYS, Way
from fastres.experiments.subject import load

pytestmark = pytest.mark.none
SMALL = cells.Cell("cifar.resnet8", 2, "fp32", size=16)
FAKES = (
    Way("fastres.freeze", "_fake_peers:wrong"),
    Way("fastres.optimize", "_fake_peers:plain"),
    Way("slow", "_fake_peers:slow", pinned=False),
    Way("wrong", "_fake_peers:wrong"),
    Way("absent", "_fake_peers:plain", ("no_such_package",)),
    Way("refuses", "_fake_peers:refuses"),
    Way("crashes", "_fake_peers:crashes"),
    Way("dies", "_fake_peers:dies_in_its_turn"),
    Way("not tried", "_fake_peers:no_such_function", refuses={"fp32": "it never had it"}),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One small cell with all the fakes."""
    truth = str(tmp_path_factory.mktemp("peers") / "truth")
    cells.write_truth(SMALL, truth, threads=1)
    found = cells.run(SMALL, FAKES, truth, threads=1, seconds=lambda preparation: 0.0)
    cells.add_shares(SMALL, found, [{"name": "peak", "dtype": "float32", "gop_per_s": 100.0}])
    return {row["rival"]: row for row in found}


def test_every_way_has_a_row_and_those_that_run_are_timed_in_turns(rows):
    assert list(rows) == [way.name for way in FAKES]
    timed = {name for name, row in rows.items() if "median_s" in row}
    assert timed == {"fastres.optimize", "slow", "wrong"}
    base, slow = rows["fastres.optimize"], rows["slow"]
    assert base["ratio"] == 1.0 and base["ok"] and base["error"] <= base["allowed"]
    assert slow["median_s"] >= 0.03 and slow["ratio"] == slow["median_s"] / base["median_s"]
    assert slow["batches"] == base["batches"] == cells.ROUNDS[0] and base["calls"] > slow["calls"] == 1
    assert base["of_peak"] == pytest.approx(cells.work(SMALL)[0] / base["median_s"] / 100e9)
    assert all(row["wait_s"] > 0 for name, row in rows.items() if name in timed)


def test_a_wrong_result_of_ours_is_not_timed_and_a_peers_says_its_error(rows):
    for name in ("fastres.freeze", "wrong"):
        assert not rows[name]["ok"] and rows[name]["rms"] == pytest.approx(0.01, rel=1e-3)
    assert table.shown(rows["fastres.freeze"]) == "wrong"
    assert table.shown(rows["wrong"]).endswith("error 1.0e-02")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("absent", "UnsupportedError: absent needs no_such_package, not installed here (pip install fastres[bench])"),
        ("refuses", "RuntimeError: no such device"),
        ("crashes", "the process ended (exit code 3): lost in space"),
        ("dies", "the process ended (killed by signal 9): noise on stdout"),
        ("not tried", "it never had it"),
    ],
)
def test_a_way_that_fails_is_missing_with_the_reason(rows, name, why):
    assert rows[name]["missing"] == why and "median_s" not in rows[name]
    assert table.shown(rows[name]) == "missing"
    assert why in table.text(list(rows.values()))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_process_has_its_threads_and_all_cores_and_silence_ends_it(pinned):
    with contextlib.closing(Process("_fake_peers", {}, threads=3, pinned=pinned)) as process:
        given = process.answer(60.0)
        assert given["OMP_NUM_THREADS"] == "3" and given["OMP_PROC_BIND"] == str(pinned).lower()
        assert given["cores"] == sorted(benchmarks.CORES)
        with pytest.raises(Died, match=r"no answer in 0 s"):
            process.answer(0.2)
        with pytest.raises(ProcessLookupError):
            os.kill(process._child.pid, 0)


def test_int8_is_held_to_a_share_of_the_logits():
    truth = {"truth": torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(5, 10)}
    near, far = (worker.judge(truth["truth"] * (1 + part * worker.INT8_ALLOWED), truth, "int8") for part in (0.9, 1.1))
    assert near["ok"] and not far["ok"]
    assert near["error"] == near["rms"] == pytest.approx(0.9 * worker.INT8_ALLOWED)
    assert worker.judge(truth["truth"][:1], truth, "int8")["error"] == math.inf
    assert not worker.judge(truth["truth"] * math.nan, truth, "int8")["ok"]


def test_operations_are_those_torch_counts():
    cell = cells.Cell("resnet18", 2, "fp32", size=64)
    subject = load(cell.model, batch=cell.batch, size=cell.size, device="meta")
    with FlopCounterMode(display=False) as counter:
        subject.model(subject.x)
    assert cells.work(cell)[0] == counter.get_total_flops()


def test_time_is_shared_between_the_cells_left(monkeypatch):
    monkeypatch.setattr(cells.time, "monotonic", lambda: 100.0)
    assert cells.share(deadline=400.0, preparation=50.0, cells_left=3) == pytest.approx(200.0 / 3)
    assert cells.share(deadline=400.0, preparation=50.0, cells_left=1) == 300.0
    assert cells.share(deadline=90.0, preparation=50.0, cells_left=2) == 0.0


def row(rival, network, ratio, dtype="float32", **more):
    timed = {"median_s": 0.01 * ratio, "ratio": ratio, "base": "fastres.optimize", "wait_s": 2.0 * ratio, "others": 0.0}
    common = {"name": network, "pass": "inference", "shape": [1, 3, 224, 224], "dtype": dtype, "rival": rival}
    return {**common, "ok": True, "rms": 1e-7, **timed, **more}


@pytest.fixture
def results(tmp_path):
    found = [
        {"name": "peak", "dtype": "float32", "rival": "loop", "gop_per_s": 200.0},
        {"name": "peak", "dtype": "int8", "rival": "none", "missing": "no compiler"},
        {"name": "peak", "dtype": "", "rival": "copy", "gb_per_s": 20.0},
    ]
    for network, ratio in (("resnet18", 0.5), ("resnet50", 8.0)):
        found += [row("OpenVINO", network, ratio, of_peak=0.3, others=0.4), row("fastres.optimize", network, 1.0, of_peak=0.8)]
    found += [row("eager", "resnet18", 1.5, of_peak=0.5)]
    found += [row("OpenVINO", "resnet18", 1.0, "int8") | {"ratio": None, "base": None}]
    harness.save("peers", found, torch.device("cpu"), tmp_path)
    return tmp_path


def test_the_table_has_ratios_means_errors_and_what_is_missing(results):
    shown = report.TABLES["peers"].text(results)
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert lines[0] == ["fastres.optimize", "eager", "OpenVINO"]
    cells_of = {line[0]: line[1:] for line in lines[1:]}
    assert cells_of["resnet18 1x3x224x224 float32"] == ["10 ms (80% of peak)", "1.50×", "0.50×"]
    assert cells_of["geometric mean float32"] == ["1.00×", "1.50× (1 of 2)", "2.00×"]
    assert cells_of["ready after float32"] == ["2 s", "3 s", "8.5 s"]
    assert cells_of["largest error float32"] == ["1.0e-07"] * 3
    assert cells_of["resnet18 1x3x224x224 int8"][-1] == "10 ms"
    assert "Peaks: float32 200 GOP/s (loop), int8 missing (no compiler), 20 GB/s (copy)." in shown
    assert "up to 0.40 cores busy (OpenVINO, resnet18 batch 1 float32)" in shown


def test_the_chart_is_drawn_from_the_file(results):
    pytest.importorskip("matplotlib")
    (path,) = results.glob("*/peers.json")
    picture = path.with_suffix(".png")
    table.plot(json.loads(path.read_text()), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_keep_takes_the_other_cells_of_the_same_commit_only(results):
    again = [cells.Cell("resnet18", 1, "fp32")]
    kept = program.keep(again, results)
    assert {(row["name"], row["dtype"]) for row in kept} == {("resnet50", "float32"), ("resnet18", "int8")}
    (path,) = results.glob("*/peers.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit": "another"}))
    with pytest.raises(SystemExit, match="commit another"):
        program.keep(again, results)


def test_the_ways_and_dtypes_are_those_promised():
    options = program.parse([])
    assert options.dtypes == list(DTYPES) == ["fp32", "bf16", "int8"]
    assert len({way.name for way in WAYS}) == len(WAYS) and all(set(way.refuses) <= set(DTYPES) for way in WAYS)
