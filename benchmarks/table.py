"""Rows of results as tables: one line a case, one column a rival."""

from typing import Any

from fastres.experiments.rivals import FASTRES

Row = dict[str, Any]


def cases(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows by case (name, pass, shape, dtype, layout) and rival, in their order."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        shape = "x".join(map(str, row.get("shape", ())))
        case = (row["name"], row.get("pass", ""), shape, row.get("dtype", ""))
        found.setdefault(case, {})[row["rival"]] = row
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
    if "median_s" not in row:
        return "wrong"
    text = duration(row["median_s"])
    if row["rival"] == FASTRES:
        return text + (f", {row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else "")
    return f"{row['ratio']:.2f}×" + (f" (ready after {row['wait_s']:.0f} s)" if row.get("wait_s", 0) >= 1 else "")


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
