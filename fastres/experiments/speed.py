"""How long an epoch takes with torch's blocks and with fastres's: both trained in turns on the same machine."""

import statistics
import time
from typing import Any

import torch

from fastres import info, terminal
from fastres.experiments.degradation import Study, network
from fastres.experiments.twin import torch_twin
from fastres.train import Trainer, checkpoint

ROUNDS = 5
WAYS = ("fastres", "torch")


def run(study: Study, *, quiet: bool = False) -> dict[str, Any]:
    """Time every network of a study, the training steps of an epoch and its test; writes ``speed-SIZExSIZE.json``."""
    terminal.need("--speed", "rich")
    images = study.load()
    study.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with terminal.Progress("speed", len(study.networks()), quiet=quiet) as progress:
        for kind, depth in study.networks():
            progress.step(f"{kind} {depth}")
            trainers = {}
            for way in WAYS:
                torch.manual_seed(0)
                model = network(kind, depth, study.family, len(images.classes), images.channels)
                model = torch_twin(model) if way == "torch" else model
                trainers[way] = Trainer(model, images, study.settings, device=torch.device(study.device))
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn in range(ROUNDS + 1):  # the first one warms up
                for way in WAYS[:: 1 if turn % 2 else -1]:
                    start = time.perf_counter()
                    trainers[way].epoch()
                    seconds[way].append(time.perf_counter() - start)
            medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
            rows.append({
                "kind": kind, "depth": depth, "epoch_seconds": {way: found[1:] for way, found in seconds.items()},
                "ratio": medians["torch"] / medians["fastres"],
            })  # fmt: skip
    result = {
        **info.versions(), **info.machine(), "data": images.name, "shape": [images.channels, images.size, images.size],
        "batch": study.settings.batch, "rows": rows, "ok": True,
    }  # fmt: skip
    file = study.out / f"speed-{images.size}x{images.size}.json"
    checkpoint.write_json(file, result)
    if not quiet:
        _show(result)
        print(f"wrote {file}")
    return result


def _show(result: dict[str, Any]) -> None:
    cells = []
    for row in result["rows"]:
        seconds = [f"{statistics.median(row['epoch_seconds'][way]):.3f} s" for way in WAYS]
        cells.append([f"{row['kind']} {row['depth']}", *seconds, f"{row['ratio']:.2f}x"])
    shape = "x".join(str(side) for side in result["shape"])
    title = f"seconds of an epoch of {result['data']}, batch {result['batch']} of {shape}"
    terminal.table(title, ("network", *WAYS, "torch over fastres"), cells, f"{result['cpu']}, {result['threads']} threads")
