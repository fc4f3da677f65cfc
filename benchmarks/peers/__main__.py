"""``python -m benchmarks.peers``: inference of whole networks on the CPU against every other way to run them.

Writes ``peers.json`` after every cell; ``--keep`` goes on with the file of an earlier run of the same commit.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, harness
from benchmarks.peers import cell as cells
from benchmarks.peers import table
from benchmarks.peers.cell import Cell, Row
from benchmarks.peers.process import Process
from benchmarks.peers.ways import DTYPES, WAYS
from fastres.experiments.subject import load

CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    threads = torch.get_num_threads()
    deadline = time.monotonic() + 60.0 * options.minutes
    ways = [way for way in WAYS if not options.ways or way.name in options.ways]
    todo = [Cell(*case) for case in itertools.product(options.models, options.batches, options.dtypes)]
    if not options.no_record:
        harness.check_writable(CPU)
    for model in options.models:
        load(model, device="cpu")  # or fail now, not after minutes of work
    kept = keep(todo) if options.keep else []
    say("peaks of this machine")
    peaks = Process("benchmarks.peers.peaks", {}, threads=threads, pinned=True).answer()["rows"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for done, cell in enumerate(todo):
            truth = Path(folder, f"{cell.model}-{cell.batch}")
            if not truth.exists():
                say(f"{cell.model} batch {cell.batch}: float64 truth")
                cells.write_truth(cell, str(truth), threads)

            def seconds(preparation: float, left: int = len(todo) - done) -> float:
                return cells.share(deadline, preparation, left)

            def step(text: str, cell: Cell = cell) -> None:
                say(f"{cell.label}: {text}")

            found = cells.run(cell, ways, str(truth), threads=threads, seconds=seconds, step=step)
            cells.add_shares(cell, found, peaks)
            print(table.text(found), flush=True)
            rows += found
            if not options.no_record:
                path = harness.save("peers", [*peaks, *kept, *rows], CPU)
    print(table.text([*peaks, *rows]))
    if not options.no_record:
        print(f"wrote {path}")
    return 0


def parse(arguments: list[str] | None) -> Any:
    parser = command.Parser("peers", "Inference of whole networks on the CPU against every other way to run them.")
    names = [way.name for way in WAYS]
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "resnet152"])
    parser.add_argument("--batches", nargs="+", type=command.images, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ways", nargs="+", choices=names, metavar="WAY", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--minutes", type=command.minutes, default=90.0, help="for all, about; decides the number of turns")
    parser.add_argument("--keep", action="store_true", help="keep the other cells that the result file holds")
    parser.add_argument("--no-record", action="store_true", help="write no result file")
    return parser.parse_args(arguments)


def keep(todo: list[Cell], folder: Path = harness.RESULTS) -> list[Row]:
    """Rows of the result file for cells that are not measured now.

    Raises:
        SystemExit: the file is of another commit, torch or number of threads: one head cannot speak for both.
    """
    path = folder / harness.machine_name(CPU) / "peers.json"
    if not path.exists():
        return []
    data, now = harness.read(path), harness.about(CPU)
    for key in ("commit", "torch", "threads"):
        if data[key] != now[key]:
            raise SystemExit(f"--keep: {path} was measured with {key} {data[key]}, this run has {now[key]}")
    again = [cell.common for cell in todo]
    return [row for row in data["rows"] if row["name"] != "peak" and not any(common.items() <= row.items() for common in again)]


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command.run(main))
