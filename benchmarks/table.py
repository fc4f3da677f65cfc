"""Rows of results as tables: one line a case, one column a rival."""

from statistics import geometric_mean
from typing import Any

from fastres.experiments.rivals import FASTRES

Row = dict[str, Any]


def case_of(row: Row) -> tuple[str, ...]:
    """What a row and those of its rivals share: name, pass, shape, dtype, memory fresh or reused."""
    shape = "x".join(map(str, row.get("shape", ())))
    return row["name"], row.get("pass", ""), shape, row.get("dtype", ""), row.get("memory", "")


def cases(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows by case and rival, in their order."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), {})[row["rival"]] = row
    return found


def condensed(rows: list[Row]) -> list[Row]:
    """Kernels forward and backward in one row for all shapes: geometric mean, least and most; other rows as they are,
    without kernels forward alone.
    """
    found: list[Row] = []
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "of_copy_peak" not in row:
            found.append(row)
        elif row["pass"] != "forward":
            key = row["name"], row["pass"], row["dtype"], row["memory"], row["rival"]
            groups.setdefault(key, []).append(row)
    for (name, pass_, dtype, memory, rival), members in groups.items():
        ratios = [row["ratio"] for row in members]
        means = {key: geometric_mean(row[key] for row in members) for key in ("ratio", "gb_per_s", "of_copy_peak")}
        about = {"name": name, "pass": f"{pass_}, {len(members)} shapes", "dtype": dtype, "memory": memory}
        found.append({**about, "rival": rival, **means, "least": min(ratios), "most": max(ratios)})
    return found


def rivals(rows: list[Row]) -> list[str]:
    """Names of the rivals, fastres first."""
    return [FASTRES, *(name for name in dict.fromkeys(row["rival"] for row in rows) if name != FASTRES)]


def grid(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: fastres with its median (and GB/s), every rival with the ratio of its time to that
    of fastres.
    """
    names = rivals(rows)
    lines = []
    for case, by_rival in cases(rows).items():
        lines.append([" ".join(filter(None, case)), *(cell(by_rival.get(name)) for name in names)])
    return ["", *names], lines


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "missing" in row:
        return "missing"
    if "peak_bytes" in row:
        return f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["rival"] == FASTRES else f"{row['ratio']:.2f}×"
    if "least" in row and row["rival"] == FASTRES:
        return f"{row['gb_per_s']:.0f} GB/s, {row['of_copy_peak']:.0%} of a copy's"
    if "least" in row:
        return f"{row['ratio']:.2f}× ({row['least']:.2f}× to {row['most']:.2f}×)"
    if "median_s" not in row:
        return "wrong"
    text = duration(row["median_s"])
    if row["rival"] == FASTRES:
        return text + (f", {row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else "")
    return f"{row['ratio']:.2f}×" + (f" (ready after {row['wait_s']:.0f} s)" if row.get("wait_s", 0) >= 1 else "")


def means(rows: list[Row]) -> str:
    """A line for each pass, dtype and size of images, a column for each rival: the geometric mean of its ratios, the least and
    the most."""
    rows = [row for row in rows if "shape" in row and row["rival"] != row.get("base", FASTRES)]
    names = list(dict.fromkeys(row["rival"] for row in rows))
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        size = "x".join(map(str, row["shape"][2:]))
        groups.setdefault((row["pass"], row["dtype"], size), []).append(row)
    lines = []
    for (pass_, dtype, size), members in groups.items():
        networks = ", ".join(dict.fromkeys(row["name"] for row in members))
        batches = ", ".join(dict.fromkeys(str(row["shape"][0]) for row in members))
        what = f"{pass_} {dtype}: {networks}; {size}, batches of {batches}"
        lines.append([what, *(mean([row for row in members if row["rival"] == name]) for name in names)])
    return piped(["", *names], lines)


def mean(rows: list[Row]) -> str:
    """The geometric mean of one rival's ratios, with their number where not every row has one."""
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    if not ratios:
        return "missing" if rows else ""
    some = f", {len(ratios)} of {len(rows)}" if len(ratios) < len(rows) else ""
    return f"{geometric_mean(ratios):.2f}× ({min(ratios):.2f}× to {max(ratios):.2f}×{some})"


def ratio_or_reason(row: Row) -> float | str:
    """A rival's time over that of fastres, or why there is none: it is missing, or its own error exceeds the budget."""
    return round(row["ratio"], 3) if "ratio" in row else row.get("missing", "wrong")


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def text_table(rows: list[Row]) -> str:
    reasons = sorted({f"missing: {row['rival']}: {row['missing']}" for row in rows if "missing" in row})
    return "\n".join([aligned(*grid(rows)), *reasons])


def markdown(rows: list[Row]) -> str:
    return piped(*grid(rows))


def aligned(columns: list[str], lines: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    shown = [
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
        for line in [columns, *lines]
    ]
    return "\n".join(shown)


def piped(columns: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = [":--", *["--:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])
