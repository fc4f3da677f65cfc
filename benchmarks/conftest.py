"""Collects bench_*.py, skips GPU rows with a reason, prints the ratios, and records results with --record."""

from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.table import ratio_or_reason, text_table

ROWS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<device>/*.json")


def pytest_configure(config):
    config.stash[ROWS] = {}
    if config.getoption("--record", False):
        try:
            harness.check_writable(harness.device())
        except OSError as error:
            raise pytest.UsageError(f"--record: {error}") from None
    for noise in ("ignore:dynamo_pgo force disabled", "ignore:.torch.jit.script_method. is deprecated"):
        config.addinivalue_line("filterwarnings", noise)


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # named by the user: pytest collects it by itself
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch sees no CUDA device"))


@pytest.fixture
def record(request, benchmark):
    """Keep rows under the name of the file (``models`` for bench_models.py), and show their ratios with the benchmark."""
    name = Path(request.node.path).stem.removeprefix("bench_")

    def keep(rows):
        request.config.stash[ROWS].setdefault(name, []).extend(rows)
        for row in rows:
            benchmark.extra_info[row["rival"]] = ratio_or_reason(row)

    return keep


def pytest_terminal_summary(terminalreporter, config):
    for name, rows in config.stash[ROWS].items():
        terminalreporter.section(f"{name}: time of each rival over that of fastres")
        terminalreporter.write_line(text_table(rows))
        if config.getoption("--record"):
            terminalreporter.write_line(f"wrote {harness.save(name, rows, harness.device()).relative_to(harness.ROOT)}")
