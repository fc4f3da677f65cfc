"""The picture of an acceptance run: kernels as a share of the peak that bounds them, networks against their rivals."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import bars, labelled
from benchmarks.table import Row, cases, duration

COLOURS = {
    "cuda": "#c2410c", "cuda_wide": "#7c2d12", "cuda_cluster": "#f59e0b",
    "triton": "#e08a5b", "cudnn": "#647084", "torch": "#9aa5b1",
}  # fmt: skip


def draw(path: Path) -> Path:
    """Draw a result file; the picture lies beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text(encoding="utf-8"))
    kernels = [row for row in data["rows"] if row["do"] == "kernel" and "of_roof" in row]
    networks = [row for row in data["rows"] if row["do"] == "network"]
    heights = [max(len(cases(rows)), 1) for rows in (kernels, networks)]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(9, 2 + 0.4 * heights[0] + 0.9 * heights[1]), layout="constrained",
        gridspec_kw={"height_ratios": [1 + 0.4 * heights[0], 1 + 0.9 * heights[1]]},
    )  # fmt: skip
    shares(axes[0], kernels)
    bars(axes[1], networks)
    axes[0].set_title(title(data), fontsize=9, loc="left")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def title(data: dict[str, Any]) -> str:
    versions = [f"{name} {data[name]}" for name in ("torch", "cuda", "driver") if data.get(name)]
    return f"{data['device']}, {', '.join(versions)}, commit {data['commit'][:10]}, {data['date']}"


def shares(axes: Any, rows: list[Row]) -> None:
    """One group of bars a kernel and shape, one bar a backend: its share of the measured peak."""
    grouped = cases(rows)
    names = list(dict.fromkeys(row["rival"] for row in rows))
    height = 0.8 / max(len(names), 1)
    for column, name in enumerate(names):
        found = [(index, by[name]) for index, by in enumerate(grouped.values()) if name in by]
        places = [index + (column - (len(names) - 1) / 2) * height for index, _ in found]
        axes.barh(places, [row["of_roof"] for _, row in found], height * 0.9, label=name, color=COLOURS.get(name))
        for place, (_, row) in zip(places, found, strict=True):
            axes.text(row["of_roof"] + 0.01, place, duration(row["median_s"]), va="center", fontsize=5)
    axes.axvline(1.0, color="#1f2937", linewidth=0.8)
    axes.set_xlabel("share of the measured copy or matmul peak, whichever bounds it", fontsize=8)
    labelled(axes, [" ".join(filter(None, case)) for case in grouped])
    if rows:
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    else:
        axes.text(0.5, 0.5, "no kernel was timed", ha="center", va="center", transform=axes.transAxes, fontsize=8)
