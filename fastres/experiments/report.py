"""Tables, plots and files of comparisons."""

import json
from pathlib import Path
from typing import Any

from fastres import terminal
from fastres.experiments.compare import Row, outcome
from fastres.experiments.rivals import FASTRES

COLUMNS = ("", "median", "p20 – p80", "images/s", "fastres is", "ready after", "error", "allowed")
TORCH_COLOUR, FASTRES_COLOUR = "#8a94a6", "#c2410c"


def need_tables() -> None:
    """Fail now, not after minutes of work, if tables cannot be drawn."""
    terminal.need("the table", "rich")


def need_plots() -> None:
    terminal.need("the plot", "matplotlib")


def table(title: str, rows: list[Row], caption: str) -> None:
    """Print a comparison."""
    terminal.table(title, COLUMNS, [cells(row) for row in rows], caption)
    for row in rows:
        if "missing" in row:
            print(f"{row['rival']} is missing: {row['missing']}")


def cells(row: Row) -> list[str]:
    state = outcome(row)
    if state == "missing":
        return [row["rival"], "missing", *["–"] * 6]
    error = [f"{row['error']:.2g}", f"{row['allowed']:.2g}"]
    if state == "wrong":
        return [row["rival"], "wrong: not timed", "–", "–", "–", "–", *error]
    spread = f"{row['p20_s'] * 1e3:.4g} – {row['p80_s'] * 1e3:.4g}"
    ratio = "–" if row["rival"] == FASTRES or row["ratio"] is None else times(row["ratio"])
    median = terminal.milliseconds(row["median_s"])
    return [
        row["rival"],
        median,
        spread,
        f"{row['images_per_s']:.1f}",
        ratio,
        f"{row['wait_s']:.1f} s",
        *error,
    ]


def times(ratio: float) -> str:
    """A rival's time over that of fastres, in words that say who is ahead."""
    return f"{ratio:.2f}x as fast"


def save(directory: Path, stem: str, data: dict[str, Any]) -> list[str]:
    """Write a comparison as JSON and as a plot; returns both paths."""
    text, picture = directory / f"{stem}.json", directory / f"{stem}.png"
    text.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    machine = data["gpus"][0] if data["gpus"] else data["cpu"]
    title = f"{data['model']}, {data['mode']} — {machine}, torch {data['torch']}"
    bars(picture, title, data["rows"])
    return [str(text), str(picture)]


def bars(path: Path, title: str, rows: list[Row]) -> None:
    """A bar for the median of each timed rival, with its spread."""
    pyplot = plotter()
    timed = [row for row in rows if outcome(row) == "timed"]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.9 + 0.55 * len(timed)), layout="constrained")
    draw_bars(axes, timed)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_bars(axes: Any, rows: list[Row]) -> None:
    medians = [row["median_s"] * 1e3 for row in rows]
    below = [max(row["median_s"] - row["p20_s"], 0) * 1e3 for row in rows]
    above = [max(row["p80_s"] - row["median_s"], 0) * 1e3 for row in rows]
    colours = [FASTRES_COLOUR if row["rival"] == FASTRES else TORCH_COLOUR for row in rows]
    names = [f"{row['rival']}\n{terminal.milliseconds(row['median_s'])}" for row in rows]
    style = {"ecolor": "#333333", "capsize": 3, "height": 0.62}
    axes.barh(names, medians, xerr=(below, above), color=colours, **style)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per call (median; whiskers: 20th to 80th percentile)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def plotter() -> Any:
    """matplotlib's pyplot, drawing to files only."""
    matplotlib, pyplot = terminal.need("the plot", "matplotlib", "matplotlib.pyplot")
    matplotlib.use("Agg")
    return pyplot
