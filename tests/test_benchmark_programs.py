"""``python -m benchmarks.*``: a wrong request, a missing package or a folder that cannot be written is one line, at once."""

import sys

import pytest
import torch

from benchmarks import command, harness, report, training
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import smoke
from benchmarks.peers import __main__ as peers
from benchmarks.peers.process import Died
from fastres import terminal

pytestmark = pytest.mark.none
CPU = torch.device("cpu")
PROGRAMS = {
    "report": report.main, "training": training.main, "peers": peers.main, "acceptance": acceptance.main,
    "acceptance.smoke": smoke.main,
}  # fmt: skip


@pytest.fixture
def told(monkeypatch, capsys):
    """The exit code and the one line of a program, which must be refused before it measures."""
    for module, name in ((training, "steps"), (training, "memory"), (peers, "Process"), (acceptance, "cpu_parts")):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("it began to measure"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(program, *words):
        monkeypatch.setattr(sys, "argv", [program, *words])
        try:
            code = command.run(PROGRAMS[program])
        except SystemExit as leaving:
            code = leaving.code
        return code, capsys.readouterr()

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_called_by_its_name(told, program):
    code, said = told(program, "--help")
    assert code == 0 and said.out.startswith(f"usage: python -m benchmarks.{program} ") and not said.err


WRONG = [
    *((program, "--wrong") for program in PROGRAMS),
    ("training",), ("training", "everything"), ("training", "steps", "--batch", "0"), ("training", "steps", "--dtype", "int8"),
    ("training", "memory", "--no-record", "--model", "resnet51"), ("training", "steps", "--no-record", "--model", "resnet51"),
    ("peers", "--no-record", "--models", "resnet51"), ("peers", "--batches", "5000"), ("peers", "--minutes", "nan"),
    ("peers", "--ways", "none"), ("acceptance", "--minutes", "0"), ("acceptance", "--part", "all"),
]  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_request_is_one_line_and_code_2(told, words):
    code, said = told(*words)
    assert code == 2 and said.out == "" and said.err.count("\n") == 1, said


@pytest.mark.parametrize("words", [("training", "steps"), ("peers",), ("acceptance",)], ids=" ".join)
def test_results_that_cannot_be_written_are_told_before_the_work(told, monkeypatch, words):
    monkeypatch.setattr(harness, "machine_name", lambda place: "/dev/null/results")
    code, said = told(*words)
    assert code == 2 and said.err.count("\n") == 1 and "/dev/null/results" in said.err


@pytest.mark.parametrize("words", [("report",), ("acceptance",)], ids=" ".join)
def test_a_package_that_is_missing_is_named_before_the_work(told, monkeypatch, words):
    monkeypatch.setattr(terminal, "installed", lambda module: False)
    monkeypatch.setattr(harness, "check_writable", lambda place: None)
    code, said = told(*words)
    assert code == 2 and said.err.count("\n") == 1 and "needs matplotlib" in said.err


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_result_file_that_is_none_is_named(told, monkeypatch, tmp_path, content):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "models.json").write_text(content)
    monkeypatch.setattr(report, "PAGES", {tmp_path / "page.md": ("models",)})
    monkeypatch.setattr(report, "render", lambda text, names: report.TABLES["models"].text(tmp_path))
    (tmp_path / "page.md").write_text("")
    code, said = told("report", "--check")
    assert code == 2 and said.err.count("\n") == 1 and "models.json must be a result file" in said.err


def test_results_that_are_wrong_or_did_not_come_are_code_1(capsys):
    for error in (harness.ParityError("error 2, allowed 1\nmore"), Died("the process ended (killed by signal 9)")):

        def fails(error=error):
            raise error

        assert command.run(fails) == 1
        assert capsys.readouterr().err == f"benchmarks: {str(error).partition(chr(10))[0]}\n"


def test_a_process_that_dies_says_its_last_words(monkeypatch):
    monkeypatch.setattr(training, "PROCESSES", 1)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(Died, match="fastres: exit code 1: no words"):
        training.memory("cifar.resnet8", 1, "fp32", {"memory": "fresh"})
