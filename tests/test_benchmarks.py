"""The instruments: the clock, what is compared with what, the tables of README."""

import json
import re
import time

import pytest
import torch
from torch import nn

from benchmarks import harness, report, table
from benchmarks.cases import CASES
from fastres import models, timing
from fastres.dispatch import GPU_KERNELS
from fastres.errors import ArgumentError, UnsupportedError
from fastres.experiments import parity, rivals, twin
from fastres.experiments.compare import compare
from fastres.experiments.subject import Subject, enliven, load
from fastres.ops import REGISTRY

pytestmark = pytest.mark.none
CPU = torch.device("cpu")


def test_the_clock_measures_a_known_sleep():
    found = timing.interleaved({"a": lambda: time.sleep(0.05), "b": lambda: time.sleep(0.1)}, CPU, seconds=0.3)
    assert found["a"].p20 == pytest.approx(0.05, rel=0.05)
    assert found["b"].p20 == pytest.approx(0.1, rel=0.05)
    assert found["a"].batches == found["b"].batches >= 5


def test_the_clock_takes_many_short_calls_in_one_batch():
    found = timing.interleaved({"short": lambda: None}, CPU, seconds=0.05)["short"]
    assert found.calls == timing.MAX_CALLS and found.median < 1e-5


def test_percentiles():
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile([0.0, 10.0], 0.2) == 2.0


def small_vgg():
    layers = nn.Conv2d(3, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU(True), nn.MaxPool2d(2, 2)
    model = models.VGG(nn.Sequential(*layers), init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model


NETWORKS = {
    "resnet18": (models.resnet18, (1, 3, 64, 64)),
    "resnet50": (models.resnet50, (1, 3, 64, 64)),
    "VGG": (lambda: small_vgg(), (1, 3, 32, 32)),
    "plain18": (lambda: models.plain(18), (1, 3, 64, 64)),
    "cifar.resnet": (lambda: models.cifar.resnet(8), (2, 3, 16, 16)),
    "cifar.plain": (lambda: models.cifar.plain(8), (2, 3, 16, 16)),
    "cifar.preact": (lambda: models.cifar.preact_resnet(11), (2, 3, 16, 16)),
    "cifar.preact, option A": (lambda: models.cifar.preact_resnet(8, shortcut="A", bottleneck=False), (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_is_the_same_network_without_fastres(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    enliven(model)
    plain = twin.torch_twin(model.eval())
    assert list(plain.state_dict()) == list(model.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        verdict = parity.Reference(plain, x).judge({"logits": model(x)})
    assert verdict.ok, verdict
    calls = []
    with _Watch(calls), torch.no_grad():
        plain(x)
    assert calls and not any(name.startswith("fastres") for name in calls)


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.namespace)
        return func(*args, **(kwargs or {}))


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    enliven(model)
    return Subject("small", model.eval(), torch.randn(2, 3, 8, 8), torch.float32)


def way(name, prepare):
    return rivals.Rival(name, prepare, "contiguous", {})


def test_what_is_wrong_is_not_timed_and_what_is_missing_is_a_row():
    def missing(model, x):
        raise ImportError("no such compiler")

    ways = (
        way("fastres", lambda model, x: (model, x)),
        way("wrong", lambda model, x: ((lambda x: model(x) * 1.001), x)),
        way("missing", missing),
    )
    rows = {row["rival"]: row for row in compare(small(), ways, seconds=0.01)}
    assert rows["fastres"]["ok"] and rows["fastres"]["ratio"] == 1.0
    assert not rows["wrong"]["ok"] and "median_s" not in rows["wrong"]
    assert rows["missing"]["missing"] == "ImportError: no such compiler"
    assert [table.cell(rows[name]) for name in ("wrong", "missing")] == ["wrong", "missing"]


@pytest.mark.parametrize("part", ["gradient of 0.weight", "gradient of 1.bias", "1.running_var", "loss"])
def test_one_wrong_tensor_of_a_training_step_is_found(part):
    subject = small()
    model = subject.model.train()
    reference = parity.Reference(model, subject.x)
    found = parity.outputs(model, model, subject.x)
    assert reference.judge(dict(found)).ok
    found[part] = found[part] * 1.0001
    assert not reference.judge(found).ok


def test_a_missing_gradient_is_found():
    subject = small()
    model = subject.model.train()
    reference = parity.Reference(model, subject.x)
    found = parity.outputs(model, model, subject.x)
    del found["gradient of 0.weight"]
    assert not reference.judge(found).ok


def test_a_twin_of_a_foreign_block_is_refused():
    class Own(models.ResNet):
        pass

    with pytest.raises(UnsupportedError, match="Own"):
        twin.torch_twin(Own(twin.fnn.BasicBlock, (1, 1, 1, 1)))


def test_every_op_is_benchmarked():
    assert {name for case in CASES for name in case.covers} == set(REGISTRY)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id} {case.convolution}")
def test_a_case_computes_the_same_fused_and_eager(case):
    tensors = case.tensors((2, 16, 6, 6), torch.float32, CPU)
    fused, eager = case.fused(*tensors), case.eager(*tensors)
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
    moved, flops = case.cost(tensors)
    assert moved > 0 and flops > 0


def test_subjects_are_the_same_every_time():
    a, b = (load("cifar.resnet8", batch=2, size=16, device="cpu") for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.fixture
def results(tmp_path):
    case = {"name": "net", "pass": "inference", "shape": [1, 3, 8, 8], "dtype": "float32"}
    rows = [
        {**case, "rival": "fastres", "median_s": 0.01, "ratio": 1.0},
        {**case, "rival": "eager", "median_s": 0.015, "ratio": 1.5},
        {**case, "rival": "tool", "missing": "absent"},
    ]
    return harness.save("models", rows, CPU, tmp_path).parent.parent


def test_a_result_file_says_where_when_and_with_what(results):
    (path,) = results.glob("*/models.json")
    data = json.loads(path.read_text())
    needed = "device cpu threads torch cuda driver python commit dirty date rows"
    assert set(needed.split()) <= set(data)
    assert data["name"] == "models" and len(data["rows"]) == 3


def test_tables_are_written_from_the_files_and_checked(results):
    readme = "# x\n<!-- results:models -->\nmade up: 100x\n<!-- /results -->\nend\n"
    wanted = report.render(readme, ("models",), results)
    assert "1.50×" in wanted and "missing" in wanted and "made up" not in wanted and wanted.endswith("end\n")
    assert report.stale(readme, wanted) == ["models"]
    assert report.render(wanted, ("models",), results) == wanted
    assert report.stale(wanted, wanted) == []
    with pytest.raises(ArgumentError, match="a page must have the markers models, peers, got models"):
        report.render(readme, ("models", "peers"), results)
    with pytest.raises(ArgumentError, match=r"no file .*peers\.json holds"):
        report.render(readme.replace("models", "peers"), ("peers",), results)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_a_page_shows_only_what_the_result_files_give(page):
    text = page.read_text(encoding="utf-8")
    wanted = report.render(text, report.PAGES[page])
    assert not report.stale(text, wanted), "run python -m benchmarks.report"


def test_every_table_has_a_page():
    assert {name for names in report.PAGES.values() for name in names} == set(report.TABLES)


def places(page):
    """What a page written in Markdown links to, and the anchors of its headings, as GitHub names them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return links, {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_and_pictures_of_every_page_are_there():
    pages = [*harness.ROOT.glob("*.md"), *harness.RESULTS.glob("**/*.md")]
    assert set(report.PAGES) <= set(pages)
    wrong, tried = [], 0
    for page in pages:
        for link in places(page)[0]:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            fine = "://" in link or (target.exists() and (not anchor or anchor in places(target)[1]))
            wrong += [] if fine else [f"{page.relative_to(harness.ROOT)}: {link}"]
            tried += 1
    assert tried > 10 and not wrong, wrong


def test_means_are_over_networks_and_batches():
    row = {"pass": "inference", "dtype": "float32"}
    rows = [
        {**row, "name": name, "shape": [batch, 3, 8, 8], "rival": rival, **(found if rival != "fastres" else {"ratio": 1.0})}
        for name, batch, found in (("a", 1, {"ratio": 2.0}), ("a", 8, {"ratio": 0.5}), ("b", 1, {"missing": "so"}))
        for rival in ("fastres", "eager")
    ]
    shape = [1, 3, 8, 8]
    rows += [{"name": "peak", "rival": "copy"}, {**row, "name": "b", "shape": shape, "rival": "tool", "missing": "so"}]
    rows.append({**row, "name": "a", "shape": [2, 3, 4, 6], "rival": "eager", "ratio": 3.0})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.means(rows).splitlines()]
    assert lines[0] == ["", "eager", "tool"]
    assert lines[2:] == [
        ["inference float32: a, b; 8x8, batches of 1, 8", "1.00× (0.50× to 2.00×, 2 of 3)", "missing"],
        ["inference float32: a; 4x6, batches of 2", "3.00× (3.00× to 3.00×)", ""],
    ]


def test_a_rival_that_is_wrong_or_missing_has_a_reason_for_its_ratio():
    shown = [table.ratio_or_reason(row) for row in ({"ratio": 1.23456}, {"missing": "no compiler"}, {"ok": False})]
    assert shown == [1.235, "no compiler", "wrong"]


def test_the_support_matrix_lists_every_op():
    lines = report.support_matrix().splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `")} == set(REGISTRY)


def test_what_is_chosen_by_default_ran_on_a_gpu_from_its_present_source():
    measured = report.measured_on()
    archs = report.validated_on().values()
    validated = {(op, backend) for backends in archs for backend, ops in backends.items() for op in ops}
    assert validated <= set(measured)
    choices = [item for file in report.TUNED.glob("*.json") for item in harness.read(file)["choices"].items()]
    chosen = {(key.partition("|")[0], choice["backend"]) for key, choice in choices}
    assert {(op, backend) for op, backend in chosen if backend in GPU_KERNELS} <= validated


def test_the_support_matrix_names_what_was_compiled_and_validated(monkeypatch, tmp_path):
    for backend, archs in (("cuda", ("100", "80", "90a")), ("triton", ("90a",))):
        rows = [{"kernel": "some_kernel", "arch": arch} for arch in archs]
        harness.write(tmp_path / f"{backend}.json", rows, CPU)
    validated = {"sm_90": {"cuda": ["add_act"], "triton": ["add_act"]}}
    monkeypatch.setattr(report, "COMPILED", tmp_path)
    measured = {("add_act", backend): ["A GPU"] for backend in ("cuda", "triton")}
    monkeypatch.setattr(report, "validated_on", lambda: validated)
    monkeypatch.setattr(report, "measured_on", lambda: measured)
    lines = report.support_matrix().splitlines()
    (row,) = (line for line in lines if line.startswith("| `add_act` "))
    assert row.count("| validated on sm_90 |") == 1 and row.count("validated on sm_90") == 2
    (row,) = (line for line in lines if line.startswith("| `bn_act` "))
    assert "| unmeasured | unmeasured |" in row
    assert "cuda for sm_80, sm_90a, sm_100; triton for sm_90a" in lines[-1] and "(A GPU)" in lines[-1]


def test_the_scoreboard_shows_what_was_tried_and_what_was_not(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    assert report.reliability(results) == report.scoreboard_line(results) == report.NOT_TRIED
    commit = {"commit": "a" * 40, "dirty": False, "date": "2026-01-01"}
    row = {"code": "R4", "title": "integers", "wanted": 400, "tried": 448, "failed": 0, "seconds": 1.5, **commit}
    about = {"device": "A CPU", "torch": "2"}
    classes = {"F1": "networks", "R10": "sequences", "R4": "integers", "R5": "values"}
    other = {"code": "R5", "title": "values", "tried": 7, "wanted": 700, "failed": 2, "notes": ["this"], "dirty": True}
    rows = [row, {**row, **other}]
    (tmp_path / "RELIABILITY.json").write_text(json.dumps({**about, "classes": classes, "rows": rows}))
    lines = report.reliability(results).splitlines()
    assert "A CPU" in lines[0]
    said = "A CPU**, torch 2: 2 of 4 classes run, 455 cases tried (448 of them in R4: integers), 2 failed"
    assert report.scoreboard_line(results) == f"**{said}; R5 fell short of its target; parts of R5 were not run."
    assert lines[4:] == [
        "| F1 | networks | not run | | | |",
        "| R4 | integers | 448 | 0 | 1.5 | aaaaaaaaaa, 2026-01-01 |",
        "| R5 | values; not run: this | 7 of 700 | 2 | 1.5 | aaaaaaaaaa with local changes, 2026-01-01 |",
        "| R10 | sequences | not run | | | |",
    ]
