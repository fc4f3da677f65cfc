"""What the acceptance run measured on a GPU, as tables for README."""

from benchmarks.acceptance.promises import OWN
from benchmarks.table import Row, cases, duration, piped
from fastres.experiments import rivals

WHOLE = (rivals.FROZEN.name, rivals.GRAPHED.name)  # a network or a step as one graph
MODES = (rivals.COMPILE.name, rivals.CUDA_GRAPHS.name, rivals.MAX_AUTOTUNE.name)
NETWORKS = (
    "Each call is timed inside one graph of several calls; training steps and rows marked *as called* are timed as a user calls"
    " them. Other columns: their time divided by that of the fastest way to use fastres in the same run. *torch.compile*: its"
    " fastest mode among those that the time limit allowed."
)
KERNELS = (
    "*Of peak*: of a copy's bandwidth or of a large matrix product's rate, whichever is the limit. Other columns: their time"
    " divided by that of fastres's fastest kernel. *cuDNN*: its fused call, which without a residual turns NaN into 0, or the"
    " fused call after the shortcut's convolution."
)


def networks(rows: list[Row]) -> str:
    lines = []
    for (name, pass_, shape, dtype, _), by in cases([row for row in rows if row["do"] == "network"]).items():
        times = {rival: row["median_s"] for rival, row in by.items() if "median_s" in row}
        ways = {way: times[way] for way in (rivals.FASTRES, *WHOLE) if way in times}
        if not ways:
            continue
        best = min(ways, key=lambda way: ways[way])
        least, images = ways[best], int(shape.partition("x")[0])
        compiled = [times[mode] for mode in MODES if mode in times]
        others = [ways.get(rivals.FASTRES), times.get(rivals.CHANNELS_LAST.name), min(compiled, default=None)]
        what = f"{name} {pass_}, {images} {'image' if images == 1 else 'images'}, {dtype}"
        ratios = ["" if time is None else f"{time / least:.2f}×" for time in others]
        lines.append([what, f"{duration(least)} ({best})", f"{images / least:,.0f}", *ratios])
    columns = ["", "fastres", "images/s", "fastres.optimize alone", "eager channels_last", "torch.compile"]
    return f"{piped(columns, lines)}\n\n{NETWORKS}"


def kernels(rows: list[Row]) -> str:
    lines = []
    for (name, _, shape, dtype, _), by in cases([row for row in rows if row["do"] == "kernel"]).items():
        timed = {rival: row for rival, row in by.items() if "median_s" in row}
        own = [timed[rival] for rival in OWN if rival in timed]
        if not own:
            continue
        best = min(own, key=lambda row: row["median_s"])
        rate = f"{best['gb_per_s']:,.0f} GB/s" if best["bound"] == "memory" else f"{best['gflop_per_s'] / 1e3:,.0f} TFLOP/s"
        cell = f"{duration(best['median_s'])} ({best['rival']})"
        ratios = [f"{timed[r]['median_s'] / best['median_s']:.2f}×" if r in timed else "" for r in ("cudnn", "torch")]
        lines.append([f"{name} {shape} {dtype}", cell, rate, f"{best['of_roof']:.0%}", *ratios])
    return f"{piped(['', 'fastres', 'rate', 'of peak', 'cuDNN', 'PyTorch'], lines)}\n\n{KERNELS}"
