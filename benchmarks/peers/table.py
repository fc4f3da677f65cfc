"""What ``peers.json`` holds as a table, in the terminal and in README, and as a chart."""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.ways import WAYS
from benchmarks.table import Row, aligned, cases, duration, piped

LEGEND = (
    "First timed column: median time of a call and its share of the measured peak of multiply-adds, counting the operations of"
    " direct convolution (Winograd's are fewer, and can exceed it). Other columns: their time divided by that one's in the same"
    " run, so above 1 fastres is faster. Every way runs in its own process, with the same number of threads, and converts the"
    " same float32 images. Error: relative root mean square of the logits' error against float64. Ready after: from the PyTorch"
    " model to the first result, the median over the networks."
)
QUIET = 0.1  # cores that others may use before the table says so
COLOURS = ("#c2410c", "#f59e6b", "#c9d0d8", "#9aa5b1", "#7c8a9c", "#5b6b80", "#3b4a63", "#1f2937")


def text(rows: list[Row]) -> str:
    return "\n".join([aligned(*grid(rows)), *notes(rows)])


def markdown(rows: list[Row]) -> str:
    return "\n".join([piped(*grid(rows)), "", *(f"- {note}" for note in notes(rows))])


def ways_of(rows: list[Row]) -> list[str]:
    """Names of the ways that have a row, in their order."""
    known = [way.name for way in WAYS]
    found = dict.fromkeys(row["rival"] for row in measured(rows))
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["name"] != "peak"]


def grid(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """A line a cell; then for each dtype the geometric means of the ratios, the largest errors, and the seconds until
    ready.
    """
    names, rows = ways_of(rows), measured(rows)
    lines = [
        [f"{name} {shape} {dtype}", *(shown(by_rival.get(way)) for way in names)]
        for (name, _, shape, dtype, *_), by_rival in cases(rows).items()
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        lines.append([f"geometric mean {dtype}", *(mean(of_dtype, way) for way in names)])
        lines.append([f"largest error {dtype}", *(error(of_dtype, way) for way in names)])
        lines.append([f"ready after {dtype}", *(ready(of_dtype, way) for way in names)])
    return ["", *names], lines


def shown(row: Row | None) -> str:
    if row is None:
        return ""
    if "median_s" not in row:
        return "missing" if "missing" in row else "wrong"
    if row["ratio"] is None or row["base"] == row["rival"]:
        share = f" ({row['of_peak']:.0%} of peak)" if "of_peak" in row else ""
        value = duration(row["median_s"]) + share
    else:
        value = f"{row['ratio']:.2f}×"
    return value if row["ok"] else f"{value}, error {row['rms']:.1e}"


def mean(rows: list[Row], way: str) -> str:
    """Geometric mean of a way's ratios, with their number where it is not that of the cells."""
    ratios = [row["ratio"] for row in rows if row["rival"] == way and row.get("ratio")]
    if not ratios:
        return ""
    value = f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}×"
    count = len({(*row["shape"], row["name"]) for row in rows if row.get("ratio")})
    return value if len(ratios) == count else f"{value} ({len(ratios)} of {count})"


def error(rows: list[Row], way: str) -> str:
    errors = [row["rms"] for row in rows if row["rival"] == way and "rms" in row]
    return f"{max(errors):.1e}" if errors else ""


def ready(rows: list[Row], way: str) -> str:
    waits = [row["wait_s"] for row in rows if row["rival"] == way and "median_s" in row]
    return duration(statistics.median(waits)) if waits else ""


def notes(rows: list[Row]) -> list[str]:
    """The peaks, and why ways are missing or wrong."""
    peaks = [peak(row) for row in rows if row["name"] == "peak"]
    reasons = [f"Peaks: {', '.join(peaks)}."] if peaks else []
    absent: dict[tuple[str, str], list[str]] = {}
    for row in measured(rows):
        if "missing" in row:
            absent.setdefault((row["dtype"], row["missing"]), []).append(row["rival"])
        elif "median_s" not in row:
            size = f"error {row['error']:.1e}, allowed {row['allowed']:.1e}"
            reasons.append(f"{row['rival']}, {row['name']} {row['dtype']}, is wrong and was not timed: {size}.")
    reasons += [f"Missing at {dtype}: {', '.join(dict.fromkeys(ways))}: {why}." for (dtype, why), ways in absent.items()]
    disturbed = max(measured(rows), key=lambda row: row.get("others") or 0.0, default={})
    if (disturbed.get("others") or 0.0) > QUIET:
        what = f"{disturbed['rival']}, {disturbed['name']} batch {disturbed['shape'][0]} {disturbed['dtype']}"
        reasons.append(f"Not alone: other processes kept up to {disturbed['others']:.2f} cores busy ({what}).")
    return reasons


def peak(row: Row) -> str:
    if "missing" in row:
        return f"{row['dtype']} missing ({row['missing']})"
    if "gop_per_s" in row:
        return f"{row['dtype']} {row['gop_per_s']:.0f} GOP/s ({row['rival']})"
    return f"{row['gb_per_s']:.0f} GB/s ({row['rival']})"


def plot(data: dict[str, Any], path: Path) -> None:
    """A panel for each network and dtype: the share of the measured peak that each way reaches, by batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in measured(data["rows"]) if "of_peak" in row]
    names, networks = ways_of(rows), list(dict.fromkeys(row["name"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = 3.6 * len(networks), 0.9 + 2.3 * len(dtypes)
    figure, panels = pyplot.subplots(
        len(dtypes), len(networks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, network in zip(line, networks, strict=True):
            _panel(axes, [row for row in rows if row["name"] == network and row["dtype"] == dtype], names)
            axes.set_title(f"{network} {dtype}", fontsize=9, loc="left")
        line[0].set_ylabel("share of peak", fontsize=8)
    handles = {label: bar for axes in panels.flat for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name in names if name in handles]
    figure.legend([handles[n] for n in order], order, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{data['device']}, {data['threads']} threads, torch {data['torch']}, {data['date']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: Any, rows: list[Row], names: list[str]) -> None:
    batches = sorted({row["shape"][0] for row in rows})
    width = 0.86 / len(names)
    for column, name in enumerate(names):
        found = [row for row in rows if row["rival"] == name]
        places = [batches.index(row["shape"][0]) + (column - (len(names) - 1) / 2) * width for row in found]
        if found:
            colour = COLOURS[column % len(COLOURS)]
            axes.bar(places, [row["of_peak"] for row in found], width * 0.9, label=name, color=colour)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
