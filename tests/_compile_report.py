"""What the compile lane learns of every kernel on every architecture: shown, and kept as a result file where asked.

``FASTRES_COMPILE_REPORT=benchmarks/results/compile`` writes ``<backend>.json`` there, from which README's support matrix
names the architectures.
"""

import json
import os
from pathlib import Path

import torch

COMMITTED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "compile"
WORST = ("registers", "spilled", "shared")  # registers a thread; bytes of its stack; bytes of a block's static shared memory
COLUMNS = (*WORST, "wgmma", "widest")  # whether there are products of a warpgroup; bytes of the widest access to memory


def summarize(rows: list[dict]) -> list[dict]:
    """One row per kernel and architecture: how many variants, and the most that any of them takes or does."""
    found: dict[tuple[str, str], dict] = {}
    for row in sorted(rows, key=lambda row: (row["kernel"], int(row["arch"].rstrip("af")))):
        start = {"kernel": row["kernel"], "arch": row["arch"], "variants": 0, **dict.fromkeys(COLUMNS, 0)}
        one = found.setdefault((row["kernel"], row["arch"]), start)
        one["variants"] += 1
        one.update({name: max(one[name], row[name]) for name in COLUMNS})
    return [{**one, "wgmma": bool(one["wgmma"])} for one in found.values()]


def publish(backend: str, rows: list[dict], capsys) -> None:
    """Print the summary, write it where asked, and hold the committed one against it: same kernels, same architectures."""
    summary = summarize(rows)
    shown = ("variants", *COLUMNS)
    lines = [f"{backend + ' kernel':<34} {'arch':>7}" + "".join(f" {name:>9}" for name in shown)]
    for row in summary:
        values = (("yes" if row[name] else "no") if name == "wgmma" else row[name] for name in shown)
        lines.append(f"{row['kernel']:<34} {'sm_' + row['arch']:>7}" + "".join(f" {value:>9}" for value in values))
    with capsys.disabled():
        print("\n".join(["", *lines]))
    if folder := os.environ.get("FASTRES_COMPILE_REPORT"):
        from benchmarks import harness

        harness.write(Path(folder) / f"{backend}.json", summary, torch.device("cpu"))
    path = COMMITTED / f"{backend}.json"
    committed = json.loads(path.read_text(encoding="utf-8"))["rows"]
    advice = "write it again: FASTRES_COMPILE_REPORT=benchmarks/results/compile pytest tests -m compile"
    assert names(committed) == names(summary), f"{path.name} is of other kernels ({advice})"


def names(summary: list[dict]) -> list[tuple[str, str]]:
    return [(row["kernel"], row["arch"]) for row in summary]
