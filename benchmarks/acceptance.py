"""``python -m benchmarks.acceptance``: what this release promises, checked on this machine and recorded.

With a GPU: the build, parity of every op's CUDA and Triton kernels, ops against the measured copy peak,
ResNet-50 in inference and training. Without: ResNet-50 at batch 1 and 8 and the overhead of a call, on
the CPU. Exit code 1 where a promise is not kept.
"""

import argparse
import functools
import sys
from typing import Any

import torch

from benchmarks import bench_overhead, harness
from benchmarks.cases import CASES
from benchmarks.table import text_table
from fastres import info, tuner
from fastres.experiments import rivals
from fastres.experiments.compare import Row, compare
from fastres.experiments.subject import load
from fastres.ops import REGISTRY

CPU_WAYS = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST, rivals.FREEZING)
GPU_INFERENCE = (*rivals.INFERENCE, rivals.MAX_AUTOTUNE)
GPU_TRAINING = (*rivals.TRAINING, rivals.MAX_AUTOTUNE)
OVER_CHANNELS_LAST = 1.4  # times as fast as eager channels_last
OVER_FREEZING = 0.95  # of the speed of torch.compile with freezing, at least
GPU_SHAPE = (256, 256, 56, 56)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--no-record", action="store_true", help="write no result file")
    arguments = parser.parse_args()
    place = harness.device()
    print(info.text(info.collect()), flush=True)
    rows, promises = on_gpu(place) if place.type == "cuda" else on_cpu()
    print(text_table(rows))
    for text, kept in promises:
        print(f"{'kept  ' if kept else 'BROKEN'} {text}")
    if not arguments.no_record:
        print(f"wrote {harness.save('acceptance', rows, place)}")
    return 0 if all(kept for _, kept in promises) else 1


Promise = tuple[str, bool]


def on_cpu() -> tuple[list[Row], list[Promise]]:
    rows: list[Row] = []
    promises: list[Promise] = []
    for batch in (1, 8):
        found = compare(load("resnet50", batch=batch, device="cpu"), CPU_WAYS, seconds=25.0, step=say)
        rows += found
        promises += speed_promises(found, f"resnet50 batch {batch}")
    for grad, limit in bench_overhead.LIMIT.items():
        _, excess = bench_overhead.measure(grad)
        pass_ = "with grad" if grad else "without grad"
        text = f"add_act {pass_} costs {excess * 1e6:.1f} µs over eager, at most {limit * 1e6:.0f}"
        promises.append((text, excess <= limit))
    return rows, promises


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


def on_gpu(place: torch.device) -> tuple[list[Row], list[Promise]]:
    promises = [(f"backend {name} runs", info.live(name)) for name in ("cuda", "triton")]
    promises += kernel_promises(place)
    peak = harness.copy_peak(place)
    print(f"copy peak {peak:.0f} GB/s", flush=True)
    rows = op_rows(place, peak)
    for batch in (1, 8, 256):
        subject = load("resnet50", batch=batch, dtype="bf16", device="cuda")
        found = compare(subject, GPU_INFERENCE, seconds=10.0, step=say)
        promises.append((f"resnet50 batch {batch} inference: parity", bool(found[0].get("ok"))))
        rows += found
    found = compare(
        load("resnet50", batch=256, dtype="bf16", device="cuda"),
        GPU_TRAINING,
        training=True,
        seconds=20.0,
        step=say,
    )
    promises.append(("resnet50 batch 256 training: parity", bool(found[0].get("ok"))))
    return [*rows, *found], promises


def kernel_promises(place: torch.device) -> list[Promise]:
    """Every GPU kernel of every op on the op's samples in all dtypes and layouts."""
    session, found = tuner.Session(place), []
    for op in REGISTRY.values():
        for backend in op.backends:
            if backend.name in ("cuda", "triton") and info.status(op, backend).startswith("live"):
                reason = session.on_samples(op, backend)
                found.append((f"{op.name} on {backend.name}: {reason or 'parity'}", reason is None))
    return found


def op_rows(place: torch.device, peak: float) -> list[Row]:
    """Every op and each of its GPU kernels, forced, at one large size: GB/s and the share of the copy
    peak.
    """
    rows = []
    for case in CASES:
        if case.backward or case.convolution:
            continue
        tensors = case.tensors(GPU_SHAPE, torch.bfloat16, place)
        op, args = REGISTRY[case.op], case.op_args(tensors)
        calls: dict[str, Any] = {"eager": lambda case=case, tensors=tensors: case.eager(*tensors)}
        for backend in op.backends:
            if backend.why_not(*args) is None and backend.name != "torch":
                calls[backend.name] = functools.partial(backend.load(), *args)
        calls[rivals.FASTRES] = lambda case=case, tensors=tensors: case.fused(*tensors)
        moved, flops = op.cost(*args)
        common = {
            "name": case.op,
            "pass": "forward",
            "shape": list(GPU_SHAPE),
            "dtype": "bfloat16",
            "bytes": moved,
            "flops": flops,
        }
        with torch.no_grad():
            found = harness.rows_of(common, calls, {}, place)
        rows += [{**row, "of_copy_peak": row["gb_per_s"] / peak} for row in found]
    return rows


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
