"""``python -m benchmarks.acceptance``: what this release promises, checked on this machine and recorded.

On a GPU, in the minutes given: the build, parity of every kernel (op by op, the tests that need a GPU, compute-sanitizer),
kernels against the measured copy and matmul peaks and against PyTorch, whole networks against eager and compiled PyTorch; last,
what cuDNN does in one graph.
Without one: parity of the CPU kernels, ResNet-50 at batch 1 and 8, the overhead of a call. Everything goes to one JSON and
one PNG below benchmarks/results/. Exit code 1 where a promise is not kept.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from benchmarks import bench_overhead, command, harness
from benchmarks.acceptance import lane, plot, tasks
from benchmarks.acceptance.promises import Promise, kernel_promises, parity_promises, speed_promises
from benchmarks.acceptance.run import OUT_OF_TIME, Budget, perform_all, say
from benchmarks.table import text_table
from fastres import info, terminal, tune
from fastres.experiments import rivals
from fastres.experiments.compare import Row, compare
from fastres.experiments.subject import load

# Of the time that is left then; the tests of the lane come last but for cuDNN's graphs, which take what is left.
PARTS = {"parity": 0.35, "kernels": 0.3, "models": 0.7, "cudnn": 1.0}
PART_OF = {  # of rows
    "validate": "parity", "lane": "parity", "kernel": "kernels", "peaks": "kernels", "network": "models",
    "integers": "models", "cudnn": "cudnn",
}  # fmt: skip
PROMISED = (("network", rivals.FASTRES), ("integers", rivals.FROZEN.name))  # whose parity is one
LANE_S = 90.0  # that the tests of the lane take at least
CUDNN_S = 120.0  # that cuDNN's graphs take at most, all of them
CPU_WAYS = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST, rivals.FREEZING)


def main() -> int:
    parser = command.Parser("acceptance", "Check on this machine what this release promises, and record it.")
    text = "one or more; all by default; the rows of other parts stay in the result file where this commit wrote them"
    parser.add_argument("--part", choices=PARTS, action="append", help=text)
    parser.add_argument("--minutes", type=command.minutes, default=9.0, help="for all of it; what does not fit is shown so")
    text = "compile rivals and kernels beside the validations: the times until rivals are ready are then those of warm caches"
    parser.add_argument("--warm", action="store_true", help=text)
    parser.add_argument("--no-record", action="store_true", help="write no result file")
    args = parser.parse_args()
    place, parts = harness.device(), args.part or list(PARTS)
    if not args.no_record:
        harness.check_writable(place)
        terminal.need("the picture beside the results", "matplotlib")
    on_gpu, budget = place.type == "cuda", Budget(60 * args.minutes)
    built = [{"do": "lane", **row} for row in lane.build(place, budget)] if on_gpu else []  # before anything loads them
    print(info.text(info.collect()), flush=True)
    if not on_gpu:
        print("no GPU: the kernels for GPUs are not run; what a CPU can show follows", flush=True)
    before = harness.clocks(place)
    with tempfile.TemporaryDirectory() as cache:  # choices of this run alone: only what it validates is chosen
        os.environ["FASTRES_CACHE_DIR"] = cache
        measure = gpu_parts if on_gpu else cpu_parts
        kept = [row for row in harness.measured_before("acceptance", place) if PART_OF.get(row["do"]) not in parts]

        def keep(rows: list[Row]) -> None:
            if rows and not args.no_record:  # what there is, should the rest be cut off
                clocks = {"before": before, "after": harness.clocks(place)}
                more = {"minutes": args.minutes, "warm": args.warm, "clocks": clocks}
                harness.save("acceptance", [*kept, *built, *rows], place, **more)

        with ThreadPoolExecutor(1) as beside:
            compiling = beside.submit(compile_first, place, budget.share(PARTS["parity"])) if args.warm else None
            rows, promises = measure(place, parts, budget, keep, compiling)
    rows, promises = [*built, *rows], [*parity_promises(built), *promises]
    show(rows, promises)
    if not rows:
        print("nothing was measured, and no file was written")
    elif not args.no_record:
        path = harness.RESULTS / harness.machine_name(place) / "acceptance.json"
        plot.draw(path)
        print(f"wrote {path} and its picture")
    return 0 if all(kept for _, kept in promises) else 1


def gpu_parts(
    place: torch.device, parts: list[str], budget: Budget, keep: Callable[[list[Row]], None], compiling: Future | None
) -> tuple[list[Row], list[Promise]]:
    """Kernels are validated first: only what is valid is chosen and timed. The tests take what time is left."""
    rows: list[Row] = []
    promises: list[Promise] = []
    if "parity" in parts:
        rows += validated(place, budget.share(PARTS["parity"]))
        promises += parity_promises(rows)
        keep(rows)
    if compiling is not None:
        compiling.result()  # nothing is timed before it is over
    if "kernels" in parts:
        rows += perform_all(tasks.kernels(broken(rows)), budget.share(PARTS["kernels"]), place)
        promises += kernel_promises(rows)
        keep(rows)
    if "models" in parts:
        with_tests = "parity" in parts and budget.left() > 2 * LANE_S
        share = budget.share(PARTS["models"]) if with_tests else budget
        rows += perform_all(tasks.whole(compiling is not None), share, place)
        promises += [
            (f"{row['name']} {row['pass']} {row['shape'][0]} {row['dtype']}: parity", row["ok"])
            for row in rows if "ok" in row and (row["do"], row["rival"]) in PROMISED
        ]  # fmt: skip
        keep(rows)
    if "parity" in parts:
        found: list[Row] = [{"name": "tests of the lane cuda", "missing": OUT_OF_TIME}]
        if budget.left() > LANE_S:
            found = [*lane.tests("cuda", budget), *lane.sanitized(budget)]
        tested = [{"do": "lane", **row} for row in found]
        rows += tested
        promises += parity_promises(tested)
        keep(rows)
    if "cudnn" in parts:
        rows += perform_all(tasks.graphs_of_cudnn(), Budget(min(budget.left(), CUDNN_S)), place)
        keep(rows)
    return rows, promises


def broken(rows: list[Row]) -> list[list[str]]:
    """Op and backend of the kernels that were found wrong, or to end their process, or not to end."""
    wrong = [row for row in rows if row["do"] == "validate" and not row.get("ok") and row.get("missing") != OUT_OF_TIME]
    return [list(names) for names in dict.fromkeys((row["name"], row["rival"]) for row in wrong)]


def compile_first(place: torch.device, budget: Budget) -> None:
    """Fill the caches of torch.compile and Triton."""
    for row in perform_all(tasks.compilations(), budget, place, at_once=6):
        say(f"{row['name']}: {row['missing']}")


def validated(place: torch.device, budget: Budget) -> list[Row]:
    """Every kernel on its samples; the verdicts go to the tuning cache of this run, so that only what is valid is chosen and
    timed. Without this part the verdicts that are shipped hold.
    """
    at_once = max(1, (os.cpu_count() or 1) - 4)  # most of it is compiling
    rows = perform_all(tasks.validations(place), budget, place, at_once=at_once)
    verdicts: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for name, rival in dict.fromkeys((row["name"], row["rival"]) for row in rows):
        valid = all(row.get("ok") for row in rows if (row["name"], row["rival"]) == (name, rival))
        verdicts[valid].setdefault(rival, []).append(name)
    tune.store(place, verdicts[True], {}, verdicts[False])
    return rows


def cpu_parts(
    place: torch.device, parts: list[str], budget: Budget, keep: Callable[[list[Row]], None], compiling: Future | None
) -> tuple[list[Row], list[Promise]]:
    """ResNet-50 and the overhead are not cut short: their rows are compared with those of earlier commits."""
    rows: list[Row] = []
    promises: list[Promise] = []
    if "parity" in parts:
        rows += perform_all(tasks.validations(place), budget.share(PARTS["parity"]), place)
        promises += parity_promises(rows)
    if "models" not in parts:
        keep(rows)
        return rows, promises
    for batch in (1, 8):
        found = compare(load("resnet50", batch=batch, device="cpu"), CPU_WAYS, seconds=25.0, step=say)
        rows += [{"do": "network", **row} for row in found]
        promises += speed_promises(found, f"resnet50 batch {batch}")
    for grad, limit in bench_overhead.LIMIT.items():
        _, excess = bench_overhead.add_act_over_eager(grad)
        pass_ = "with grad" if grad else "without grad"
        text = f"add_act {pass_} costs {excess * 1e6:.1f} µs over eager, at most {limit * 1e6:.0f}"
        promises.append((text, excess <= limit))
    keep(rows)
    return rows, promises


def show(rows: list[Row], promises: list[Promise]) -> None:
    networks = [row for row in rows if row["do"] == "network"]
    if networks:
        print(text_table(networks))
    for row in rows:
        if row["do"] == "kernel" and "of_roof" in row:
            where = f"{row['name']} {'x'.join(map(str, row['shape']))} {row['dtype']} on {row['rival']}"
            print(f"{where}: {row['median_s'] * 1e6:.0f} µs, {row['of_roof']:.0%} of the {row['bound']} peak")
        elif row["do"] == "cudnn" and "median_s" in row:
            print(f"{row['name']} {row['dtype']} {row['rival']}: {row['median_s'] * 1e6:.0f} µs, {row['ratio']:.2f} of fastres")
        elif row["do"] != "network" and ("missing" in row or "failure" in row):
            print(f"{row['name']} {row.get('rival', '')}: {row.get('missing') or row.get('failure')}")
    for text, kept in promises:
        print(f"{'kept  ' if kept else 'BROKEN'} {text}")


if __name__ == "__main__":
    sys.exit(command.run(main))
