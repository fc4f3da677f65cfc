"""``python -m benchmarks.report``: writes README's tables from the result files, and plots beside those of networks.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``; NAME is that of result files (``models``,
``ops``, ...), one table a machine, ``reliability`` or ``support-matrix``. ``--check`` writes nothing, and exits
with 1 where README differs from what the files give.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import sources
from benchmarks.acceptance import table as acceptance
from benchmarks.harness import RESULTS, ROOT
from benchmarks.peers import table as peers
from benchmarks.table import Row, cases, condensed, duration, markdown, rivals
from fastres.experiments.rivals import FASTRES
from fastres.ops import REGISTRY

README = ROOT / "README.md"
TUNED = ROOT / "fastres" / "tuned"
COMPILED = RESULTS / "compile"  # what the compile lane reported, a file for each backend
MARKED = re.compile(r"(<!-- results:([a-z0-9-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
ON_GPUS = {"gpu-networks": acceptance.networks, "gpu-kernels": acceptance.kernels}  # of the acceptance runs on GPUs
COLUMNS = ("cpu", "onednn", "triton", "cuda", "cuda_wide", "cuda_cluster", "cudnn", "torch")
LEGEND = (
    "fastres: median time of a call. Other columns: their time divided by that of fastres in the same run, so above 1 fastres"
    " is faster. Ready after: preparation and first call."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where README is out of date")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        wanted = render(text)
    except LookupError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        for name in stale(text, wanted):
            print(f"README.md: the table {name} is not what the result files give (python -m benchmarks.report)")
        return 1 if text != wanted else 0
    README.write_text(wanted, encoding="utf-8")
    for name, draw in {"models": plot, "peers": peers.plot}.items():
        for path in sorted(RESULTS.glob(f"*/{name}.json")):
            draw(json.loads(path.read_text()), path.with_suffix(".png"))
    return 0


def render(text: str, results: Path = RESULTS) -> str:
    """README with every marked table as the result files give it.

    Raises:
        LookupError: a marker names results that no file holds.
    """
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2], results)}\n{found[3]}", text)


def stale(text: str, wanted: str) -> list[str]:
    """Names of the tables that differ."""
    pairs = zip(MARKED.finditer(text), MARKED.finditer(wanted), strict=True)
    return [old[2] for old, new in pairs if old[0] != new[0]]


def table(name: str, results: Path) -> str:
    if name == "support-matrix":
        return support_matrix()
    if name == "reliability":
        return reliability(results)
    file = "acceptance" if name in ON_GPUS else name
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(f"*/{file}.json"))]
    if name in ON_GPUS:
        found = [data for data in found if data.get("cuda")]
    if not found:
        raise LookupError(f"README.md shows results:{name}, but no file {results}/*/{file}.json holds them")
    if name in ON_GPUS:
        return "\n\n".join(section(data, ON_GPUS[name]) for data in found)
    show, legend = (peers.markdown, peers.LEGEND) if name == "peers" else (_markdown, LEGEND)
    return "\n\n".join([*(section(data, show) for data in found), legend])


def reliability(results: Path) -> str:
    """The scoreboard, as ``make reliability`` wrote it beside README."""
    path = results.parent.parent / "RELIABILITY.json"
    if not path.is_file():
        return "No class has been tried in full at this version (`make reliability`)."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"**{data['device']}**, torch {data['torch']}:", ""]
    lines += ["| class | what was tried | tried | failed | seconds | commit |", "| :-- | :-- | --: | --: | --: | :-- |"]
    rows = {row["code"]: row for row in data["rows"]}
    for code in sorted({*rows, *data.get("classes", {})}, key=lambda code: (code[0], int(code[1:]))):
        if code in rows:
            row = rows[code]
            title = "; not run: ".join([row["title"], *row.get("notes", ())])
            short = "" if row["tried"] >= row["wanted"] else f" of {row['wanted']:,}"
            commit = f"{row['commit'][:10]}{' with local changes' if row['dirty'] else ''}, {row['date']}"
            lines.append(f"| {code} | {title} | {row['tried']:,}{short} | {row['failed']} | {row['seconds']} | {commit} |")
        else:
            lines.append(f"| {code} | {data['classes'][code]} | not run | | | |")
    return "\n".join(lines)


def section(data: dict[str, Any], show: Callable[[list[Row]], str]) -> str:
    """One machine's table under a line that says where, with what and when."""
    versions = [f"torch {data['torch']}", *(f"{k} {data[k]}" for k in ("cuda", "driver") if data.get(k))]
    where = f"**{data['device']}**, {data['threads']} threads{' pinned' if data['pinned'] else ''}"
    commit = f"commit {data['commit'][:10]}{' with local changes' if data['dirty'] else ''}"
    return "\n".join([f"{where}, {', '.join(versions)}, {commit}, {data['date']}:", "", show(data["rows"])])


def _markdown(rows: list[Row]) -> str:
    return markdown(condensed(rows))


def support_matrix() -> str:
    """Op by backend: where a backend exists, and on what its kernels have been validated, measured or compiled."""
    compiled = {path.stem: architectures(path) for path in COMPILED.glob("*.json")}
    known = validated_on(), measured_on()
    lines = [["op", *COLUMNS], [":--", *[":-:"] * len(COLUMNS)]]
    for name, op in sorted(REGISTRY.items()):
        present = {backend.name for backend in op.backends}
        lines.append([f"`{name}`", *(_support(name, b, *known) if b in present else "–" for b in COLUMNS)])
    found = "; ".join(f"{backend} for {', '.join(archs)}" for backend, archs in sorted(compiled.items()))
    devices = ", ".join(sorted({device for known_devices in known[1].values() for device in known_devices}))
    notes = (
        "*Tested*: held against float64 by the test suite, as Triton's kernels are in its interpreter. CUDA and Triton kernels"
        f" are compiled ({found}). *Validated*: a GPU ({devices}) ran the present source within the error budget, and it was"
        " timed there. *Unmeasured*: no GPU has run the present source. On an architecture that has not validated a kernel, it"
        " is never chosen by default."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", notes])


def _support(op: str, backend: str, validated: dict, measured: dict) -> str:
    if backend in ("cpu", "onednn", "torch"):
        return "tested"
    devices = measured.get((op, backend), ())
    archs = sorted(arch for arch, backends in validated.items() if op in backends.get(backend, ())) if devices else []
    if devices:
        return f"validated on {', '.join(archs)}" if archs else f"measured on {', '.join(devices)}"
    return "unmeasured"


def measured_on(results: Path = RESULTS) -> dict[tuple[str, str], list[str]]:
    """The devices that ran an op's kernels on a backend, and kept the budget, from the source as it is now."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(results.glob("*/acceptance.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        verdicts: dict[tuple[str, str], bool] = {}
        for row in data["rows"]:  # one for each dtype
            if "source" in row and row["source"] == current(row["name"], row["rival"]):
                name = row["name"], row["rival"]
                verdicts[name] = verdicts.get(name, True) and bool(row.get("ok"))
        for name in (name for name, ok in verdicts.items() if ok):
            found.setdefault(name, []).append(data["device"])
    return found


def current(op: str, backend: str) -> str | None:
    """The hash of the source of an op's kernels on a backend; None where there are none now."""
    present = op in REGISTRY and any(known.name == backend for known in REGISTRY[op].backends)
    return sources.fingerprint(op, backend) if present else None


def validated_on() -> dict[str, dict[str, list[str]]]:
    """Architectures with the ops each backend was validated for, over all shipped files."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(TUNED.glob("*.json")):
        for arch, backends in json.loads(path.read_text(encoding="utf-8"))["validated"].items():
            for backend, ops in backends.items():
                found.setdefault(arch, {}).setdefault(backend, []).extend(ops)
    return found


def architectures(path: Path) -> list[str]:
    """Architectures in a report of the compile lane, the oldest first."""
    found = {row["arch"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    return [f"sm_{arch}" for arch in sorted(found, key=lambda arch: int(arch.rstrip("af")))]


def plot(data: dict[str, Any], path: Path) -> None:
    """Speed of every way to run each model, relative to the slowest of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 0.6 + 0.95 * len(cases(data["rows"]))), layout="constrained")
    bars(axes, data["rows"])
    axes.set_title(f"{data['device']}, torch {data['torch']}, {data['date']}", fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def bars(axes: Any, rows: list[Row]) -> None:
    """One group of bars a network, one bar a way to run it: how many times as fast as the slowest."""
    grouped, names = cases(rows), rivals(rows)
    colours = ["#c2410c", "#9aa5b1", "#647084", "#3b4a63", "#1f2937", "#7c6f64"]
    height = 0.8 / len(names)
    for column, name in enumerate(names):
        found = [(index, by[name]) for index, by in enumerate(grouped.values()) if "median_s" in by.get(name, {})]
        slowest = [max(r["median_s"] for r in list(grouped.values())[i].values() if "median_s" in r) for i, _ in found]
        lengths = [most / row["median_s"] for most, (_, row) in zip(slowest, found, strict=True)]
        places = [index + (column - (len(names) - 1) / 2) * height for index, _ in found]
        axes.barh(places, lengths, height * 0.92, label=name, color=colours[column % len(colours)])
        for place, length, (_, row) in zip(places, lengths, found, strict=True):
            weight = "bold" if name == FASTRES else "normal"
            axes.text(length + 0.01, place, duration(row["median_s"]), va="center", fontsize=7, fontweight=weight)
    axes.set_xlabel("times as fast as the slowest", fontsize=8)
    labelled(axes, [" ".join(filter(None, (c[0], c[1], "batch " + c[2].split("x")[0], c[3]))) for c in grouped])


def labelled(axes: Any, labels: list[str]) -> None:
    """A label for each group of bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
