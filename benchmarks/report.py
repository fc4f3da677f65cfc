"""``python -m benchmarks.report``: writes the tables of README and of benchmarks/results/README.md from the result files.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``; ``PAGES`` says which page shows which, ``TABLES``
what each is made of. Plots beside the results of networks are drawn too. ``--check`` writes nothing, and exits with 1 where a
page differs from what the files give.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import command, sources
from benchmarks.acceptance import table as acceptance
from benchmarks.harness import RESULTS, ROOT, read
from benchmarks.peers import table as peers
from benchmarks.table import Row, cases, condensed, duration, markdown, means, rivals
from fastres import terminal
from fastres.errors import ArgumentError
from fastres.experiments import degradation_report
from fastres.experiments.rivals import FASTRES
from fastres.ops import REGISTRY

README, EVIDENCE = ROOT / "README.md", RESULTS / "README.md"
PAGES = {  # the tables of each, in their order
    README: ("gpu-networks", "cpu-inference", "cpu-training", "scoreboard", "support-matrix"),
    EVIDENCE: (
        "gpu-networks", "gpu-kernels", "peers", "models", "backbones", "training-steps", "training-kernels", "training-memory",
        "overhead", "degradation", "reliability",
    ),
}  # fmt: skip
TUNED = ROOT / "fastres" / "tuned"
COMPILED = RESULTS / "compile"  # what the compile lane reported, a file for each backend
MARKED = re.compile(r"(<!-- results:([a-z0-9-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
COLUMNS = ("cpu", "onednn", "triton", "cuda", "cuda_wide", "cuda_cluster", "cudnn", "torch")


def main(arguments: list[str] | None = None) -> int:
    text = "Write the tables of README.md and benchmarks/results/README.md, and the plots, from the result files."
    parser = command.Parser("report", text)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a page is out of date")
    check = parser.parse_args(arguments).check
    if not check:
        terminal.need("drawing the plots", "matplotlib")  # before anything is written
    current = True
    for page, names in PAGES.items():
        text = page.read_text(encoding="utf-8")
        wanted = render(text, names)
        if not check:
            page.write_text(wanted, encoding="utf-8")
        for name in stale(text, wanted) if check else ():
            current = False
            where = page.relative_to(ROOT)
            print(f"{where}: the table {name} is not what the result files give (python -m benchmarks.report)")
    for name, draw in {} if check else {"models": plot, "peers": peers.plot}.items():
        for path in sorted(RESULTS.glob(f"*/{name}.json")):
            draw(read(path), path.with_suffix(".png"))
    return 0 if current else 1


def render(text: str, names: tuple[str, ...], results: Path = RESULTS) -> str:
    """A page with every marked table as the result files give it.

    Raises:
        ArgumentError: its markers are not those names, or no file holds the results of one.
    """
    marked = tuple(found[2] for found in MARKED.finditer(text))
    if marked != names:
        raise ArgumentError(f"a page must have the markers {', '.join(names)}, got {', '.join(marked) or 'none'}")
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]].text(results)}\n{found[3]}", text)


def stale(text: str, wanted: str) -> list[str]:
    """Names of the tables that differ."""
    pairs = zip(MARKED.finditer(text), MARKED.finditer(wanted), strict=True)
    return [old[2] for old, new in pairs if old[0] != new[0]]


class Measured(NamedTuple):
    """A table of each machine's result file of one name: its rows as ``show`` writes them; a legend below all."""

    file: str
    show: Callable[[list[Row]], str]
    legend: str = ""
    on_gpu: bool = False

    def text(self, results: Path) -> str:
        found = [read(path) for path in sorted(results.glob(f"*/{self.file}.json"))]
        found = [data for data in found if data.get("cuda") or not self.on_gpu]
        if not found:
            raise ArgumentError(f"no file {results}/*/{self.file}.json holds the rows of a table")
        return "\n\n".join([*(section(data, self.show) for data in found), *filter(None, [self.legend])])


class Made(NamedTuple):
    """A table that is made in another way."""

    text: Callable[[Path], str]


def degradation(results: Path) -> str:
    path = results / "degradation" / "degradation.json"
    if not path.is_file():
        raise ArgumentError(f"no file {path} holds the rows of a table")
    return degradation_report.markdown(read(path))


def scoreboard(results: Path) -> dict[str, Any] | None:
    """What ``make reliability`` wrote beside README."""
    path = results.parent.parent / "RELIABILITY.json"
    return read(path) if path.is_file() else None


NOT_TRIED = "No class has been tried in full at this version (`make reliability`)."


def scoreboard_line(results: Path) -> str:
    """The scoreboard in one sentence."""
    data = scoreboard(results)
    if data is None:
        return NOT_TRIED
    rows, most = data["rows"], max(data["rows"], key=lambda row: row["tried"])
    classes = {*data.get("classes", {}), *(row["code"] for row in rows)}
    tried, failed = (sum(row[key] for row in rows) for key in ("tried", "failed"))
    short = [row["code"] for row in rows if row["tried"] < row["wanted"]]
    line = (
        f"**{data['device']}**, torch {data['torch']}: {len(rows)} of {len(classes)} classes run, {tried:,} cases tried"
        f" ({most['tried']:,} of them in {most['code']}: {most['title']}), {failed} failed"
    )
    line += f"; {', '.join(short)} fell short of {'its target' if len(short) == 1 else 'their targets'}" if short else ""
    partly = [row["code"] for row in rows if row.get("notes")]
    return f"{line}; parts of {', '.join(partly)} were not run." if partly else f"{line}."


def reliability(results: Path) -> str:
    """The scoreboard, class by class."""
    data = scoreboard(results)
    if data is None:
        return NOT_TRIED
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
        "*Tested*: compared with float64 by the test suite, which also runs Triton's kernels in its interpreter. CUDA and"
        f" Triton kernels are compiled ({found}). *Validated*: a GPU ({devices}) ran the current source within the error"
        " budget, and the kernel was timed there. *Unmeasured*: no GPU has run the current source."
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
        data = read(path)
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
        for arch, backends in read(path)["validated"].items():
            for backend, ops in backends.items():
                found.setdefault(arch, {}).setdefault(backend, []).extend(ops)
    return found


def architectures(path: Path) -> list[str]:
    """Architectures in a report of the compile lane, the oldest first."""
    found = {row["arch"] for row in read(path)["rows"]}
    return [f"sm_{arch}" for arch in sorted(found, key=lambda arch: int(arch.rstrip("af")))]


CONDENSED = ("models", "backbones", "training-steps", "training-kernels", "training-memory", "overhead")
TABLES: dict[str, Measured | Made] = {
    "gpu-networks": Measured("acceptance", acceptance.networks, on_gpu=True),
    "gpu-kernels": Measured("acceptance", acceptance.kernels, on_gpu=True),
    "cpu-inference": Measured("peers", means),
    "cpu-training": Measured("training-steps", means),
    "peers": Measured("peers", peers.markdown, peers.LEGEND),
    **{name: Measured(name, _markdown) for name in CONDENSED},
    "degradation": Made(degradation),
    "reliability": Made(reliability),
    "scoreboard": Made(scoreboard_line),
    "support-matrix": Made(lambda results: support_matrix()),
}


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
    sys.exit(command.run(main))
