"""The degradation study's table and figure."""

from pathlib import Path
from typing import Any

from fastres import terminal
from fastres.experiments import report

KINDS = ("plain", "residual")
CIFAR10 = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}  # He et al. 2016, table 6


def _final(entry: dict[str, Any], key: str) -> list[float]:
    return [100 * run[key][-1] for run in entry["runs"]]


def cells(values: list[float]) -> str:
    """A mean of percentages, and its range where there are several."""
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A row for each network: its counts, the paper's, and its final errors."""
    found = []
    for entry in result["networks"]:
        paper = entry["paper"]
        published = paper["parameters"] or paper["multiply_adds"]
        ours = paper["parameters_here"] if paper["parameters"] else paper["multiply_adds_here"]
        beside = f"{_short(ours)} (paper {_short(published)})" if published else _short(paper["parameters_here"])
        found.append([
            f"{entry['kind']} {entry['depth']}", _short(entry["parameters"]), _short(entry["multiply_adds"]), beside,
            cells(_final(entry, "train_error")), cells(_final(entry, "test_error")),
            f"{_median([s for run in entry['runs'] for s in run['epoch_seconds']]):.2f} s",
        ])  # fmt: skip
    return found


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    full = "parameters at 32x32 in colour" if result["family"] == "cifar" else "multiply-adds at 224x224, table 1's strides"
    return ("network", "parameters", "multiply-adds", full, "training error, %", "test error, %", "epoch")


def _short(count: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:g}"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def described(result: dict[str, Any]) -> str:
    data = result["data"]
    shape = "x".join(str(side) for side in data["shape"])
    seeds = f"{len(result['seeds'])} seed{'s' * (len(result['seeds']) > 1)}"
    return (
        f"{data['name']} ({data['training']} training and {data['test']} test images of {shape}),"
        f" {result['settings']['epochs']} epochs, {seeds}, blocks of {result['blocks']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """A row for each depth: errors in percent, the mean over the seeds and their range, and the paper's of CIFAR-10."""
    lines = [
        "| layers | parameters | plain: training | test | residual: training | test | He et al., residual, CIFAR-10: test |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    by_depth: dict[int, dict[str, Any]] = {}
    for entry in result["networks"]:
        by_depth.setdefault(entry["depth"], {})[entry["kind"]] = entry
    for depth, found in by_depth.items():
        errors = [cells(_final(found[kind], key)) for kind in KINDS for key in ("train_error", "test_error")]
        published = f"{CIFAR10[depth]:.2f}" if depth in CIFAR10 and result["family"] == "cifar" else "–"
        lines.append(f"| {' | '.join([str(depth), _short(found[KINDS[0]]['parameters']), *errors, published])} |")
    where = f"{result['cpu']}, torch {result['torch']}: {described(result)}, {result['date']}"
    return "\n".join([*lines, "", f"{where}. Errors in percent after the last epoch, mean (range over the seeds)."])


def agreement(result: dict[str, Any], other: dict[str, Any]) -> str | None:
    """How many errors with torch's blocks and with those of fastres differ by no more than the seeds do; None for two studies
    that cannot be compared."""
    if any(result[key] != other[key] for key in ("family", "data", "settings", "seeds")):
        return None
    theirs = {(entry["kind"], entry["depth"]): entry["runs"] for entry in other["networks"]}
    near = []
    for entry in result["networks"]:
        runs = theirs.get((entry["kind"], entry["depth"]))
        for key in ("train_error", "test_error") if runs else ():
            for one, two in zip(_by_epoch(entry["runs"], key), _by_epoch(runs, key), strict=True):
                spread = max(max(one) - min(one), max(two) - min(two))
                near.append(abs(sum(one) / len(one) - sum(two) / len(two)) <= spread + 1e-12)
    if not near:
        return None
    return (
        f"Of {len(near)} mean errors (networks, epochs, training and test) {sum(near)} differ between torch's blocks and those"
        " of fastres by no more than the seeds do."
    )


def _by_epoch(runs: Any, key: str) -> list[tuple[float, ...]]:
    """Every epoch's error of all seeds."""
    return list(zip(*(run[key] for run in runs), strict=True))


def show(result: dict[str, Any]) -> None:
    caption = f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}; mean (range) over the seeds"
    terminal.table(f"degradation: {described(result)}", columns(result), rows(result), caption)
    if skipped := result["data"].get("skipped"):
        print(f"{len(skipped)} images cannot be read and were left out, {skipped[0]} first")
    for name, check in result["checks"].items():
        rises = ", ".join(f"{100 * value:+.2f}" for value in check["value"])
        word, bound = next((key, value) for key, value in check.items() if key.startswith("must"))
        state = "ok    " if check["ok"] else "FAILED"
        print(f"{state} {name}: {rises} points, {word.replace('must', 'each must')} {100 * bound:.2f}")


def plot(path: Path, result: dict[str, Any]) -> None:
    """Errors against epochs, plain beside residual, and final errors against depth; bands and bars span the seeds."""
    pyplot = report.plotter()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharey=True)
    depths = sorted({entry["depth"] for entry in result["networks"]})
    colours = {depth: pyplot.get_cmap("viridis")(0.85 * (1 - i / max(1, len(depths) - 1))) for i, depth in enumerate(depths)}
    for axis, kind in zip(axes, KINDS, strict=False):
        for entry in (entry for entry in result["networks"] if entry["kind"] == kind):
            for key, style, width in (("train_error", "--", 1.0), ("test_error", "-", 1.8)):
                label = f"{entry['depth']} layers" if key == "test_error" else None
                _curve(axis, entry, key, color=colours[entry["depth"]], linestyle=style, linewidth=width, label=label)
        axis.set(xlabel="epoch", ylim=(0, 100))
        axis.set_title(f"{kind} networks (solid: test, dashed: training)", fontsize=10, loc="left")
    axes[1].legend(fontsize=8, frameon=False)  # where all lines are low
    axes[0].set_ylabel("error, %")
    for kind, colour in zip(KINDS, (report.TORCH_COLOUR, report.FASTRES_COLOUR), strict=True):
        mine = sorted((entry for entry in result["networks"] if entry["kind"] == kind), key=lambda entry: entry["depth"])
        for key, style, marker in (("train_error", "--", "o"), ("test_error", "-", "s")):
            values = [_final(entry, key) for entry in mine]
            means = [sum(found) / len(found) for found in values]
            # Never below 0, as a rounded mean of equal values may make it.
            below = [max(0.0, mean - min(found)) for mean, found in zip(means, values, strict=True)]
            above = [max(0.0, max(found) - mean) for mean, found in zip(means, values, strict=True)]
            label = f"{kind}, {'training' if key == 'train_error' else 'test'}"
            axes[2].errorbar(
                [entry["depth"] for entry in mine], means, yerr=(below, above), color=colour, linestyle=style,
                marker=marker, markersize=4, capsize=3, label=label,
            )  # fmt: skip
    axes[2].set(xlabel="layers", xticks=depths)
    axes[2].set_title("after the last epoch", fontsize=10, loc="left")
    axes[2].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{described(result)}; torch {result['torch']}", fontsize=10)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _curve(axis: Any, entry: dict[str, Any], key: str, **style: Any) -> None:
    seeds = [[100 * value for value in run[key]] for run in entry["runs"]]
    epochs = range(1, len(seeds[0]) + 1)
    axis.plot(epochs, [sum(values) / len(values) for values in zip(*seeds, strict=True)], **style)
    lows, highs = [[pick(values) for values in zip(*seeds, strict=True)] for pick in (min, max)]
    axis.fill_between(epochs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
