"""What is promised of results, and whether the rows keep it."""

from benchmarks.table import Row, cases
from fastres.experiments import rivals

Promise = tuple[str, bool]
OVER_CHANNELS_LAST = 1.4  # times as fast as eager channels_last, on a CPU
OVER_FREEZING = 0.95  # of the speed of torch.compile with freezing, at least, on a CPU
OF_COPY = 0.85  # of the measured copy's bandwidth, at least, for a kernel bound by memory
OWN = ("cuda", "cuda_wide", "cuda_cluster", "triton")
PEERS = ("cudnn", "torch")  # cuDNN's fused call, cuDNN and PyTorch's pointwise kernels
APART = "apart"  # cuDNN and the pass that finds the statistics


def parity_promises(rows: list[Row]) -> list[Promise]:
    """Every kernel and every test within budget; tools that are not installed promise nothing."""
    found = []
    for row in rows:
        if row["do"] == "validate":
            what = f"{row['name']} on {row['rival']} in {row.get('dtype', 'all dtypes')}"
            found.append((f"{what}: {row.get('failure') or row.get('missing') or 'parity'}", bool(row.get("ok"))))
        elif row["do"] == "lane" and "missing" not in row:
            found.append((f"{row['name']}: {row.get('failure') or 'passed'}", row["ok"]))
    return found


def kernel_promises(rows: list[Row]) -> list[Promise]:
    """Each kernel bound by memory near a copy's speed; each fused convolution no slower than cuDNN's two ways."""
    found = []
    for by_rival in cases([row for row in rows if row["do"] == "kernel"]).values():
        timed = {name: row for name, row in by_rival.items() if "median_s" in row}
        own = [timed[name] for name in OWN if name in timed]
        if not own:
            continue
        best = min(own, key=lambda row: row["median_s"])
        what = f"{best['name']} {'x'.join(map(str, best['shape']))} {best['dtype']} on {best['rival']}"
        if not best["name"].startswith("conv"):
            share = best["of_roof"]
            found.append((f"{what}: {share:.0%} of a copy's bandwidth, at least {OF_COPY:.0%}", share >= OF_COPY))
        elif others := [timed[name]["median_s"] for name in _peers(best["name"]) if name in timed]:
            ratio = min(others) / best["median_s"]
            found.append((f"{what}: {ratio:.2f} times as fast as the best of cuDNN, at least 1", ratio >= 1))
    return found


def _peers(name: str) -> tuple[str, ...]:
    return (*PEERS, APART) if name.startswith(("conv_statistics", "conv_backward_bn_act")) else PEERS


def speed_promises(rows: list[Row], what: str) -> list[Promise]:
    by_rival = {row["rival"]: row for row in rows}
    found = [(f"{what}: parity", bool(by_rival[rivals.FASTRES].get("ok")))]
    for rival, least in ((rivals.CHANNELS_LAST, OVER_CHANNELS_LAST), (rivals.FREEZING, OVER_FREEZING)):
        ratio = by_rival[rival.name].get("ratio")
        if ratio is None:
            found.append((f"{what}: {rival.name} could not be measured", False))
        else:
            found.append((f"{what}: {ratio:.2f} times as fast as {rival.name}, at least {least}", ratio >= least))
    return found
