"""One cell of ``python -m benchmarks.peers``, which runs and records them all: ResNet-18 against every peer there is."""

import torch

from benchmarks import harness
from benchmarks.peers import cell as cells
from benchmarks.peers import table
from benchmarks.peers.ways import OWN, WAYS
from fastres.experiments.subject import load

CELL = cells.Cell("resnet18", 1, "fp32")


def test_resnet18(benchmark, capsys, tmp_path):
    truth, threads = str(tmp_path / "truth"), torch.get_num_threads()
    cells.write_truth(CELL, truth, threads)
    rows = cells.run(CELL, WAYS, truth, threads=threads, seconds=lambda preparation: 15.0)
    for row in rows:
        benchmark.extra_info[row["rival"]] = row.get("missing") or round(row.get("ratio", 0.0), 3)
    with capsys.disabled():
        print(f"\n{table.text(rows)}")
    harness.show(benchmark, load(CELL.model, batch=CELL.batch, device="cpu"))
    wrong = [row for row in rows if row["rival"] in OWN and not row.get("ok", True)]
    assert not wrong
